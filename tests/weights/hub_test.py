"""Weights by name: from a server like huggingface.co, and from the local cache."""

import base64
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import os
import subprocess
import sys
import threading

from huggingface_hub import constants
import numpy as np
import pytest
import reference
from runs import ROOT
from safetensors.numpy import save_file
from small_models import MODEL, equal, random_params, write_shards

from benchmarks import input_pipeline
from convit_jax import VARIANTS, create_model, to_torch
from convit_jax.cli import convert
from convit_jax.weights import adapt, hub
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.safetensors import save_weights

REVISION = "0123456789abcdef0123456789abcdef01234567"
# Run in a process of its own that uses the test's server: prints a line for each name.
SCRIPT = """
import json, sys
from convit_jax.weights.load import read_weights
for source in sys.argv[2:]:
    try:
        loaded = read_weights(source, offline=sys.argv[1] == "offline")
    except (ValueError, OSError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
    else:
        model = loaded.model
        sums = float(loaded.params["pos_embed"].sum()), loaded.mean, loaded.std, loaded.crop_pct
        print(json.dumps([model.depth, model.num_classes, *sums, loaded.class_names]))
"""


class Handler(BaseHTTPRequestHandler):
    """Serves /ORGANISATION/NAME/resolve/REVISION/FILE, with the headers huggingface_hub needs."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        parts = self.path.strip("/").split("/")
        folder = self.server.root.joinpath(*parts[:2])
        file = folder.joinpath(*parts[4:])
        if "resolve" in parts:  # counts files, not the library's other requests
            self.server.requests.append(self.path)
        error = None
        if not folder.is_dir():
            error = "RepoNotFound"
        elif parts[3] not in ("main", REVISION):
            error = "RevisionNotFound"
        elif not file.is_file():
            error = "EntryNotFound"
        content = b"" if error else file.read_bytes()
        self.send_response(404 if error else 200)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{"/".join(parts[:2]).encode().hex()}-{parts[-1]}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_POST(self):
        """Makes repositories and takes commits, as huggingface_hub asks for them."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.partition("?")[0].strip("/").split("/")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        status = {"writer": 200, "reader": 403}.get(token, 401)
        here, answer = f"http://127.0.0.1:{self.server.server_port}", {}
        if status != 200:
            answer = {"error": "no"}
        elif parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            self.server.visibility[name] = asked.get("visibility")
            answer = {"url": f"{here}/{name}"}
        elif parts[-2] == "preupload":
            files = json.loads(body)["files"]
            answer["files"] = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
        elif parts[-2] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    path = self.server.root.joinpath(*parts[2:4], line["value"]["path"])
                    path.write_bytes(content)
            url = f"{here}/{'/'.join(parts[2:4])}/commit/{REVISION}"
            answer = {"commitUrl": url, "commitOid": REVISION}
        content = json.dumps(answer).encode()  # the rest is validate-yaml, which wants nothing
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.requests, server.visibility = tmp_path / "server", [], {}
    server.root.mkdir()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def publish(server, name, config, params=None):
    folder = server.root / name
    folder.mkdir(parents=True)
    if params is not None:
        save_file(to_torch(params), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def ask(server, cache, *sources, offline=False, script=SCRIPT, cwd=None, **variables):
    """Runs a script on each source in a process of its own, and returns what it prints."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env["PYTHONPATH"] = str(ROOT)
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
    mode = "offline" if offline else "online"
    done = subprocess.run(
        [sys.executable, "-c", script, mode, *sources],
        env=env | variables, cwd=cwd, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# As timm.models.push_to_hf_hub writes it.
CONFIG = {
    "architecture": "convit_tiny",
    "num_classes": 7,
    "num_features": 192,
    "pretrained_cfg": {
        "tag": "fb_in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
        "num_classes": 7,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    },
    "label_names": list("abcdefg"),
}


def test_online_offline_and_without_a_network(server, tmp_path):
    params = random_params(create_model("convit_tiny", num_classes=7))
    publish(server, "timm/convit_tiny.fb_in1k", CONFIG, params)
    publish(server, "mine/small", {}, random_params())
    publish(server, "mine/empty", {})
    write_shards(publish(server, "mine/shards", {}), to_torch(random_params()))
    publish(server, "mine/broken", "{", random_params())
    total = float(params["pos_embed"].sum())
    tiny = [12, 7, total, [0.5, 0.4, 0.3], [0.1, 0.2, 0.3], 0.9, list("abcdefg")]
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 0.875]
    small = [3, 5, float(random_params()["pos_embed"].sum()), *imagenet, None]
    cache = tmp_path / "cache"

    answers = ask(
        server, cache, "convit_tiny", "timm/convit_tiny.fb_in1k", f"hf-hub:mine/small@{REVISION}",
        "mine/shards", "mine/empty", "mine/broken", "mine/nothing", "mine/small@v2",
        "convit_tiny_plus",
    )  # fmt: skip
    assert answers[:4] == [tiny, tiny, small, small]
    kinds, messages = zip(*answers[4:], strict=True)
    assert kinds == ("ValueError",) * 5
    assert "mine/empty: expected model.safetensors or pytorch_model.bin in it" in messages[0]
    assert "config.json: not JSON" in messages[1]
    assert "mine/nothing: no such file or folder here, and no such repository on" in messages[2]
    assert "has no such revision of mine/small" in messages[3]
    assert "convit_tiny_plus: expected one of convit_tiny, " in messages[4]

    asked = len(server.requests)
    names = ("convit_tiny", f"hf-hub:mine/small@{REVISION}", "timm/convit_base.fb_in1k")
    answers = ask(server, cache, *names, offline=True)
    assert answers[:2] == [tiny, small]
    kind, message = answers[2]
    assert kind == "OSError"
    assert "not in the cache" in message
    assert "and offline. Fetch it once with a network" in message
    assert ask(server, cache, names[0], HF_HUB_OFFLINE="1") == [tiny]
    assert len(server.requests) == asked

    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    # The library would wait 23 s between its attempts.
    script = f"import time; time.sleep = lambda _: None{SCRIPT}"
    answers = ask(server, cache, *names[1:], script=script, **nowhere)
    assert answers[0] == small
    assert "and http://127.0.0.1:9 cannot be reached. Fetch it once" in answers[1][1]


@pytest.fixture
def mine(tmp_path):
    """Weights to publish."""
    loaded = Loaded(MODEL, random_params(), class_names=tuple("abcde"), mean=(0.5, 0.4, 0.3))
    save_weights(tmp_path / "mine.safetensors", loaded)
    return tmp_path / "mine.safetensors"


def test_publishing_and_what_stands_in_its_way(server, mine, tmp_path, monkeypatch, capsys):
    def publish(token, name="mine/new", endpoint=f"http://127.0.0.1:{server.server_port}"):
        """Returns the message with which the command ends; None if it succeeds."""
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # the library read $HF_ENDPOINT before
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        try:
            convert.main([str(mine), f"hub:{name}", "--private"])
        except SystemExit as error:
            return str(error)
        return None

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    assert "no token: set $HF_TOKEN to one that may write, or run `hf auth login`" in publish("")
    assert "mine/new: http://127.0.0.1" in publish("wrong")
    assert "does not know the token (401)" in publish("wrong")
    assert "does not let this token write there (403): it needs write access" in publish("reader")
    assert "DST: expected hub:ORGANISATION/NAME, got hub:nothing" in publish("writer", "nothing")
    nowhere = publish("writer", endpoint="http://127.0.0.1:9")
    assert nowhere.startswith("error: mine/new: http://127.0.0.1:9: ")
    assert server.visibility == {}

    assert publish("writer") is None
    assert server.visibility == {"mine/new": "private"}
    folder = server.root / "mine" / "new"
    written = sorted(file.name for file in folder.iterdir())
    assert written == ["README.md", "config.json", "model.safetensors"]
    # A second time the model card stays, which its owner may have edited.
    (folder / "README.md").write_text("edited")
    (folder / "config.json").unlink()
    assert publish("writer") is None
    assert (folder / "README.md").read_text() == "edited"
    assert "its model card stays as it was" in capsys.readouterr().err
    again = read_weights(folder)
    equal(again.params, random_params())
    assert (again.class_names, again.mean) == (tuple("abcde"), (0.5, 0.4, 0.3))


# Publishes sys.argv[2] as sys.argv[3], and prints the logits of timm's model of that name.
PUSH = """
import json, sys
from convit_jax.cli import convert
convert.main([sys.argv[2], f"hub:{sys.argv[3]}"])
from benchmarks import peer
timm, torch = peer.import_timm()
model = timm.create_model(f"hf-hub:{sys.argv[3]}", pretrained=True).eval()
with torch.inference_mode():
    print(json.dumps(model(torch.ones(1, 3, 16, 16)).tolist()))
"""


@pytest.mark.slow
def test_timm_reads_what_was_published_by_its_name(server, mine, tmp_path):
    reference.import_timm()
    name, token = "mine/new", {"HF_TOKEN": "writer"}
    (logits,) = ask(server, tmp_path / "cache", str(mine), name, script=PUSH, **token)
    here = MODEL.apply({"params": random_params()}, np.ones((1, 16, 16, 3), np.float32))
    np.testing.assert_allclose(here, logits, atol=2e-5 * np.abs(logits).max())


def test_a_repository_that_was_copied_into_a_folder(tmp_path, caplog):
    model = create_model("convit_tiny", num_classes=7, image_size=32)
    config = {**CONFIG, "pretrained_cfg": {**CONFIG["pretrained_cfg"], "interpolation": "bilinear"}}
    folder = tmp_path / "copy"
    folder.mkdir()
    save_file(to_torch(random_params(model)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    loaded = read_weights(folder)
    assert loaded.model == model
    assert (loaded.mean, loaded.class_names) == ((0.5, 0.4, 0.3), tuple("abcdefg"))
    assert "asks for interpolation bilinear; using bicubic" in caplog.text
    equal(loaded.params, random_params(model))

    for key, value, message in (
        ("architecture", "convit_small", "embed_dim: config.json of .*: 432; the weights: 192"),
        ("num_classes", 8, "num_classes: config.json of .*: 8; the weights: 7"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=message):
            read_weights(folder)
    # Class names are left out if their number is not that of the classes.
    (folder / "config.json").write_text(json.dumps({**config, "label_names": ["a", "b"]}))
    assert read_weights(folder).class_names is None
    assert "2 class names left out" in caplog.text


def test_a_rectangle_is_told_by_the_configuration(tmp_path):
    model = MODEL.clone(image_size=(16, 48))
    save_file(to_torch(random_params(model)), tmp_path / "model.safetensors")
    config = {"architecture": "vit_wide", "pretrained_cfg": {"input_size": [3, 16, 48]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path).model == model
    resized = read_weights(tmp_path, image_size=(24, 24)).params["pos_embed"]
    expected = adapt.resample_pos_embed(
        random_params(model)["pos_embed"], (6, 6), source_grid=(4, 12)
    )
    np.testing.assert_array_equal(resized, expected)


def test_the_lines_of_the_page_on_weights(server, tmp_path):
    """From a name to a prediction; the weights are random ones, of a small model."""
    model = MODEL.clone(image_size=224, patch_size=16, num_classes=1000)
    publish(server, "timm/convit_base.fb_in1k", {}, random_params(model))
    (tmp_path / "photo.jpg").write_bytes(input_pipeline.photos()[0])
    page = (ROOT / "docs" / "weights.md").read_text()
    lines = page.partition("to a class:\n\n```python\n")[2].partition("```")[0]
    assert len([line for line in lines.splitlines() if line]) == 8
    done = ask(server, tmp_path / "cache", script=lines, cwd=tmp_path)
    assert len(done) == 1
    assert 0 <= done[0] < 1000


def test_names():
    released = {name for name in VARIANTS if hub_name(name)}
    assert released == {f"{kind}_{size}" for kind in ("convit", "deit")
                        for size in ("tiny", "small", "base")}  # fmt: skip
    assert hub.repository_name("hf_hub:a/b@v1.0") == "a/b@v1.0"
    assert hub.repository_name("hub:a/b") == hub.destination("hub:a/b") == "a/b"
    assert hub.destination("runs/mine.pth") is None
    for path in ("a", "a/b/c", "/a/b", "./a", "../a", "a/b c"):
        assert hub.repository_name(path) is None


def hub_name(name):
    try:
        return hub.repository_name(name)
    except ValueError:
        return None
