"""The paths of a run's folder."""

import os
import stat

import pytest

from convit_jax.workdir.folder import Workdir


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Workdir("~/run").checkpoints == tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("url", ["file:///tmp/run", "gs:///run", "https://bucket/run"])
def test_a_url_of_another_kind_is_refused_before_a_folder_of_that_name_is_made(url):
    with pytest.raises(ValueError, match="expected a local path, gs://BUCKET/NAME or s3://"):
        Workdir(url)


def test_a_url_in_which_fsspec_would_see_a_pattern_is_refused():
    with pytest.raises(ValueError, match=r"without \* \? \[ and \].* got gs://bucket/lr\[1\]"):
        Workdir("gs://bucket/lr[1]")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    Workdir(tmp_path / "new" / "folder").check_writable()
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        Workdir(tmp_path / "file" / "run").check_writable()
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    with pytest.raises(OSError, match="Permission denied"):
        Workdir(tmp_path / "run").check_writable()
