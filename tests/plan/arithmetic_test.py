"""FLOPs of traced programs, beside cases computed by hand and the model's own count."""

import functools

import jax
from jax import export
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest

from convit_jax import create_model
from convit_jax.model.flops import forward_flops
from convit_jax.model.fused import Fused
from convit_jax.parallel import sharding
from convit_jax.plan import arithmetic

SMALL = {"image_size": 32, "embed_dim": 48, "depth": 2, "local_up_to_layer": 1, "num_classes": 10}


def count(function, *arguments) -> arithmetic.Arithmetic:
    return arithmetic.of_jaxpr(jax.jit(function).trace(*arguments).jaxpr)


def test_loops_branches_and_devices_count_as_often_as_they_run():
    x, w = jnp.zeros((4, 8)), jnp.zeros((8, 8))  # one product: 2 x 4 x 8 x 8 = 512

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    assert count(loop, x, w).flops == 5 * 512
    # Each layer again, for the gradients of tanh, and two products for the gradients of x and w.
    again = jax.checkpoint(lambda x, w: jnp.tanh(jnp.sin(x @ w) @ w))
    assert count(lambda x, w: again(x, w).sum(), x, w).flops == 2 * 512
    loss_and_gradients = jax.value_and_grad(lambda x, w: again(x, w).sum(), (0, 1))
    assert count(loss_and_gradients, x, w).flops == (2 + 2 + 4) * 512
    # Without the loss, nothing uses the first forward pass.
    assert count(lambda x, w: loss_and_gradients(x, w)[1], x, w).flops == (2 + 4) * 512

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count(branch, x, w).flops == 2 * 512

    mesh, over = sharding.make_mesh(), PartitionSpec(sharding.make_mesh().axis_names)
    on_all = jax.shard_map(lambda x: x @ w, mesh=mesh, in_specs=over, out_specs=over)
    assert count(on_all, jnp.zeros((4 * mesh.size, 8))).flops == mesh.size * 512


def test_kernels_count_as_what_they_state():
    x = jnp.zeros((8, 128))

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...].T @ x_ref[...]

    stated = pl.CostEstimate(flops=77, bytes_accessed=0, transcendentals=0)
    call = functools.partial(pl.pallas_call, kernel, out_shape=x, interpret=True)
    found = count(lambda x: call(cost_estimate=stated)(x) + call()(x), x)
    assert (found.flops, found.kernels, found.uncounted) == (77, 1, {"pallas_call": 1})

    # A layer has one kernel in the forward pass and one in the backward pass, though the forward
    # pass is traced again.
    model = create_model(
        "convit_tiny", **SMALL, attention=Fused(interpret=True), remat="dots", global_pool="avg"
    )
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    found = count(jax.grad(lambda v: model.apply(v, images).sum()), variables)
    assert found.kernels == 2 * model.depth


def test_the_forward_pass_has_the_flops_of_the_models_own_count():
    model = create_model("convit_tiny", **SMALL, attention="xla", positional="contract")
    images = jnp.zeros((3, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert count(model.apply, variables, images).flops == pytest.approx(
        3 * forward_flops(model), rel=0.01
    )


def test_a_stored_program_is_named_and_not_counted():
    """Such as the network of a teacher in a .stablehlo file."""
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    stored = export.export(jax.jit(lambda x: x @ x))(shape)
    found = arithmetic.of_jaxpr(jax.make_jaxpr(stored.call)(shape))
    assert found.flops == 0
    assert found.uncounted == {"call_exported": 1}
