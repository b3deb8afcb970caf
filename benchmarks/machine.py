"""The machine and the libraries that a benchmark runs on, and how they are set up."""

import os
import pathlib
import platform

import jax
import jaxlib

from benchmarks import peer


def set_up(torch_threads: int = 1) -> None:
    """Sets up JAX and torch for measuring both in one process; before anything is computed.

    Args:
      torch_threads: number of processes with which torch.compile compiles. With more than one,
        torch starts them in the background, which can disturb other timings.
    """
    # By default JAX takes three quarters of a GPU's memory at the start, and a program that was
    # compiled before would seem to compile in no time.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(torch_threads))


def device() -> str:
    """Returns the number and the kind of JAX's devices, or of this machine's cores."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} {jax.devices()[0].device_kind}"
    info = pathlib.Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    name = names[0].split(": ", 1)[1] if names else platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def versions(with_peer: bool) -> str:
    """Returns the versions of JAX and, with the peer, of timm and torch.

    Raises:
      ImportError: if the peer is asked for and not installed.
    """
    text = f"jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    if with_peer:
        timm, torch = peer.import_timm()
        text += f", timm {timm.__version__}, torch {torch.__version__}"
    return text
