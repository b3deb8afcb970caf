"""Starts, kills and compares runs of main.py, for the tests."""

from collections.abc import Callable
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import compiling
import filelock
import numpy as np
from PIL import Image
import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Metrics that are measured, not computed, and so differ from run to run.
MEASURED = {"time", "images_per_second", "data_seconds", "data_wait", "mfu"}

# The whole recipe at a small size: four patches, two blocks, 24 steps, an evaluation in the middle.
SMALL = (
    "--config=configs/convit_ti.py",
    "--config.model.image_size=32",
    "--config.model.embed_dim=32",
    "--config.model.depth=2",
    "--config.model.local_up_to_layer=1",
    "--config.model.drop_path=0.2",
    "--config.data.workers=1",
    "--config.train.batch_size=16",
    "--config.train.epochs=3.2",
    "--config.train.eval_every=1.6",
    "--config.train.log_every=4",
    "--config.optim.ema_decay=0.9",
    "--config.checkpoint.every=3",
)


def write_images(folder: pathlib.Path, per_class: int = 40) -> None:
    """Writes class folders below train/ and val/; the images are coloured noise, easy to learn."""
    rng = np.random.default_rng(0)
    for split, number in (("train", per_class), ("val", per_class // 4)):
        for label in range(3):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
                pixels[..., label] //= 4
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{i}.png")


def once(
    factory: pytest.TempPathFactory, name: str, fill: Callable[[pathlib.Path], Any]
) -> pathlib.Path:
    """Returns the folder that `fill` has filled, once for all workers of pytest-xdist.

    The tests share it, so none may change what lies in it.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, filled = base / name, base / f"{name}.filled"
    with filelock.FileLock(base / f"{name}.lock"):
        if not filled.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            filled.touch()
    return folder


def start(
    workdir: pathlib.Path, *flags: str, devices: int = 8, own_programs: bool = False
) -> subprocess.Popen:
    """Starts main.py on `devices` CPU devices; its output goes to a file beside the workdir.

    Its compiled programs are stored apart from those of the tests' own processes: one that is
    killed may leave half a program, and the warning of that would fail a test. With `own_programs`
    they are stored where a user's run has them, in the workdir.
    """
    env = dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.flags(devices),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": os.environ["CONVIT_TEST_PROGRAMS"] + "/runs",
    }
    if own_programs:
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
            env.pop(name, None)
    log = workdir.with_name(workdir.name + ".log").open("a")
    with log:
        return subprocess.Popen(
            [sys.executable, "main.py", f"--workdir={workdir}", *flags],
            cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def start_pair(workdir: pathlib.Path, *flags: str, devices: int = 4) -> list[subprocess.Popen]:
    """Starts two processes of main.py as one run, each on `devices` CPU devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = (f"--coordinator=localhost:{port}", "--num_processes=2")
    return [start(workdir, *flags, *hosts, f"--process_id={i}", devices=devices) for i in range(2)]


def output(workdir: pathlib.Path) -> str:
    return workdir.with_name(workdir.name + ".log").read_text()


def finish(process: subprocess.Popen, workdir: pathlib.Path, code: int = 0) -> None:
    """Waits until a process ends, and asserts that its exit status is `code`."""
    assert process.wait(timeout=1200) == code, output(workdir)


def kill(process: subprocess.Popen) -> None:
    """Kills a process and its workers with SIGKILL."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=1200)


def wait_for(condition, process: subprocess.Popen, workdir: pathlib.Path, poll: float = 0.001):
    """Waits until condition(workdir) is true, and returns it; the process must not end first."""
    deadline = time.monotonic() + 1200
    while not (value := condition(workdir)):
        assert process.poll() is None, output(workdir)
        assert time.monotonic() < deadline, output(workdir)
        time.sleep(poll)
    return value


def steps_saved(workdir: pathlib.Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def is_saving(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list((workdir / "checkpoints").glob("*-tmp*"))


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without the measured metrics."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def reached(workdir: pathlib.Path, step: int) -> bool:
    """Returns whether a run has reported metrics of a step or of a later one."""
    file = workdir / "metrics.jsonl"
    return file.exists() and any(
        json.loads(line)["step"] >= step
        for line in file.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    )


def state(workdir: pathlib.Path, step: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by name: step, params, opt_state, ema."""
    import jax
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(steps_saved(workdir)[-1] if step is None else step)
    checkpointer = ocp.PyTreeCheckpointer()
    item = (folder / "state").resolve()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        checkpointer.metadata(item).item_metadata.tree,
    )
    tree = checkpointer.restore(item, restore_args=as_numpy)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts that two runs have the same state and the same lines of metrics, to the bit."""
    left, right = state(workdir), state(other)
    assert left.keys() == right.keys()
    for kind in ("params", "opt_state", "ema", "step"):
        assert any(f"['{kind}']" in name for name in left)
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)
    assert metrics(workdir) == metrics(other)
    name = "weights.safetensors"
    assert (workdir / name).read_bytes() == (other / name).read_bytes()


def assert_close(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts the same as `assert_same`, except for rounding.

    Sums over the batch are taken in another order. Adam divides a gradient by its size, so
    gradients that are rounding noise give steps that are noise, which hardly change the loss. They
    change weights by up to 1e-4, and so gates and non-locality in the fourth digit.
    """
    lines, others = metrics(workdir), metrics(other)
    assert [(x["kind"], x["step"]) for x in lines] == [(x["kind"], x["step"]) for x in others]
    for left, right in zip(lines, others, strict=True):
        np.testing.assert_allclose(left["loss"], right["loss"], rtol=1e-5)
        assert left.get("images") == right.get("images")
        assert left.keys() == right.keys()
        if left["kind"] == "eval":
            for name in ("nonlocality", "head_gates"):
                np.testing.assert_allclose(left[name], right[name], rtol=1e-3)
    left, right = state(workdir), state(other)
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], atol=1e-4, err_msg=name)
