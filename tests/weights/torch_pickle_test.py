"""PyTorch's files: what stands beside the weights does no harm, and the numbers are PyTorch's."""

import argparse
import collections
import datetime
import enum
import itertools
import logging
import os
import pathlib
import random
import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import reference

from convit_jax.weights import torch_pickle

BOTH_FORMATS = pytest.mark.parametrize("zipped", [True, False])


class Colour(enum.Enum):
    RED = 1


class Options(dict):
    """A dictionary with attributes, as configuration libraries have."""


class Meter:
    def __init__(self):
        self.mean, self.history = 0.1, [1, 2]


class Code:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.fixture
def torch():
    return reference.import_timm()[1]


def save(torch, content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@BOTH_FORMATS
def test_tensors_of_all_kinds_are_those_that_torch_reads(torch, tmp_path, zipped):
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "float32": whole,
        "view": whole[1:, 2:5],
        "transposed": whole.T,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(whole * 2),
        "half": whole.half(),
        "bfloat16": whole.bfloat16(),
        "double": whole.double(),
        "counter": torch.tensor(7),
    }
    path = save(torch, tensors, tmp_path / "x.th", zipped)
    theirs, ours = torch.load(path, weights_only=True), torch_pickle.read(path, ema=False)
    torch.serialization.set_crc32_options(False)
    try:
        save(torch, {"a": whole}, tmp_path / "without_checksums.pth", zipped)
    finally:
        torch.serialization.set_crc32_options(True)
    read = torch_pickle.read(tmp_path / "without_checksums.pth", ema=False)
    np.testing.assert_array_equal(read["a"], whole.numpy())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].astype("f8"), tensor.detach().double().numpy())


@BOTH_FORMATS
def test_data_beside_the_weights_are_allowed(torch, tmp_path, zipped, caplog):
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    beside = [
        np.float64(73.1), np.arange(3), np.random.RandomState(0).get_state(), pathlib.Path("x"),
        datetime.datetime.now(datetime.UTC), argparse.Namespace(out=pathlib.PureWindowsPath("x")),
        types.SimpleNamespace(a=1), collections.defaultdict(list, a=[1]), collections.Counter("ab"),
        collections.deque([1]), {1, (2, 3)}, frozenset([1]), slice(1, 2), Colour.RED, Meter(),
        Options(a=1), {(1, 2): 3}, b"bytes", 2**80, torch.float32, torch.Size([1]), torch.nn.GELU(),
        logging.getLogger("x"), re.compile("a.*"), random.Random(0), type(None), itertools.count(),
    ]  # fmt: skip
    expected = {"a": [1, 1], "b": [0, 0, 0]}
    for keys in (("model", "state_dict"), ("arch", "model_state_dict"), ("net", "weights")):
        content = {keys[0]: "convit_tiny", "beside": beside, keys[1]: weights, "epoch": 3}
        read = torch_pickle.read(save(torch, content, tmp_path / "x.pth", zipped), ema=False)
        assert {name: array.tolist() for name, array in read.items()} == expected
    two = save(torch, {"net": {"b": torch.zeros(1)}, "model": weights}, tmp_path / "x.pth", zipped)
    with caplog.at_level("INFO", logger="convit_jax"):
        assert torch_pickle.read(two, ema=False).keys() == weights.keys()
    assert caplog.messages == [f"{two}: reads the weights at model, not those at net"]
    averaged = {"model": {"state_dict": {"a": torch.zeros(1)}}, "ema": {"module": weights}}
    read = torch_pickle.read(save(torch, averaged, tmp_path / "x.pth", zipped), ema=True)
    assert {name: array.tolist() for name, array in read.items()} == expected


