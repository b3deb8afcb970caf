"""The mesh of devices, and how the state and a batch lie on it."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axis "data" over these devices, by default all."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, accum_steps: int, mesh: Mesh) -> None:
    """Raises ValueError unless every device gets as many images of each part of a batch."""
    unit = mesh.size * accum_steps
    if batch_size < 1 or batch_size % unit:
        below = batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        parts = f" times train.accum_steps={accum_steps}" if accum_steps > 1 else ""
        raise ValueError(
            f"train.batch_size: expected a multiple of the {mesh.size} devices{parts}, such as "
            f"{nearest}, got {batch_size}"
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Puts this process's share of a batch on its devices: one global array for each key."""
    sharding = over_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
