"""The mesh, and how a state is sharded over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import convit_b
from convit_jax.parallel import sharding
from convit_jax.train import setup
from convit_jax.train.step import Program


def test_the_mesh_keeps_the_order_of_the_devices():
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[::-1])
    assert mesh.shape == {"data": 4, "fsdp": 2}
    assert list(mesh.devices.flat) == jax.devices()
    batch = sharding.put_batch({"x": np.arange(16)}, mesh)["x"]
    for device, shard in zip(jax.devices(), batch.addressable_shards, strict=True):
        assert shard.device == device
        np.testing.assert_array_equal(shard.data, [2 * device.id, 2 * device.id + 1])


@pytest.mark.parametrize("fsdp", [0, 3, 16, -1])
def test_a_mesh_that_cannot_be_is_refused(fsdp):
    message = f"mesh.fsdp: expected a divisor of the 8 devices, got {fsdp}"
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(fsdp=fsdp)


def test_arrays_are_split_along_their_longest_axis():
    tree = {
        "kernel": jnp.zeros((10, 192, 768)),  # not split between layers
        "square": jnp.zeros((256, 256)),
        "odd": jnp.zeros((300, 127)),  # 8 divides neither
        "long and odd": jnp.zeros((1001, 64)),
        "small": jnp.zeros(1024),
        "scalar": jnp.zeros(()),
    }
    specs = jax.tree.map(lambda s: tuple(s.spec), sharding.by_shape(tree, sharding.make_mesh(8)))
    assert specs == {
        "kernel": (None, None, "fsdp"),
        "square": (None, "fsdp"),
        "odd": (),
        "long and odd": (None, "fsdp"),
        "small": (),
        "scalar": (),
    }
    whole = sharding.by_shape(tree, sharding.make_mesh())
    assert all(s.is_fully_replicated for s in jax.tree.leaves(whole))


def test_convit_base_needs_an_eighth_of_the_memory():
    """The whole state is counted: parameters, both moments of Adam, the average."""
    config = convit_b.get_config()
    config.model.num_classes = 1000
    config.optim.ema_decay = 0.99996
    model = setup.make_model(config)
    sizes = {}
    for fsdp in (1, 8):
        state = Program.make(config, model, sharding.make_mesh(fsdp), 1, 1).abstract_state
        sizes[fsdp] = sum(
            x.dtype.itemsize * np.prod(x.sharding.shard_shape(x.shape), dtype=int)
            for x in jax.tree.leaves(state)
        )
    assert sizes[1] == pytest.approx(4 * 4 * 86_540_040, abs=100)  # plus some counters
    assert sizes[8] / sizes[1] == pytest.approx(1 / 8, rel=0.02)
    tree = {"x": jax.device_put(jnp.zeros((256, 256)), sharding.over_batch(sharding.make_mesh()))}
    assert sharding.bytes_per_device(tree) == 4 * 256 * 256 / 8
