"""The module under the tools of flax and jax that other projects use."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import MODEL, random_params

IMAGES = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
VARIABLES = {"params": random_params()}


def test_a_table_of_the_layers():
    table = MODEL.tabulate(jax.random.key(0), IMAGES, console_kwargs={"width": 200})
    assert "Total Parameters" in table
    assert "gpsa_blocks/attn/qk" in table


def test_intermediate_outputs_have_a_layer_axis():
    capture = functools.partial(MODEL.apply, capture_intermediates=True, mutable=["intermediates"])
    _, state = jax.eval_shape(capture, VARIABLES, IMAGES)
    (values,) = state["intermediates"]["gpsa_blocks"]["attn"]["v"]["__call__"]
    assert values.shape == (2, 3, 16, 16)


def test_strict_settings_of_jax_are_met():
    """64-bit types, strict promotion of dtypes and of ranks; inference and gradients."""
    rngs = {"dropout": jax.random.key(0)}
    for positional in ("blend", "contract"):
        model = MODEL.clone(positional=positional, dtype=jnp.bfloat16, drop_path=0.1)

        def loss(variables, images, train, model=model):
            return model.apply(variables, images, train=train, rngs=rngs).sum()

        gradients = jax.value_and_grad(loss)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            jax.eval_shape(functools.partial(gradients, train=True), VARIABLES, IMAGES)
    with jax.enable_x64(True):
        images = IMAGES.astype(np.float64)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        found = jax.eval_shape(functools.partial(gradients, train=True), shapes, images)
        leaves = jax.tree.leaves((shapes, found))
        assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def test_pixels_are_refused_with_the_way_out():
    for dtype in (np.uint8, np.int32):
        message = f"images: expected floating point, normalised, got {np.dtype(dtype)}"
        with pytest.raises(ValueError, match=message):
            MODEL.apply(VARIABLES, np.zeros((1, 16, 16, 3), dtype))


def test_copies_are_equal():
    for other in (copy.deepcopy(MODEL), pickle.loads(pickle.dumps(MODEL)), MODEL.clone()):
        assert other == MODEL
        assert hash(other) == hash(MODEL)
    assert MODEL.bind(VARIABLES).unbind()[0] == MODEL


def test_export_with_any_batch_and_any_size():
    model = MODEL.clone(use_pos_embed=False, attention="xla")
    batch, rows, columns = jax.export.symbolic_shape("batch, rows, columns")
    shape = jax.ShapeDtypeStruct((batch, 4 * rows, 4 * columns, 3), jnp.float32)
    apply = jax.jit(functools.partial(model.apply, VARIABLES))
    call = jax.export.export(apply)(shape).call
    images = IMAGES[:2, :8]
    np.testing.assert_allclose(call(images), apply(images), atol=1e-4)
