"""Checkpoints: which ones are kept, broken ones, and a full disk."""

import logging
import os
import shutil
import subprocess

from faulty_proxy import always
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convit_jax import storage
from convit_jax.parallel import sharding
from convit_jax.workdir import orbax_paths
from convit_jax.workdir.checkpoints import Checkpoints, best_step, newest_step, steps_of

# If a file cannot be read or written, Orbax closes its event loop before its work on other files
# has ended. No code receives the errors of that work, and pytest warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def noise(step):
    return np.random.default_rng(step).random((256, 256), np.float32)  # does not compress


def make_state(step):
    state = {"w": noise(step), "step": jnp.asarray(step)}
    return jax.device_put(state, sharding.by_shape(state, sharding.make_mesh(8)))


def like(mesh):
    state = make_state(0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.by_shape(shapes, mesh),
    )


def write(folder, steps, *, every=1, keep=10, also=(), top1=None):
    with Checkpoints(folder, every=every, also=also, keep=keep) as checkpoints:
        for step in steps:
            metrics = {"top1": top1[step]} if top1 and step in top1 else None
            checkpoints.save(step, make_state(step), lambda step=step: {"seen": step}, metrics)


def test_a_checkpoint_that_is_evaluated_later_can_become_the_best(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, every=1, also=(), keep=1) as checkpoints:
        for step, top1 in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.4)):
            state, progress = make_state(step), lambda: {}
            assert checkpoints.save(step, state, progress)
            assert not checkpoints.save(step, state, progress, metrics={"top1": top1})
            assert not checkpoints.save(step, state, progress, stopping=True)
    assert {2, 4} <= set(steps(folder))
    assert best_step(folder, "top1") == 2


def read(folder, mesh=None):
    mesh = mesh or sharding.make_mesh()
    with Checkpoints(folder, every=1, also=(), keep=10) as checkpoints:
        restored = checkpoints.restore(like(mesh))
    if restored is None:
        return None
    step, state, progress, _ = restored
    np.testing.assert_array_equal(state["w"], noise(step))
    assert int(state["step"]) == progress["seen"] == step
    assert state["w"].sharding.mesh.shape == mesh.shape
    return step


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_policy_decides_what_is_saved_and_what_stays(tmp_path):
    top1 = {4: 0.9, 7: 0.5}
    write(tmp_path, range(12), every=3, keep=2, also=(4, 7), top1=top1)
    assert steps(tmp_path) == [4, 7, 9]  # the two newest of 0, 3, 4, 6, 7, 9, and the best
    assert newest_step(tmp_path) == 9
    write(tmp_path, [15, 18], every=3, keep=2)  # a later start still knows the best
    assert steps(tmp_path) == [4, 15, 18]
    with Checkpoints(tmp_path, every=3, also=(), keep=2) as checkpoints:
        assert not checkpoints.save(19, make_state(19), dict)
        assert checkpoints.save(20, make_state(20), lambda: {"seen": 20}, stopping=True)
    assert steps(tmp_path) == [4, 18, 20]


def test_an_evaluation_that_ends_after_a_restart_belongs_to_its_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3], top1={1: 0.5})  # stopped during the evaluation of step 3
    unfinished = tmp_path / "3" / "metrics"
    unfinished.mkdir()  # left by a start that was killed while writing it
    (unfinished / "part").write_text('{"top1": 0.')
    with Checkpoints(tmp_path, every=1, also=(), keep=1) as checkpoints:
        assert checkpoints.restore(like(sharding.make_mesh())).metrics is None
        found = {"top1": 0.9, "loss": 1.25, "images": 9}
        assert not checkpoints.save(3, make_state(3), dict, metrics=found)
    with Checkpoints(tmp_path, every=1, also=(), keep=1) as checkpoints:
        assert checkpoints.restore(like(sharding.make_mesh())).metrics == found
        # Step 3 has an evaluation already, so this one is not saved.
        assert not checkpoints.save(3, make_state(3), dict, metrics={"top1": 0.1})
    write(tmp_path, [4, 5], keep=1, top1={4: 0.7})
    assert steps(tmp_path) == [3, 5]  # the best, the newest


def test_metrics_that_cannot_be_read_are_measured_anew(tmp_path):
    write(tmp_path, [1], top1={1: 0.5})
    assert best_step(tmp_path, "top1") == 1
    os.truncate(tmp_path / "1" / "metrics" / "metrics", 5)
    assert best_step(tmp_path, "top1") is None
    with Checkpoints(tmp_path, every=1, also=(), keep=1) as checkpoints:
        assert checkpoints.restore(like(sharding.make_mesh())).metrics is None
        checkpoints.save(1, make_state(1), dict, metrics={"top1": 0.5})
    with Checkpoints(tmp_path, every=1, also=(), keep=1) as checkpoints:
        assert checkpoints.restore(like(sharding.make_mesh())).metrics == {"top1": 0.5}


