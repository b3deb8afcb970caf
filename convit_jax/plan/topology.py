"""The devices of a TPU pod that is not there, by the TPU's compiler (libtpu)."""

import importlib.util
import os

import jax
from jax.experimental import topologies

_LOCK = "libtpu_lockfile"


def use_compiler_alone() -> None:
    """Sets up libtpu as a compiler only, so that it looks for no TPU. Comes before JAX's first use.

    Raises:
      ModuleNotFoundError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "the TPU's compiler is missing: pip install -e '.[tpu-compiler]'", name="libtpu"
        )
    jax.config.update("jax_platforms", "cpu")
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        # The topology describes the pod. Without these, libtpu complains that it finds none.
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu's lock is there for TPUs. Compilers need not wait for one another.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Errors are raised. What libtpu logs besides are alarms about slow compilation. Only what
        # ends the process goes to standard error, and nothing to files in the temporary folder.
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def devices(name: str) -> list[jax.Device]:
    """Returns the devices of a pod, to compile for.

    Args:
      name: GENERATION:CHIPS along each axis, such as v5e:2x4.

    Raises:
      ValueError: if the compiler does not know the pod.
      RuntimeError: if another process keeps libtpu's lock.
    """
    # On v4 and v5p, JAX by default sees the two cores of a chip as one device.
    options = {"chip_config_name": "megacore"} if name.startswith(("v4", "v5p")) else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error) or "already in use" in str(error):
            raise RuntimeError(
                f"another process uses the TPU's compiler, and {_LOCK} in the temporary folder "
                "locks it: wait for that process, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1; a file that "
                f"a killed process left can be removed ({error})"
            ) from error
        raise ValueError(
            f"--topology: expected a pod such as v5e:2x4 or v4:2x2x8, got {name!r} ({error})"
        ) from error


def hosts(devices: list[jax.Device], chips_per_host: int | None = None) -> int:
    """Returns the number of hosts of a pod.

    Args:
      devices: all devices of the pod.
      chips_per_host: None is what the devices say. libtpu says four chips for every pod, where
        machines of v5e and v6e may have eight.

    Raises:
      ValueError: if the number does not divide the devices.
    """
    if chips_per_host is None:
        return len({device.process_index for device in devices})
    if len(devices) % chips_per_host:
        raise ValueError(
            f"--chips_per_host: expected a divisor of the {len(devices)} devices, "
            f"got {chips_per_host}"
        )
    return len(devices) // chips_per_host
