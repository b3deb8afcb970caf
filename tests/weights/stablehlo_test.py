"""StableHLO files: what they say of themselves, uint8 images, and damaged files."""

import hashlib
import json

import jax
import jax.export
import numpy as np
import pytest
from small_models import MODEL, random_params

from convit_jax.cli import convert as command
from convit_jax.model.flops import forward_flops
from convit_jax.weights import safetensors
from convit_jax.weights.digest import digest
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.stablehlo import read_exported

LOADED = Loaded(
    MODEL, random_params(), class_names=tuple("abcde"), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Our export of LOADED that takes uint8 images."""
    folder = tmp_path_factory.mktemp("exported")
    safetensors.save_weights(folder / "small.safetensors", LOADED)
    path = folder / "small.stablehlo"
    command.main([str(folder / "small.safetensors"), str(path), "--uint8"])
    return path


def test_a_file_says_what_its_callers_need(exported):
    """As docs/weights.md does it: with jax and numpy, and nothing of this package."""
    content, checksum = exported.read_bytes().rsplit(b"\n", 1)
    assert hashlib.sha256(content).hexdigest() == checksum.decode()
    program, line = content.rsplit(b"\n", 1)
    about = json.loads(line)
    assert about == {
        "input": [None, 16, 16, 3],
        "dtype": "uint8",
        "normalised_inside": True,
        "image_size": [16, 16],
        "channels": 3,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
        "class_names": list("abcde"),
        "parameters": sum(x.size for x in jax.tree.leaves(LOADED.params)),
        "flops": forward_flops(MODEL),
        "weights_sha256": digest(LOADED.params),
    }
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    normalised = (pixels / np.float32(255) - np.float32(about["mean"])) / np.float32(about["std"])
    expected = np.asarray(jax.jit(MODEL.apply)({"params": LOADED.params}, normalised))
    for data in (exported.read_bytes(), program):  # jax ignores what follows the program
        logits = jax.export.deserialize(bytearray(data)).call(pixels)
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    again = read_exported(exported)
    assert again.about == about
    np.testing.assert_array_equal(again.call(pixels), logits)


def test_damaged_files_are_refused_by_name(exported, tmp_path):
    whole, rng = exported.read_bytes(), np.random.default_rng(0)
    damaged = [whole[: rng.integers(len(whole))] for _ in range(10)]
    damaged += [b"", b"\n", b"\n\n", whole + b"x", whole.rpartition(b"\n")[0]]
    for _ in range(35):
        data = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(len(data), size=rng.integers(1, 20))
        data[places] ^= rng.integers(1, 256, len(places), np.uint8)
        damaged.append(data.tobytes())
    path = tmp_path / "damaged.stablehlo"
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"damaged\.stablehlo: its SHA-256 is not the one at"):
            read_exported(path)
    # A whole file that holds no program of jax.
    content = b"no program\n{}"
    path.write_bytes(content + b"\n" + hashlib.sha256(content).hexdigest().encode())
    with pytest.raises(ValueError, match=r"damaged\.stablehlo: jax .* cannot read it"):
        read_exported(path)
    with pytest.raises(FileNotFoundError, match="none"):
        read_exported(tmp_path / "none.stablehlo")
