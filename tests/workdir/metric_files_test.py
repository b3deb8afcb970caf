"""The files of metrics in a bucket that does not answer."""

from faulty_proxy import always
import pytest

from convit_jax import storage
from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.metric_files import JsonLines


def test_the_error_of_an_upload_says_what_was_tried(faulty, monkeypatch):
    monkeypatch.setenv("CONVIT_BUCKET_RETRY_SECONDS", "0.3")
    lines = JsonLines(Workdir(faulty.bucket), 0, evaluated=False)
    lines.write("train", 1, 0.0, {"loss": 1.0})
    faulty.use(always(503))
    with pytest.raises(storage.BucketError, match=r"metrics.jsonl: .* 503 .*gave up after \d+ tr"):
        lines.upload()
