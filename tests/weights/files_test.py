"""Files of weights of any suffix, in shards, and damaged in 200 ways."""

import json
import random
import tracemalloc

import numpy as np
import pytest
import reference
from safetensors.numpy import save_file
from small_models import INDEX, MODEL, equal, random_params, write_shards

import convit_jax
from convit_jax import from_torch, to_torch
from convit_jax.weights.files import read_state_dict

STATE_DICT = to_torch(random_params(MODEL))


def test_the_first_bytes_tell_the_format(tmp_path):
    _, torch = reference.import_timm()
    tensors = {name: torch.from_numpy(array) for name, array in STATE_DICT.items()}
    for suffix in (".pth.tar", ".ckpt", ".pkl", ".th", ".bin", ".safetensors", ""):
        torch.save({"state_dict": tensors}, tmp_path / f"torch{suffix}")
        equal(read_state_dict(tmp_path / f"torch{suffix}")[0], STATE_DICT)
    save_file(STATE_DICT, tmp_path / "x.pth")
    equal(convit_jax.load(tmp_path / "x.pth")[1]["params"], random_params(MODEL))
    for content, message in (
        (b"", "got an empty file"),
        (b"version https://git-lfs.github.com/spec/v1", "run git lfs pull"),
        (b"<!DOCTYPE html>", "got a web page"),
        (b"{}", r"not a list of shards \(weight_map\)"),
        (b"\x80\x04N.", "neither a zip archive nor the format of before 2020"),
    ):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_state_dict(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convit_jax.load(tmp_path / "missing.pth.tar")


def test_shards_are_read_by_their_list_or_folder(tmp_path):
    index = write_shards(tmp_path, STATE_DICT)
    for source in (index, tmp_path):
        equal(convit_jax.load(source)[1]["params"], random_params(MODEL))
    content = json.loads(index.read_text())
    first = content["weight_map"]["cls_token"]
    (tmp_path / "x.bin").write_text(json.dumps({"weight_map": {"cls_token": "x.bin"}}))
    for name, file, error, message in (
        ("more", first, ValueError, f"{first}: lacks more, which {INDEX} says it has"),
        ("more", "lost.safetensors", FileNotFoundError, "lost.safetensors: no such file, but"),
        ("more", f"../{first}", ValueError, "expected names of files in its folder"),
        ("more", INDEX, ValueError, "names another list"),
        ("more", "x.bin", ValueError, "names another list: x.bin"),
    ):
        listed = {"weight_map": content["weight_map"] | {name: file}}
        index.write_text(json.dumps(listed))
        with pytest.raises(error, match=message):
            read_state_dict(index)
    with pytest.raises(ValueError, match="leave out ema"):
        read_state_dict(index, ema=True)
    del content["weight_map"]["cls_token"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{first}: has cls_token, which {INDEX} lacks"):
        read_state_dict(index)


def damaged(content: bytes, header: int, rng: random.Random) -> bytes:
    """Returns a file with flipped bits, a part cut off or doubled, or other numbers and letters.

    Args:
      content: the whole file.
      header: number of bytes in the file's beginning that are changed more often than others.
      rng: where the damage is drawn from.
    """
    data = bytearray(content)
    place = rng.randrange(rng.choice((header, len(data))))
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        del data[place : place + rng.choice((1, 8, 1000))]
    elif kind == 4:
        length = rng.choice((1, 2, 4, 8))
        number = rng.choice((0, 1, 2**31 - 1, 2**63 - 1, 2**64 - 1, rng.randrange(2**64)))
        data[place : place + length] = (number % 256**length).to_bytes(length, "little")
    else:
        old = rng.choice((b"F32", b"shape", b"16", b"data", b"Float", b"\x85", b"}q", b"]"))
        new = rng.choice((b"I32", b"F64", b"99999999999", b"-1", b"\x8b\xff\xff\xff\x7f", b"["))
        data = bytearray(bytes(data).replace(old, new, rng.choice((1, 1000))))
    return bytes(data)


def test_damaged_files_are_read_right_or_refused_by_name(tmp_path, request):
    _, torch = reference.import_timm()
    tensors = {name: torch.from_numpy(array) for name, array in STATE_DICT.items()}
    content = {"arch": "x", "best": np.float64(1.5), "shape": (1, 2), "state_dict": tensors}
    write_shards(tmp_path, STATE_DICT)
    save_file(STATE_DICT, tmp_path / "x.safetensors")
    torch.save(content, tmp_path / "zip.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    shapes = {name: array.shape for name, array in STATE_DICT.items()}
    outcomes, errors = set(), []
    tracemalloc.start()
    request.addfinalizer(tracemalloc.stop)
    for name in ("x.safetensors", "zip.pth", "old.pth", INDEX):
        path, rng = tmp_path / name, random.Random(0)
        whole = path.read_bytes()
        for _ in range(50):
            path.write_bytes(damaged(whole, min(4000, len(whole)), rng))
            try:
                state_dict, _ = read_state_dict(path)
                from_torch(state_dict)
            except (ValueError, OSError) as error:
                errors.append(str(error))
                outcomes.add(f"{name} refused")
            else:
                # A format without checksums has other numbers where its numbers were damaged.
                assert {name: array.shape for name, array in state_dict.items()} == shapes
                if name in ("zip.pth", INDEX):
                    equal(state_dict, STATE_DICT)
                outcomes.add(f"{name} read")
        path.write_bytes(whole)
        equal(read_state_dict(path)[0], STATE_DICT)
    _, most = tracemalloc.get_traced_memory()
    assert most < 100e6
    assert len(outcomes) == 8  # each format has files of both outcomes
    # `load` puts the file's name before the errors of `from_torch`.
    ours = ("not the state dict of a ConViT or DeiT", *STATE_DICT)
    assert all(text.startswith((str(tmp_path), *ours)) for text in errors)
