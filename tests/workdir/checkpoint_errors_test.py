"""Errors of the requests that TensorStore makes for a checkpoint."""

import asyncio
import sys

from etils import epath
from faulty_proxy import RESET
import jax.numpy as jnp
import pytest
import tensorstore

from convit_jax import storage
from convit_jax.workdir import checkpoint_errors
from convit_jax.workdir.checkpoints import Checkpoints


@pytest.mark.slow
def test_a_failed_write_of_an_array_names_the_object_the_account_and_what_mends_it(
    faulty, monkeypatch
):
    monkeypatch.setenv("CONVIT_BUCKET_RETRY_SECONDS", "0.5")
    mend = {
        "gs": (r"to an anonymous user.*gcloud auth", "gcloud storage buckets create gs://bkt"),
        "s3": (r"to the access key x \(from env\).*aws configure", "aws s3 mb s3://bkt"),
    }
    allowed, create = mend[faulty.bucket.partition(":")[0]]
    state = {f"w{i}": jnp.full((64, 64), i) for i in range(8)}
    expected = {
        403: rf"the service answered 403 .*{allowed}",
        404: create,
        503: r"the service answered 503.*; gave up after \d+ tries",
        RESET: r"the connection failed .*; gave up after \d+ tries",
    }
    for fault, text in expected.items():
        faulty.use(lambda _, path, __, fault=fault: fault if "ocdbt" in path else None)
        folder = storage.as_path(f"{faulty.bucket}/{fault}")
        with (
            pytest.raises(OSError, match=rf"{folder}/1/state/ocdbt\S*: .*{text}") as raised,
            Checkpoints(folder, every=1, also=(), keep=1) as checkpoints,
        ):
            checkpoints.save(1, state, dict)
        assert "\n" not in str(raised.value)


def test_the_request_is_found_in_the_text_of_tensorstore(monkeypatch):
    monkeypatch.setattr(storage, "failure", lambda *what: what)
    folder = epath.Path("s3://b/run/checkpoints")
    open_w = 'Error opening "zarr" driver: Error reading "w/.zarray" in OCDBT database at'
    for text, request in {
        f'ABORTED: {open_w} "run/c/": Error reading Byte range [0, 772) of "run/c/d/ab": All 10 '
        "retry attempts failed: Unknown [http_response_code='503'] [tensorstore_spec='...']": (
            "s3://b/run/c/d/ab", 503, "", 10
        ),
        f"PERMISSION_DENIED: {open_w} gs://b/c/: Error reading gs://b/c d/manifest: Forbidden": (
            "gs://b/c d/manifest", 403, "Forbidden", 1
        ),
        'ABORTED: Error writing "w/0.0" in OCDBT database at gs://b/c/: All 9 retry attempts failed'
        ": CURL error Empty reply [curl_code='52']": (
            "gs://b/c/", None, "CURL error Empty reply", 9
        ),
    }.items():  # fmt: skip
        assert checkpoint_errors.outage(ValueError(text), folder) == request
    assert checkpoint_errors.outage(ValueError("NOT_FOUND: Error reading x: gone"), folder) is None


def test_only_late_answers_of_tensorstore_are_hidden(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable.object))
    checkpoint_errors.hide_late_answers.__wrapped__()
    promise, future = tensorstore.Promise.new()

    async def wait():
        return await future

    loop = asyncio.new_event_loop()
    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    promise.set_result(1)
    task.get_coro().close()
    task._log_destroy_pending = False
    assert not shown

    class Broken:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    Broken()
    assert shown == [Broken.__del__]
