"""Buckets on this machine: emulators of Google Cloud Storage and of S3, as processes.

Tests use the fixtures `gcs` and `s3` of conftest.py, or `bucket`, which is both in turn. A test is
skipped where the package of the emulator is not installed.
"""

from collections.abc import Iterator
import contextlib
import importlib.util
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from convit_jax import storage
from convit_jax.storage import retries

BUCKET = "bkt"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[None]:
    """Runs a server until the end of the block; begins the block when its port answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _script(name: str) -> str:
    """Returns the path of a console script of this environment."""
    beside = pathlib.Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or name


def _need(*packages: str) -> None:
    """Skips the test if a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no package {package}: pip install -e '.[emulators]'")


@contextlib.contextmanager
def gcs_emulator() -> Iterator[dict[str, str]]:
    """Yields the environment in which gs://bkt is a bucket of an emulator, in memory."""
    _need("gcsfs", "gcp_storage_emulator")
    port = free_port()
    server = str(pathlib.Path(__file__).with_name("gcs_server.py"))
    with serving([sys.executable, server, str(port), BUCKET], port):
        yield gcs_environment(f"http://127.0.0.1:{port}")


def gcs_environment(url: str) -> dict[str, str]:
    """Returns the environment in which gs:// is served at a URL, without an account."""
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs
        "FSSPEC_GCS_TOKEN": "anon",
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",  # tensorstore
    }


@contextlib.contextmanager
def s3_emulator() -> Iterator[dict[str, str]]:
    """Yields the environment in which s3://bkt is a bucket of an emulator, in memory."""
    _need("s3fs", "moto")
    port = free_port()
    with serving([_script("moto_server"), "-H", "127.0.0.1", "-p", str(port)], port):
        environment = s3_environment(f"http://127.0.0.1:{port}")
        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            import s3fs

            s3fs.S3FileSystem(endpoint_url=environment["AWS_ENDPOINT_URL"]).mkdir(BUCKET)
        yield environment


def s3_environment(url: str) -> dict[str, str]:
    """Returns the environment in which s3:// is served at a URL, to a user called x."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def upload(folder: pathlib.Path, url: str) -> None:
    """Copies a folder into an emulated bucket; the files directly in it come directly below `url`.

    The files come one after another: the emulators refuse connections when many come at once.
    """
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            path = storage.as_path(f"{url}/{file.relative_to(folder)}")
            path.write_bytes(file.read_bytes())


def remove(path: pathlib.Path) -> None:
    """Removes an object. Its `unlink` would take the brackets of a test's name for a pattern."""
    import fsspec

    file_system, name = fsspec.core.url_to_fs(os.fspath(path))
    file_system.rm_file(name)


# Kind of bucket -> the variable with the URL of its service, and the environment for another URL.
PROXIED = {
    "gcs": ("STORAGE_EMULATOR_HOST", gcs_environment),
    "s3": ("AWS_ENDPOINT_URL", s3_environment),
}


@contextlib.contextmanager
def in_environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables until the end of the block, and forgets connections before it."""
    import fsspec

    with pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        fsspec.config.set_conf_env(fsspec.config.conf, dict(os.environ))
        _forget_connections()
        yield
    _forget_connections()


def _forget_connections() -> None:
    """Makes the next use of a bucket read the environment again."""
    from etils.epath import backend
    import fsspec

    backend.fsspec_backend._get_filesystem.cache_clear()
    retries._given_up.clear()
    if orbax_paths := sys.modules.get("convit_jax.workdir.orbax_paths"):
        orbax_paths._s3_service.cache_clear()  # the endpoint that TensorStore uses
    for file_system in {fsspec.registry[name] for name in ("gcs", "s3") if name in fsspec.registry}:
        file_system.clear_instance_cache()
