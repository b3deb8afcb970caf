"""convit convert: the files it writes, and the files it leaves alone when something is wrong."""

import json
import os
import re
import subprocess
import sys

import compiling
import jax
import numpy as np
import pytest
import reference
from runs import ROOT
from safetensors.numpy import save_file
from small_models import DEIT, MODEL, equal, random_params

from convit_jax import to_torch
from convit_jax.cli import convert as command
from convit_jax.weights import safetensors
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded

ENV = os.environ | {"XLA_FLAGS": compiling.flags()}
CLASSES = tuple("abcde")


@pytest.fixture
def export(tmp_path):
    """Our export of MODEL."""
    path = tmp_path / "export.safetensors"
    safetensors.save_weights(path, Loaded(MODEL, random_params(), class_names=CLASSES))
    return path


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def convert(*args):
    command.main([str(arg) for arg in args])


def failure(*args) -> str:
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as end:
        convert(*args)
    assert str(end.value).startswith("error: ")
    return str(end.value)


def test_the_command_in_a_process_of_its_own(export, out, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        convert("--help")
    said = capsys.readouterr().out
    for text in ("SRC DST", "--to {flax,torch}", "--image_size PIXELS", "convit_base.stablehlo"):
        assert text in said
    command = [sys.executable, "-W", "error", "-m", "convit_jax", "convert"]
    flags = ("--image_size=8x24", "--num_classes=3")
    done = subprocess.run(
        [*command, str(export), str(out / "other.safetensors"), *flags],
        cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in (
        "embed_dim=16, depth=3, num_heads=4",
        "new head for 3 classes",
        "position embedding interpolated from 16 to 12 tokens, a grid of 2 x 6",
        "wrote",
    ):
        assert text in done.stderr
    assert read_weights(out / "other.safetensors").model.image_size == (8, 24)
    error = f"error: weights: no such file or folder: {out / 'nope.pth'}"
    assert failure(out / "nope.pth", out / "new.pth") == error


def test_there_and_back_through_every_format(export, out):
    _, torch = reference.import_timm()
    convert(export, out / "a.pth")
    loaded = torch.load(out / "a.pth", weights_only=True)
    for name, array in to_torch(random_params()).items():
        np.testing.assert_array_equal(loaded[name].numpy(), array)
    convert(out / "a.pth", out / "b.safetensors", "--to", "flax")
    convert(out / "b.safetensors", out / "c.pt", "--to", "torch")
    convert(out / "c.pt", out / "d.safetensors", "--to", "torch")
    read = read_weights(out / "d.safetensors")
    equal(read.params, random_params())
    assert read.model == MODEL
    assert len(list(out.iterdir())) == 4


def test_options_of_the_command(tmp_path, out):
    source = tmp_path / "deit.safetensors"
    save_file(to_torch(random_params(DEIT)), source)
    assert "give num_heads=N" in failure(source, out / "x.safetensors")
    convert(source, out / "x.safetensors", "--num_heads", 4, "--in_channels", 1, "--image_size", 8)
    read = read_weights(out / "x.safetensors")
    assert (read.model.num_heads, read.model.in_channels, read.model.image_size) == (4, 1, 8)
    expected = random_params(DEIT)["patch_embed"]["kernel"].sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(read.params["patch_embed"]["kernel"], expected)


CALLER = """
import json, sys
import jax.export
import numpy as np
with open(sys.argv[1], "rb") as file:
    call = jax.export.deserialize(bytearray(file.read())).call
images = np.load(sys.argv[2])
logits = call(images)
np.testing.assert_allclose(call(images[1:]), logits[1:], rtol=1e-5, atol=1e-6)  # another size
np.save(sys.argv[3], logits)
print(json.dumps([m for m in sys.modules if m.split(".")[0] in ("convit_jax", "flax")]))
"""


def test_inference_that_needs_only_jax(export, out, tmp_path):
    convert(export, out / "model.stablehlo", "--image_size", "16x24")
    images = np.random.default_rng(0).standard_normal((2, 16, 24, 3), np.float32)
    np.save(tmp_path / "images.npy", images)
    paths = (out / "model.stablehlo", tmp_path / "images.npy", tmp_path / "logits.npy")
    done = subprocess.run(
        [sys.executable, "-c", CALLER, *map(str, paths)],
        cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    loaded = read_weights(export, image_size=(16, 24))
    expected = jax.jit(loaded.model.apply)({"params": loaded.params}, images)
    logits = np.load(paths[2])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad_files(folder, torch):
    """Returns {name: (function that writes the file, expected message)}."""
    tensors = {k: torch.from_numpy(v) for k, v in to_torch(random_params()).items()}
    torch.save(tensors, folder / "good.pth")
    whole = (folder / "good.pth").read_bytes()
    resnet = {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3), "fc.bias": torch.zeros(10)}
    lacking = {k: v for k, v in tensors.items() if k != "blocks.1.norm2.bias"}
    evil = {"model": tensors, "epoch": Malicious(folder / "ran")}

    def save(content):
        return lambda path: torch.save(content, path)

    return {
        "truncated.pth": (
            lambda path: path.write_bytes(whole[: len(whole) // 2]),
            "not a readable PyTorch file",
        ),
        "empty.pth": (lambda path: path.touch(), "expected a safetensors or PyTorch file, got an"),
        "text.pth": (lambda path: path.write_text("hello"), "got one that begins with b'hello'"),
        "resnet.pth": (
            save(resnet),
            "not the state dict of a ConViT or DeiT; it seems to be a ResNet:\n  missing: cls_tok",
        ),
        "missing.pth": (save(lacking), "missing: blocks.1.norm2.bias (16,)"),
        "extra.pth": (
            save({**tensors, "head_dist.weight": torch.zeros(5, 16)}),
            "not known: head_dist.weight (5, 16)",
        ),
        "shape.pth": (
            save({**tensors, "norm.weight": torch.zeros(17)}),
            "wrong shape: norm.weight: expected (16,), got (17,)",
        ),
        "list.pth": (save([1, 2]), "expected a state dict, got list"),
        "mixed.pth": (save({**tensors, "note": "x"}), "weights; got note (str)"),
        "nothing.pth": (save({}), "no state dict; expected tensors"),
        "evil.pth": (save(evil), "refused: reading it would call posix.mkdir"),
        "module.pth": (save(torch.nn.Linear(2, 2)), "torch.save(model.state_dict(), ...)"),
        "old_evil.pth": (
            lambda path: torch.save(evil, path, _use_new_zipfile_serialization=False),
            "refused: reading it would call posix.mkdir",
        ),
        "truncated.safetensors": (
            lambda path: path.write_bytes(
                (folder / "export.safetensors").read_bytes()[:5000]
            ),
            "not a readable safetensors file",
        ),
        "empty.safetensors": (lambda path: path.touch(), "not a readable safetensors file"),
        "weights.npz": (lambda path: np.savez(path, **to_torch(random_params())), "numpy.savez"),
    }  # fmt: skip


def test_every_kind_of_bad_file_is_named_and_leaves_nothing(export, out, tmp_path):
    _, torch = reference.import_timm()
    for name, (make, message) in bad_files(tmp_path, torch).items():
        source = tmp_path / name
        make(source)
        for destination in ("x.safetensors", "x.pth"):
            text = failure(source, out / destination)
            assert message in text, name
            assert str(source) in text
        assert list(out.iterdir()) == [], name
    assert not (tmp_path / "ran").exists()
    # A loader that trusts the file would run the code in the same pickle.
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_bad_destination_is_named_before_anything_is_read(out):
    nothing = out / "nothing.pth"
    for destination, rest, message in (
        ("x.npz", (), "DST: expected one of .safetensors, .pth, .pt, .stablehlo, or hub:"),
        ("x.pth", ("--to", "flax"), "--to: expected torch for .pth, got flax"),
        ("x.pth", ("--batch", 2), "--batch: expected with a DST of .stablehlo"),
        ("x.pth", ("--uint8",), "--uint8: expected with a DST of .stablehlo"),
        ("x.pth", ("--private",), "--private: expected with a DST of hub:ORGANISATION/NAME"),
        ("no/x.pth", (), "DST: no such folder"),
    ):
        assert message in failure(nothing, out / destination, *rest)
    (out / "x.pth").mkdir()
    assert "DST: is a folder" in failure(nothing, out / "x.pth")


def test_flags_of_a_wrong_form_are_named_before_anything_is_read(out, capsys):
    for flags, message in (
        ("--image_size 16 24 32", "unrecognized arguments: 24 32; --image_size takes one size"),
        ("--image_size 16,24,32", "expected a number of pixels such as 224, or HEIGHTxWIDTH"),
        ("--image_size 24x", "expected a number of pixels such as 224, or HEIGHTxWIDTH"),
        ("--image_size 0", "expected a number of pixels such as 224, or HEIGHTxWIDTH"),
        ("--num_classes -1", "expected 0 or more, got -1"),
        ("--in_channels 0", "argument --in_channels: expected 1 or more, got 0"),
        ("--num_heads 0", "argument --num_heads: expected 1 or more, got 0"),
        ("--batch 0", "argument --batch: expected 1 or more, got 0"),
        ("--variant convit", "argument --variant: invalid choice: 'convit' (choose from"),
    ):
        with pytest.raises(SystemExit) as ended:
            convert(out / "nothing.pth", out / "x.pth", *flags.split())
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "stablehlo"])
def test_a_full_disk_leaves_what_was_there(export, out, suffix):
    if suffix == "pth":
        reference.import_timm()
    path = out / f"x.{suffix}"
    path.write_text("before")
    code = (
        "import resource, sys\n"
        "from convit_jax.cli import convert\nfrom convit_jax.weights import torch_pickle\n"
        "import safetensors.numpy\n"
        "if sys.argv[2].endswith('pth'): import torch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "convert.main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(export), str(path)],
        cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(rf"^error: .*{path.name}.*", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in out.iterdir()] == [path.name]
    assert path.read_text() == "before"
