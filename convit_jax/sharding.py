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


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the devices can share the batch evenly."""
    if batch_size < 1 or batch_size % mesh.size:
        below = batch_size // mesh.size * mesh.size
        nearest = f"{below} or {below + mesh.size}" if below > 0 else f"{mesh.size}"
        raise ValueError(
            f"{name}: expected a multiple of the {mesh.size} devices, such as {nearest}, "
            f"got {batch_size}"
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Puts this process's share of a batch on its devices: one global array for each key."""
    sharding = over_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
