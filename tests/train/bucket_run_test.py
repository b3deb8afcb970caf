"""Runs whose workdir is in a bucket: killed and started again, and of two processes."""

import json

import faulty_proxy
import fsspec
import pytest
import runs
from tensorboardX.proto import event_pb2

from convit_jax import storage
from convit_jax.workdir.checkpoints import newest_step
from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.metric_files import read_lines

pytestmark = pytest.mark.slow
# For the tests that take longest: faults of S3 are in tests/storage, at less cost.
ON_GCS = pytest.mark.parametrize("_proxy", ["gcs"], indirect=True)

# 22 steps of a small model on scikit-learn's digits, which need no files.
DIGITS = (
    "--config=configs/digits.py",
    "--config.model.patch_size=4",
    "--config.model.embed_dim=8",
    "--config.model.depth=2",
    "--config.model.local_up_to_layer=1",
    "--config.data.workers=1",
    "--config.train.epochs=2",
    "--config.train.eval_every=1",
    "--config.train.log_every=2",
    "--config.optim.ema_decay=0.9",
    "--config.checkpoint.every=6",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The working directory of the run on disk."""

    def train(folder):
        runs.finish(runs.start(folder / "run", *DIGITS), folder / "run")

    return runs.once(tmp_path_factory, "bucket_whole", train) / "run"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A path whose log is the output of a run; temporary files of the run lie beside it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "run"


def reached(url, step):
    return any(line["step"] >= step for line in read_lines(Workdir(url)))


def is_saving(url, after):
    """Whether a checkpoint is being written of a later step than `after`."""
    folder = Workdir(url).checkpoints
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    return max(steps) > max(after, newest_step(folder) or 0)


def shown_steps(folder):
    """The steps of "train/loss" that TensorBoard shows, from the event files of all starts."""
    shown: list[int] = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                shown = [step for step in shown if step < event.step]
            shown += [event.step for value in event.summary.value if value.tag == "train/loss"]
    return shown


def assert_as_on_disk(url, whole, here, compare=runs.assert_same):
    """Compares a run in a bucket with the one on disk, and looks for what it left on disk."""
    folder = here.with_name("download")
    file_system, name = fsspec.core.url_to_fs(url)
    for found in file_system.find(name):
        copy = folder / found.removeprefix(f"{name}/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file_system.cat_file(found))
    compare(folder, whole)
    trained = [line["step"] for line in runs.metrics(folder) if line["kind"] == "train"]
    assert shown_steps(folder / "tensorboard") == trained == list(range(2, 23, 2))
    assert not Workdir(url).lock.exists()
    scheme = url.partition("//")[0]
    assert not any((place / scheme).exists() for place in (runs.ROOT, here.parent))


def test_a_killed_run_in_a_bucket_ends_as_the_one_on_disk(bucket, whole, here):
    flags = (*DIGITS, f"--workdir={bucket}")
    first = runs.start(here, *flags, own_programs=True)
    runs.wait_for(lambda _: reached(bucket, 8), first, here, poll=0.05)
    runs.kill(first)
    before = newest_step(Workdir(bucket).checkpoints)
    second = runs.start(here, *flags, own_programs=True)
    runs.wait_for(lambda _: is_saving(bucket, before), second, here, poll=0.01)
    runs.kill(second)
    left = set((here.parent / "temporary").iterdir())  # a killed process cannot clean up
    runs.finish(runs.start(here, *flags, own_programs=True), here)
    output = runs.output(here)
    assert "continuing from step" in output
    assert "to see whether it still runs" not in output  # the lock of a killed process of this host
    assert "Traceback" not in output
    assert set((here.parent / "temporary").iterdir()) <= left
    starts = [json.loads(line) for line in Workdir(bucket).starts.read_text().splitlines()]
    assert [start["step"] for start in starts][:2] == [0, before]
    assert_as_on_disk(bucket, whole, here)
    assert list(Workdir(bucket).compilation_cache.iterdir())


def test_two_processes_write_to_one_bucket(s3, whole, here):
    for process in runs.start_pair(here, *DIGITS, f"--workdir={s3}"):
        runs.finish(process, here)
    assert storage.as_path(f"{s3}/weights.safetensors").exists()
    assert_as_on_disk(s3, whole, here, runs.assert_close)


@ON_GCS
def test_a_run_in_a_faulty_bucket_ends_as_the_one_on_disk(faulty, whole, here, monkeypatch):
    """Temporary faults change nothing; a lasting one, and a death in an upload, lose no step."""
    monkeypatch.setenv("CONVIT_BUCKET_RETRY_SECONDS", "6")
    kinds = (429, 500, 503, 503, faulty_proxy.RESET, faulty_proxy.LOST, faulty_proxy.CUT)
    some = faulty_proxy.seeded(7, 0.1, *(3 * kinds), faulty_proxy.STALL)  # a stall takes a second
    url = faulty.bucket
    flags = (*DIGITS, f"--workdir={url}")

    faulty.use(some)
    first = runs.start(here, *flags)
    runs.wait_for(lambda _: reached(url, 8), first, here, poll=0.1)
    assert any(fault for *_, fault in faulty.requests)
    faulty.use(faulty_proxy.always(503))
    runs.finish(first, here, code=1)
    output = runs.output(here)
    assert output.count("error: ") == 1
    assert output.splitlines()[-1].startswith("error: ")
    assert f"{url}/" in output.splitlines()[-1]
    assert "503" in output.splitlines()[-1]
    assert "Traceback" not in output

    faulty.use(some)
    before = newest_step(Workdir(url).checkpoints)
    second = runs.start(here, *flags)
    runs.wait_for(lambda _: is_saving(url, before or 0), second, here, poll=0.05)
    faulty.use(faulty_proxy.always(faulty_proxy.UPLOAD))
    runs.wait_for(
        lambda _: any(fault for method, _, fault in faulty.requests if method in ("POST", "PUT")),
        second, here, poll=0.01,
    )  # fmt: skip
    runs.kill(second)

    faulty.use(some)
    runs.finish(runs.start(here, *flags), here)
    faulty.use(faulty_proxy.seeded(0, 0.0, 500))
    assert_as_on_disk(url, whole, here)


@ON_GCS
def test_two_processes_that_die_in_an_upload_go_on(faulty, whole, here, monkeypatch):
    monkeypatch.setenv("CONVIT_BUCKET_RETRY_SECONDS", "60")
    flags = (*DIGITS, f"--workdir={faulty.bucket}")
    pair = runs.start_pair(here, *flags)
    runs.wait_for(lambda _: reached(faulty.bucket, 8), pair[0], here, poll=0.1)
    faulty.use(faulty_proxy.always(faulty_proxy.UPLOAD))
    runs.wait_for(lambda _: faulty.requests, pair[0], here, poll=0.01)
    for process in pair:
        runs.kill(process)
    faulty.use(faulty_proxy.seeded(0, 0.0, 500))
    for process in runs.start_pair(here, *flags):
        runs.finish(process, here)
    assert "continuing from step" in runs.output(here)
    assert_as_on_disk(faulty.bucket, whole, here, runs.assert_close)
