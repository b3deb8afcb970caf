"""The mesh of devices, and how the state and a batch lie on it.

Two axes. Over both a batch is split. Over "fsdp" the state is split too, by shape alone, so the
model knows of none of it; with one device on that axis every device holds the whole state.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

_AXES = ("data", "fsdp")
_SMALLEST = (
    2**14
)  # elements of an array that is split: below, the messages cost more than they save


def make_mesh(fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes "data" and "fsdp" over these devices, by default all.

    A process's devices are neighbours in it, in the order of the processes: so the share of a
    batch that a process reads is contiguous, and the global batch the same for any number of
    processes. jax.make_mesh may order the hosts of a pod otherwise. For a reduction over all
    devices the order is of no account; a "fsdp" axis lies within a host where it fits.

    Args:
      fsdp: devices over which the state is split.
      devices: of all processes.

    Raises:
      ValueError: if `fsdp` does not divide their number.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"mesh.fsdp: expected a divisor of the {len(devices)} devices, got {fsdp}")
    return Mesh(np.array(devices).reshape(-1, fsdp), _AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(_AXES))


def by_shape(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a state: each array split over "fsdp" along one axis, small ones whole.

    The axis is the longest that the devices divide, the last of equals; with layers stacked in
    front, none of a layer's arrays moves as a whole to one device.

    Args:
      tree: of arrays, or of anything with a shape.
      mesh: of `make_mesh`.
    """
    parts = mesh.shape["fsdp"]

    def of(x: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(x.shape) if length % parts == 0]
        if parts == 1 or x.size < _SMALLEST or not axes:
            return replicated(mesh)
        split = max(axes, key=lambda axis: (x.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*(None,) * split, "fsdp"))

    return jax.tree.map(of, tree)


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays on the fullest of this process's devices."""
    held: dict[jax.Device, int] = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


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
