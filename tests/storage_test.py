"""Files written whole or not at all."""

import pytest

from convit_jax import storage


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
