"""What gcsfs does at Google and not at an emulator."""

from faulty_proxy import LOST, first
from gcsfs import retry
import pytest

from convit_jax import storage
from convit_jax.storage import gcs


@pytest.mark.parametrize("_proxy", ["gcs"], indirect=True)
def test_objects_are_deleted_one_by_one_also_at_google(faulty, monkeypatch):
    folder = storage.as_path(f"{faulty.bucket}/folder")
    for name in ("one", "two", "three"):
        storage.write_text(folder / name, "")
    monkeypatch.setattr(gcs.FileSystem, "on_google", True)
    for fault in (503, LOST):
        storage.write_text(folder / "one", "")
        faulty.use(first(1, fault, "DELETE"))
        folder.joinpath("one").unlink()
        assert fault in {happened for _, _, happened in faulty.requests}
    folder.rmtree()
    assert not folder.exists()
    assert not [path for method, path, _ in faulty.requests if "batch" in path]


def test_a_token_that_cannot_be_renewed_is_a_refusal():
    fault = gcs._fault(retry.NonRetryableError("Got error while refreshing credentials."))
    assert fault.status == 401
    assert "refreshing" in fault.reason
