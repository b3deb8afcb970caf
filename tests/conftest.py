"""Sets up eight CPU devices and quick compilation before any test imports jax.

With JAX_PLATFORMS=cuda,cpu in the environment the tests run on a GPU instead, with XLA's defaults.
Those of several devices do not pass on one GPU.
"""

import gc
import os
import pathlib
import re
import sys
import tempfile

# main.py and configs/ are run from the checkout and not installed; tests/ has helpers.
_TESTS = pathlib.Path(__file__).parent
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

import compiling  # noqa: E402

# The workers share the cores. With a thread for each core, PyTorch and NumPy would wait in busy
# loops for threads that another worker holds up. The tests of timm took several times as long.
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

if "cuda" not in os.environ.get("JAX_PLATFORMS", ""):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = compiling.flags(devices=8)

# Programs are stored, so that neither a later test nor a process that a test starts compiles them
# again. Workers of pytest-xdist find the variable set by the process that started them.
if "CONVIT_TEST_PROGRAMS" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="programs")
    os.environ["CONVIT_TEST_PROGRAMS"] = _PROGRAMS.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["CONVIT_TEST_PROGRAMS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# With a limit of its size JAX locks the folder: no process reads what another one has half written.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(8 * 2**30)

# All of these import jax, which reads the variables above.
import buckets  # noqa: E402
import faulty_proxy  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from convit_jax import storage  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# Files whose tests take longest, and so start first: one of them begun at the end would leave the
# others idle.
_LONG = (
    "examples_test.py", "finetune_test.py", "resume_test.py", "docs_test.py", "resolution_test.py",
    "package_test.py", "eval_run_test.py", "processes_test.py", "loop_test.py", "data_test.py",
    "train_test.py", "network_test.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of long files first; all others keep their order."""
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(_LONG)))


def pytest_collection_finish() -> None:
    """Spares the garbage collector the modules: it took a third of the time to trace programs."""
    gc.freeze()


@pytest.fixture(scope="session")
def _gcs():
    with buckets.gcs_emulator() as environment, buckets.in_environment(environment):
        yield f"gs://{buckets.BUCKET}"


@pytest.fixture(scope="session")
def _s3():
    with buckets.s3_emulator() as environment, buckets.in_environment(environment):
        yield f"s3://{buckets.BUCKET}"


def _folder(url, request):
    """Returns the URL of a test's own folder; fsspec takes brackets for a pattern."""
    return f"{url}/{re.sub(r'[^a-z0-9]+', '_', request.node.name)}"


@pytest.fixture
def gcs(_gcs, request):
    """The URL of an empty folder in an emulated bucket of Google Cloud Storage."""
    return _folder(_gcs, request)


@pytest.fixture
def s3(_s3, request):
    """The URL of an empty folder in an emulated bucket of S3."""
    return _folder(_s3, request)


@pytest.fixture(params=["gcs", "s3"])
def bucket(request):
    """The URL of an empty folder in an emulated bucket, of each kind in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["gcs", "s3"])
def _proxy(request):
    url = request.getfixturevalue(f"_{request.param}")
    key, environment = buckets.PROXIED[request.param]
    with faulty_proxy.running(os.environ[key]) as proxy:
        variables = environment(proxy.url) | {"CONVIT_BUCKET_RETRY_SECONDS": "1.5"}
        with buckets.in_environment(variables):
            # Making a client takes longer than a test waits for an answer.
            storage.as_path(f"{url}/none").exists()
            yield proxy, url


@pytest.fixture
def faulty(_proxy, request):
    """A proxy before an emulated bucket, of each kind in turn, with `bucket`, the URL of a folder.

    Requests are tried again for 1.5 seconds. The tests of a module share the proxies: pytest runs
    those without a proxy first, then those of each kind.
    """
    proxy, url = _proxy
    proxy.use(lambda *_: None)
    proxy.bucket = _folder(url, request).rstrip("_")
    yield proxy
    proxy.use(lambda *_: None)
