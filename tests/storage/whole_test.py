"""Files written whole or not at all."""

import contextlib
import sys

import pytest

from convit_jax import storage
from convit_jax.storage import paths


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with storage.whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    storage.write_text(path, "old")

    def fail(error):
        with storage.whole_file(path, RuntimeError) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(OSError, match="cannot be written: no space") as raised:
        fail(RuntimeError("no space"))
    assert raised.value.filename == str(path)
    with pytest.raises(KeyError):
        fail(KeyError("a mistake, not a failure of the disk"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be written: No such file.*missing/file"):
        storage.write_text(tmp_path / "missing" / "file", "")


def test_an_object_appears_in_a_bucket_when_it_is_whole(bucket):
    path = storage.as_path(bucket) / "folder" / "file"
    with storage.whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    storage.write_text(f"{bucket}/folder/file", "newer")  # a text is a path too
    with contextlib.suppress(KeyError), storage.whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert path.read_text() == "newer"
    torn = path.with_name("torn.json")
    storage.write_text(torn, '{"whatever": "it is')  # content is the user's, and not judged
    assert torn.read_text().endswith("it is")
    torn.unlink()
    assert [child.name for child in path.parent.iterdir()] == ["file"]
    assert not unfinished.exists()


def test_other_urls_and_missing_packages_are_refused(monkeypatch):
    for url in ("gs:///file", "file:///tmp/file", "az://bucket/file"):
        with pytest.raises(ValueError, match="expected a local path, gs://BUCKET/NAME or s3://"):
            storage.as_path(url)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    paths._load.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"gs:// needs .* 'convit-jax\[gcs\]'"):
        storage.as_path("gs://bucket/file")
