"""Compiles the training step as configured, and in forms that need less memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections

from convit_jax.model.network import ConViT
from convit_jax.model.remat import REMAT
from convit_jax.parallel import sharding
from convit_jax.plan import compiled
from convit_jax.train.teacher import Teacher

AS_CONFIGURED = "as configured"
_ACCUM_STEPS = (2, 4, 8)
_REMAT = ("mlp", "block")
KEYS = ("remat", "fsdp", "accum_steps")


def compile_each(
    config: ml_collections.ConfigDict,
    model: ConViT,
    devices: list[jax.Device],
    keys: Sequence[str],
    schedule: tuple[float, int],
    memory: float | None,
    teacher: Teacher | None = None,
) -> Iterator[compiled.Step]:
    """Yields what the step costs as configured, and in each form that needs less memory.

    More parts of a batch are tried only until one number of them fits.

    Args:
      config: the configuration.
      model: its model.
      devices: devices to compile for.
      keys: what to change, of `KEYS`, one after another.
      schedule: number of steps in an epoch and in the whole run.
      memory: memory of a device in bytes; None if it is not known.
      teacher: the teacher of a distillation.

    Raises:
      ValueError: if the devices do not divide the batch size or mesh.fsdp not the devices, or if
        the teacher does not fit the model.
    """
    fitting = set()
    for key, name, changed in [
        ("", AS_CONFIGURED, config),
        *less_memory(config, keys, len(devices)),
    ]:
        if key == "accum_steps" and key in fitting:
            continue
        mesh = sharding.make_mesh(changed.mesh.fsdp, devices)
        form = model.clone(remat=changed.train.remat)
        with compiled.progress(f"compiling {name}"):
            step = compiled.measure(name, changed, form, mesh, *schedule, teacher)
        if step.fits(memory) is not False:
            fitting.add(key)
        yield step


def less_memory(
    config: ml_collections.ConfigDict, keys: Sequence[str], devices: int
) -> Iterator[tuple[str, str, ml_collections.ConfigDict]]:
    """Yields (key, key=value, configuration) of configurations that need less memory.

    What the configuration has already is left out, and so are parts of a batch that the devices
    cannot share.

    Args:
      config: the configuration.
      keys: what to change, of `KEYS`.
      devices: number of devices.
    """
    now = config.train.accum_steps
    remat = [v for v in _REMAT if REMAT.index(v) > REMAT.index(config.train.remat)]
    parts = [n for n in _ACCUM_STEPS if n > now and config.train.batch_size % (n * devices) == 0]
    values: dict[str, tuple[str, list[Any]]] = {
        "remat": ("train", remat),
        "fsdp": ("mesh", [devices] if config.mesh.fsdp != devices else []),
        "accum_steps": ("train", parts),
    }
    for key in keys:
        section, choices = values[key]
        for value in choices:
            changed = config.copy_and_resolve_references()
            changed[section][key] = value
            yield key, f"{section}.{key}={value}", changed