@BOTH_FORMATS
def test_what_is_no_state_dict_is_refused_with_the_way_out(torch, tmp_path, zipped):
    weights = {"a": torch.ones(2)}
    ran = tmp_path / "ran"
    save_it = r"an object of torch\.nn\.modules\.\w+\.\w+, .* made: torch\.save\(model\.state_dict"
    for content, message in (
        (torch.nn.Linear(2, 2), f"expected a state dict, got {save_it}"),
        ({"epoch": 1, "model": torch.nn.Sequential()}, rf"got epoch \(int\), model \({save_it}"),
        (torch.optim.AdamW([weights["a"]]).state_dict(), "seems to be the state of an optimiser"),
        ({"a": weights["a"].to(torch.float8_e4m3fn)}, r"a: .* got torch\.float8_e4m3fn.*v\.float"),
        ({"a": weights["a"].to(torch.complex64)}, r"a: .* got torch\.ComplexFloatStorage"),
        (
            {"a": weights["a"].expand(9, 2)},
            r"a: a tensor of shape \(9, 2\) does not fit into its 2",
        ),
        ({"model": weights, "x": Code(os.mkdir, str(ran))}, r"refused: .* call (posix|nt)\.mkdir"),
        ({"model": weights, "x": Code(eval, "1")}, r"refused: .* call builtins\.eval"),
    ):
        path = save(torch, content, tmp_path / "x.pth", zipped)
        with pytest.raises(ValueError, match=message) as error:
            torch_pickle.read(path, ema=False)
        assert str(error.value).startswith(f"{path}: ")
    assert not ran.exists()


HOSTILE = {
    "a key nested 400,000 deep": b"\x80\x02(" + b")" + b"\x85" * 400_000 + b"K\x01d.",
    "a list that holds itself twice, 40 times over": (
        b"\x80\x02(X\x07\x00\x00\x00storagecx\ny\n]"
        + b"".join(b"q%cX\x01\x00\x00\x00a0](h%ch%ce" % (i, i, i) for i in range(40))
        + b"X\x01\x00\x00\x00cK\x01tQ."
    ),
    "a stride of text": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n((X\x07\x00\x00\x00storagectorch\n"
        b"FloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00"
        b"J\xff\xff\xff\x7f\x85X\x01\x00\x00\x00a\x85tR."
    ),
}


def test_pickles_made_to_harm_are_refused_at_once(tmp_path):
    """Each alone in a process: the first kills Python's own unpickler."""
    code = (
        "import sys, pathlib\nfrom convit_jax.weights import torch_pickle\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(torch_pickle.read(pathlib.Path(path), ema=False))\n"
        "    except ValueError as error: print(str(error).startswith(path))\n"
        # ru_maxrss would include the memory of the process that started this one.
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(int(status.partition('VmHWM:')[2].split()[0]) < 2e6)"
    )
    version = b"\x80\x02M\xe9\x03."  # the first three pickles of the format before 2020
    paths = []
    for number, content in enumerate(HOSTILE.values()):
        paths.append(tmp_path / f"{number}.pth")
        paths[-1].write_bytes(torch_pickle.LEGACY + version + b"\x80\x02}." + content)
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.stdout == "True\n" * (len(HOSTILE) + 1), done.stderr


@BOTH_FORMATS
def test_views_of_one_storage_share_it(torch, tmp_path, zipped):
    whole = torch.arange(6, dtype=torch.float32)
    path = save(torch, {"a": whole[:3], "b": whole[3:]}, tmp_path / "x.pth", zipped)
    read = torch_pickle.read(path, ema=False)
    assert read["b"].tolist() == [3, 4, 5]
    address = [read[name].__array_interface__["data"][0] for name in ("a", "b")]
    assert address[1] - address[0] == 12


@BOTH_FORMATS
def test_numbers_as_names_are_refused(torch, tmp_path, zipped):
    for content in ({0: torch.ones(1)}, {"model": {0: torch.ones(1), "a": torch.ones(1)}}):
        path = save(torch, content, tmp_path / "x.pth", zipped)
        with pytest.raises(ValueError, match="no state dict"):
            torch_pickle.read(path, ema=False)


def test_code_in_an_archive_is_refused(torch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"a TorchScript archive, which is code"):
        torch_pickle.read(tmp_path / "x.pt", ema=False)
