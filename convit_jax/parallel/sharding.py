"""The mesh of devices, and how the training state and a batch are sharded over it.

The mesh has two axes, "data" and "fsdp". A batch is split over both. The state is split over "fsdp"
by shape alone, so the model need not know of the mesh. If "fsdp" has one device, every device holds
the whole state.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

_AXES = ("data", "fsdp")
_SMALLEST = (
    2**14
)  # elements; splitting a smaller array costs more messages than the memory it saves


def make_mesh(fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of the devices with the axes "data" and "fsdp".

    The devices are ordered by process. So the share of a batch that a process reads is contiguous,
    and the global batch is the same for any number of processes. jax.make_mesh may order the hosts
    of a pod differently. The order does not matter for a reduction over all devices, and the "fsdp"
    axis stays within a host if it fits there.

    Args:
      fsdp: number of devices over which the state is split.
      devices: the devices of all processes; None is all devices that JAX has.

    Raises:
      ValueError: if `fsdp` does not divide the number of devices.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"mesh.fsdp: expected a divisor of the {len(devices)} devices, got {fsdp}")
    return Mesh(np.array(devices).reshape(-1, fsdp), _AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis of an array over all devices."""
    return NamedSharding(mesh, PartitionSpec(_AXES))


def split_batch(mesh: Mesh) -> Callable[[Callable[..., Any], int], Callable[..., Any]]:
    """Returns a function that splits others over the batch: each device computes its own images.

    It is for what the compiler cannot split, such as a kernel. The result takes a function and the
    number of its first arguments that have a batch as leading axis, as its result must have. All
    devices get the other arguments whole. Their gradients are summed over the devices.
    """
    over = over_batch(mesh).spec

    def split(function: Callable[..., Any], batched: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def on_devices(*args: Any) -> Any:
            specs = (over,) * batched + (PartitionSpec(),) * (len(args) - batched)
            mapped = jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=over, check_vma=False
            )
            return mapped(*args)

        return on_devices

    return split


def by_shape(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a state: each array is split over "fsdp" along one axis.

    The axis is the longest one that the devices divide, and the last one if several are as long.
    Small arrays, and arrays without such an axis, are not split. Since layers are stacked along the
    first axis, arrays are split within each layer: no array of a layer is on one device as a whole.

    Args:
      tree: tree of arrays, or of anything with a shape and a size.
      mesh: the mesh, from `make_mesh`.
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
    """Returns the bytes of a tree of arrays on the fullest device of this process."""
    held: dict[jax.Device, int] = {}
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values())


def check_batch_size(batch_size: int, accum_steps: int, mesh: Mesh) -> None:
    """Raises ValueError unless all devices get equally many images of each part of a batch."""
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
    """Puts this process's share of a batch on its devices; returns a global array for each key."""
    sharding = over_batch(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
