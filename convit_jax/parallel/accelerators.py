"""Finds out whether this machine has a GPU or TPU that JAX does not use."""

import os
import pathlib

import jax


def unused(dev: pathlib.Path = pathlib.Path("/dev")) -> str | None:
    """Returns a warning if JAX runs on the CPU of a machine with an accelerator, else None.

    There is no warning if JAX_PLATFORMS is set, because then the user has asked for the CPU.

    Args:
      dev: folder of the machine's device files.
    """
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return None
    kinds = {
        "an NVIDIA GPU": ("nvidia[0-9]*", "cuda13"),
        "a TPU": ("accel[0-9]*", "tpu"),
    }
    for name, (pattern, extra) in kinds.items():
        for path in sorted(dev.glob(pattern)):
            return (
                f"training on the CPU, although this machine has {name} ({path}): "
                f"pip install 'convit-jax[{extra}]', or set JAX_PLATFORMS=cpu to silence this"
            )
    return None