def test_the_best_by_either_metric_stays(tmp_path):
    """Of a run with averaged weights, both the best plain and the best averaged weights stay."""
    evaluated = {1: (0.5, 0.2), 2: (0.4, 0.9), 3: (0.3, float("nan")), 4: (0.3, 0.1), 5: (0.3, 0.1)}
    best_by = ("ema_top1", "top1")
    with Checkpoints(tmp_path, every=1, also=(), keep=1, best_by=best_by) as checkpoints:
        for step, (top1, ema_top1) in evaluated.items():
            metrics = {"top1": top1, "ema_top1": ema_top1}
            checkpoints.save(step, make_state(step), dict, metrics)
    assert steps(tmp_path) == [1, 2, 5]
    assert best_step(tmp_path, "top1") == 1
    assert best_step(tmp_path, "ema_top1") == 2


def test_any_mesh_reads_what_any_mesh_wrote(tmp_path):
    assert read(tmp_path / "none") is None
    assert newest_step(tmp_path / "nowhere") is None
    write(tmp_path, [3])
    for mesh in (
        sharding.make_mesh(8),
        sharding.make_mesh(2),
        sharding.make_mesh(devices=jax.devices()[:1]),
    ):
        assert read(tmp_path, mesh) == 3


def half(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[::2]:
        path.unlink()


def truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("tear", [half, truncate, empty])
def test_torn_checkpoints_are_set_aside(tmp_path, tear, caplog):
    write(tmp_path, [1, 2, 3])
    tear(tmp_path / "3")
    with caplog.at_level(logging.WARNING, "convit_jax"):
        assert read(tmp_path) == 2
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("convit_jax")]
    assert f"cannot read checkpoint {tmp_path / '3'}: " in message
    assert steps(tmp_path) == [1, 2]
    assert (tmp_path / "3.unreadable").is_dir()
    write(tmp_path, [3])  # the step can be saved again
    assert read(tmp_path) == 3


def test_only_torn_checkpoints_are_an_error_and_stay(tmp_path):
    write(tmp_path, [1, 2])
    for step in (1, 2):
        empty(tmp_path / str(step))
    with pytest.raises(OSError, match=r"none of the checkpoints \[1, 2\] can be read"):
        read(tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        write(disk / "checkpoints", [1])
        (disk / "rest").write_bytes(bytes(1_600_000))
        with pytest.raises(OSError, match=r"cannot write a checkpoint: No space left on device"):
            write(disk / "checkpoints", [2, 3])
        assert read(disk / "checkpoints") == 1
        (disk / "rest").unlink()
        write(disk / "checkpoints", [2])
        assert read(disk / "checkpoints") == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_checkpoints_in_a_bucket_are_complete_and_the_best_stays(bucket, caplog):
    folder = storage.as_path(bucket) / "checkpoints"
    with Checkpoints(folder, every=1, also=(), keep=1) as checkpoints:
        for step, top1 in ((1, 0.1), (2, 0.9), (3, 0.5)):
            assert checkpoints.save(step, make_state(step), lambda step=step: {"seen": step})
            assert not checkpoints.save(step, None, dict, metrics={"top1": top1})
    write(folder, (4, 5), keep=2)
    assert steps_of(folder) == [2, 4, 5]
    assert best_step(folder, "top1") == 2
    # One that cannot be read is set aside, and what a killed process left is no checkpoint.
    storage.write_text(folder / "5" / "state" / "manifest.ocdbt", "broken")
    storage.write_text(folder / "6" / "state" / "manifest.ocdbt", "unfinished")
    assert newest_step(folder) == 5
    assert read(folder) == 4
    assert steps_of(folder) == [2, 4]
    assert {path.name for path in folder.iterdir()} == {"2", "4", "5.unreadable"}
    assert "checkpoints/5: " in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "ocdbt"])  # all requests, or those for the arrays
def test_a_checkpoint_is_not_set_aside_in_an_outage(faulty, part):
    orbax_paths._s3_service.cache_clear()  # the proxy is the service
    folder = storage.as_path(faulty.bucket) / "checkpoints"
    write(folder, (1, 2))
    with Checkpoints(folder, every=1, also=(), keep=10) as checkpoints:
        faulty.use(always(503, part=part))
        with pytest.raises(OSError, match=r"checkpoints/2(/default)?: "):
            checkpoints.restore(like(sharding.make_mesh()))
        assert 503 in {fault for _, _, fault in faulty.requests}
        faulty.use(lambda *_: None)
    assert {path.name for path in folder.iterdir()} == {"1", "2"}
    assert read(folder) == 2
    orbax_paths._s3_service.cache_clear()


def test_a_version_of_orbax_without_the_retries_is_said_once(monkeypatch, caplog, gcs):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    monkeypatch.delattr(tensorstore_utils, "_BASE_TS_CONTEXT")
    orbax_paths._warn_of.cache_clear()
    for _ in range(2):
        orbax_paths.for_orbax(storage.as_path(gcs))
    assert caplog.text.count("orbax-checkpoint has no _BASE_TS_CONTEXT") == 1
