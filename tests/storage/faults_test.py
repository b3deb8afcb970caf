"""A bucket whose service fails for a while, or for good."""

import errno
import re
import time
import types

from faulty_proxy import CUT, LOST, RESET, SHORT, STALL, UPLOAD, always, first
import fsspec
import pytest

from convit_jax import storage
from convit_jax.storage import retries

_MENDS = {
    "gs": ("gcloud auth application-default login", "gcloud storage buckets create gs://bkt"),
    "s3": ("aws configure", "aws s3 mb s3://bkt"),
}


def test_reading_writing_and_listing_go_on_after_faults(faulty):
    path = storage.as_path(f"{faulty.bucket}/folder of files/file")
    for fault in (429, 500, 503, RESET, LOST, STALL, CUT, SHORT, UPLOAD):
        faulty.use(first(1, fault))
        storage.write_text(path, f"content {fault}" * 100)
        assert path.read_text() == f"content {fault}" * 100, fault
        assert fault in {happened for _, _, happened in faulty.requests}
        if fault in (429, 500, STALL, UPLOAD):  # 503, a lasting STALL and LOST show the rest
            continue
        assert [child.name for child in path.parent.iterdir()] == ["file"], fault
        assert path.exists()
        assert path.parent.is_dir()
        assert not path.with_name("none").exists()
        path.unlink()


@pytest.mark.filterwarnings("ignore:Sending a large body directly")  # gcsfs does so
def test_a_large_upload_goes_on_with_the_piece_that_failed(faulty, tmp_path):
    content = bytes(range(256)) * 44_000  # 11 MB
    file_system, name = fsspec.core.url_to_fs(f"{faulty.bucket}/large")
    tmp_path.joinpath("large").write_bytes(content)
    piece = 5 * 2**20
    for fault in (503, LOST, CUT):
        part = "upload_id=" if faulty.bucket.startswith("gs") else "uploadId="
        faulty.use(first(1, fault, part=part))
        file_system.put_file(str(tmp_path / "large"), name, chunksize=piece)
        assert fault in {happened for _, _, happened in faulty.requests}
        faulty.use(first(1, fault))
        file_system.get_file(name, str(tmp_path / "back"))
        assert tmp_path.joinpath("back").read_bytes() == content, fault


def test_a_lasting_fault_ends_with_a_line_that_says_what_was_tried(faulty, monkeypatch):
    monkeypatch.setenv("CONVIT_BUCKET_RETRY_SECONDS", "0.3")
    path = storage.as_path(f"{faulty.bucket}/file")
    for fault, work in (
        (503, path.read_bytes),
        (STALL, lambda: storage.write_text(path, "text")),
        (503, lambda: list(path.parent.iterdir())),
        (STALL, path.exists),
        (503, path.is_dir),
    ):
        faulty.use(always(fault))
        start = time.monotonic()
        with pytest.raises(storage.BucketError) as raised:
            work()
        assert time.monotonic() - start < 90  # without the limit it takes three minutes
        message = str(raised.value)
        assert message.startswith(faulty.bucket)
        assert "\n" not in message
        reason = "did not answer in time" if fault == STALL else "(answered 503|did not answer)"
        assert re.search(f"the service {reason}", message)
        assert "; gave up after " in message
        assert "CONVIT_BUCKET_RETRY_SECONDS" in message


def test_a_refusal_names_the_bucket_the_account_and_what_mends_it(faulty):
    path = storage.as_path(f"{faulty.bucket}/file")
    scheme = faulty.bucket.partition(":")[0]
    log_in, create = _MENDS[scheme]
    who = {"gs": "an anonymous user", "s3": "the access key x (from env)"}[scheme]
    for status in (401, 403, 404):
        faulty.use(always(status))
        for work in (path.exists, lambda: storage.write_text(path, ""), path.read_text):
            with pytest.raises(storage.BucketError) as raised:
                work()
            message = str(raised.value)
            assert message.startswith(f"{scheme}://bkt/"), message
            assert who in message
            assert "\n" not in message
            assert (create if status == 404 else log_in) in message
        assert len(faulty.requests) <= 15  # what no wait can mend is not tried for long


def test_what_is_missing_is_an_object_or_the_bucket(faulty):
    path = storage.as_path(f"{faulty.bucket}/none")
    assert not path.exists()
    assert not path.is_dir()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))) as raised:
        path.read_bytes()
    assert raised.value.errno == errno.ENOENT
    scheme = faulty.bucket.partition(":")[0]
    elsewhere = storage.as_path(f"{scheme}://missing-bucket/file")
    for work in (elsewhere.exists, elsewhere.is_dir, lambda: storage.write_text(elsewhere, "")):
        with pytest.raises(storage.BucketError, match=rf"sees no bucket {scheme}://missing-bucket"):
            work()


def test_an_object_that_may_be_replaced_meanwhile_is_read_by_one_request(faulty):
    path = storage.as_path(f"{faulty.bucket}/file")
    storage.write_text(path, "text")
    storage.read_bytes(path)  # makes the client
    faulty.use(lambda *_: None)
    assert storage.read_bytes(path) == b"text"
    assert len(faulty.requests) == 1
    with pytest.raises(FileNotFoundError, match="no such object"):
        storage.read_bytes(path.with_name("none"))


def test_the_account_of_a_service_is_named(gcs, monkeypatch):
    storage.as_path(gcs)
    file_system = fsspec.filesystem("gs", skip_instance_cache=True)
    file_system.credentials.credentials = types.SimpleNamespace(service_account_email="robot@p")
    assert file_system._account() == "the service account robot@p"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/key.json")
    assert file_system._account().endswith("(GOOGLE_APPLICATION_CREDENTIALS=/key.json)")


def test_the_time_limit_is_checked(monkeypatch):
    monkeypatch.delenv("CONVIT_BUCKET_RETRY_SECONDS", raising=False)
    assert retries.patience().limit == 180
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("CONVIT_BUCKET_RETRY_SECONDS", text)
        with pytest.raises(ValueError, match="CONVIT_BUCKET_RETRY_SECONDS: expected a number"):
            retries.patience()
