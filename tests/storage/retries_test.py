"""How often a request is tried again after an outage."""

from faulty_proxy import always, first
import pytest

from convit_jax import storage


def test_after_an_outage_the_next_requests_are_made_once_until_one_succeeds(faulty):
    path = storage.as_path(f"{faulty.bucket}/file")
    storage.write_text(path, "text")
    faulty.use(always(503))
    with pytest.raises(storage.BucketError, match=r"gave up after \d+ tries in [1-9]"):
        path.exists()
    for work in (path.exists, lambda: storage.write_text(path, "new")):
        with pytest.raises(storage.BucketError, match="gave up after 1 try in 0 s"):
            work()
    faulty.use(lambda *_: None)
    assert path.read_text() == "text"
    faulty.use(first(2, 503))
    assert path.exists()
