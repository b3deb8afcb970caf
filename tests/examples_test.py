"""The notebooks of examples/, committed with their output, and the server.

Running them is slow: `pytest -m slow tests/examples_test.py`.
"""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any
import urllib.error
import urllib.request

import compiling
from PIL import Image
import pytest
from runs import ROOT
from small_models import MODEL, random_params

from convit_jax.weights import safetensors
from convit_jax.weights.loaded import Loaded

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# A slash that starts a word: of "/home/me", and not of "runs/mine", "img/s" or "https://".
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/-])/\w+/")
SECONDS_PER_CELL = 1800  # the longest takes a minute on two busy cores
# Work that a test shortens: what a cell says, and what is run instead.
SHORTER = {
    r"_batches\([1-9]00\)": "_batches(20)",
    r"rng\.choice\(train, 64\)": "rng.choice(train, 16)",
    r"order\[1400:\]": "order[1400:1440]",
    r"train\.update\(epochs=18\.0": "train.update(epochs=1.0",
    r"train\.epochs=50": "train.epochs=5",
    r"train\.epochs=40": "train.epochs=1",
    r'"masking", f"--weights': '"masking", "--first=3", f"--weights',
}
# A line of convit_story.ipynb: the range of a layer's gates, and its non-locality before and after.
STORY_LAYER = r"layer \d: gates from 0.73 to ([\d.]+) ... ([\d.]+), \D+([\d.]+) to ([\d.]+) patches"

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> list[str]:
    """Returns what a cell puts out: "stdout", "image/png" and so on, sorted, each once."""
    found = set()
    for output in cell["outputs"]:
        found |= {output["name"]} if output["output_type"] == "stream" else set(output["data"])
    return sorted(found)


def text(cell: dict[str, Any]) -> str:
    """Returns all text that a cell puts out."""
    parts = []
    for output in cell["outputs"]:
        parts += output.get("text", []), output.get("data", {}).get("text/plain", [])
    return "".join("".join(part) for part in parts)


def claims(cell: dict[str, Any]) -> list[str]:
    """Returns the lines of a cell's text that say whether something is true."""
    return [line for line in text(cell).splitlines() if line.endswith((": True", ": False"))]


def test_there_are_notebooks():
    names = ["convit_story", "finetune_on_a_folder", "gpsa_in_your_model"]
    assert [path.stem for path in NOTEBOOKS] == names
    cells = [cell for path in NOTEBOOKS for cell in code_cells(json.loads(path.read_text()))]
    sources = "".join("".join(cell["source"]) for cell in cells)
    assert all(re.search(long, sources) for long in SHORTER)


@notebooks
def test_notebook_is_committed_with_its_output(path: pathlib.Path):
    cells = code_cells(json.loads(path.read_text()))

    # Executed once each, in order, in a new kernel.
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell["outputs"], cell["source"]
        assert all(output["output_type"] != "error" for output in cell["outputs"]), cell["source"]
        assert "stderr" not in kinds(cell), cell["outputs"]  # warnings
        assert not ABSOLUTE_PATH.search(text(cell)), text(cell)


def test_the_story_says_what_its_output_shows():
    """The claims of convit_story.ipynb hold for the numbers that are committed with it."""
    path = ROOT / "examples" / "convit_story.ipynb"
    shown = "".join(map(text, code_cells(json.loads(path.read_text()))))
    assert "equal at strength 16: True" in shown
    assert shown.count("each head looks at its own patch of the window: True") == 2

    right = {name: float(top1) for name, top1 in re.findall(r"(ConViT|DeiT): ([\d.]+)% of", shown)}
    low, _, first, last = zip(*re.findall(STORY_LAYER, shown), strict=True)
    assert right["ConViT"] > right["DeiT"]
    assert float(low[0]) > float(low[2])
    assert float(first[2]) < float(last[2])

    row = r" (content|position) +first ([123]) +([\d.]+)%"
    masked = {(part, int(n)): float(top1) for part, n, top1 in re.findall(row, shown)}
    assert all(masked["position", n] < masked["content", n] for n in (1, 2, 3))


@pytest.mark.slow
@notebooks
def test_notebook_runs(path: pathlib.Path, tmp_path: pathlib.Path, monkeypatch):
    use_kernel_of_this_python(tmp_path / "jupyter", monkeypatch)
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    import nbclient
    import nbformat

    executed = nbformat.read(path, as_version=4)
    for cell in code_cells(executed):
        for long, short in SHORTER.items():
            cell["source"] = re.sub(long, short, cell["source"])
    client = nbclient.NotebookClient(
        executed,
        kernel_name="python3",
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(scratch)}},
    )
    client.execute(env=environment())  # raises CellExecutionError

    committed = json.loads(path.read_text())
    for new, old in zip(code_cells(executed), code_cells(committed), strict=True):
        assert kinds(new) == kinds(old), new["source"]
        assert claims(new) == claims(old), new["source"]


@pytest.mark.slow
def test_the_server_answers(tmp_path: pathlib.Path):
    """examples/serve.py, on a port that is free."""
    safetensors.save_weights(
        tmp_path / "small.safetensors",
        Loaded(MODEL, random_params(), class_names=("a", "b", "c", "d", "e")),
    )
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "serve.py")]
    server = subprocess.Popen(
        [*command, str(tmp_path / "small.safetensors"), "0"],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        address = None
        for line in server.stderr:
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert address

        def ask(data: bytes) -> tuple[int, Any]:
            request = urllib.request.Request(address[0], data=data, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=1200) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.load(error)

        photo = io.BytesIO()
        Image.new("RGB", (40, 30), "red").save(photo, "JPEG")
        status, found = ask(photo.getvalue())
        assert status == 200
        assert sorted(prediction["name"] for prediction in found) == list("abcde")
        assert sum(prediction["probability"] for prediction in found) == pytest.approx(1)
        status, found = ask(b"no image")
        assert (status, list(found)) == (400, ["error"])
    finally:
        server.terminate()
        server.communicate(timeout=1200)


def use_kernel_of_this_python(folder: pathlib.Path, monkeypatch) -> None:
    """Makes "python3" a kernel of this interpreter, and keeps Jupyter out of the home folder."""
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # jupyter_core 5 warns without it
    monkeypatch.setenv("JUPYTER_PATH", str(folder))  # searched before any other folder
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder / name.lower()))


def environment() -> dict[str, str]:
    """Returns the environment of the kernel: one CPU device, as a user has, and this checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.flags(),
        "PYTHONPATH": path,
    }
