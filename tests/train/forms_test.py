"""The form of attention on the devices of a run: chosen, split over a mesh, the same results."""

import jax
import numpy as np
import pytest
import reference

from convit_jax import recipe
from convit_jax.model.fused import Fused
from convit_jax.parallel import sharding
from convit_jax.train import forms, setup
from convit_jax.train.step import Program


@pytest.fixture
def config():
    config = recipe.get_config()
    config.model.update(
        name="convit_tiny", image_size=48, depth=4, embed_dim=144, num_heads=3,
        local_up_to_layer=2, num_classes=5,
    )  # fmt: skip
    config.train.batch_size = 16
    return config


def test_a_tpu_gets_the_kernel_and_one_flag_goes_back(config):
    mesh = sharding.make_mesh(fsdp=4)
    model = setup.make_model(config, backend="tpu")
    assert (str(model.attention), model.positional) == ("fused", "blend")
    assert [setup.make_model(config, backend=b).flat_tokens for b in ("tpu", "cpu")] == [
        False,
        True,
    ]
    assert forms.over_mesh(model, mesh).attention.split is not None
    assert Program.make(config, model, mesh, 1, 1).model.attention.split is not None
    config.model.attention = "xla"
    model = setup.make_model(config, backend="tpu")
    assert (model.attention, model.positional) == ("xla", "blend")
    assert forms.over_mesh(model, mesh) is model
    config.model.attention = "fused"
    needs_tpu = "attention='fused' needs a TPU, got cpu"
    with pytest.raises(ValueError, match=needs_tpu):
        setup.make_model(config)
    with pytest.raises(ValueError, match=needs_tpu):
        forms.over_mesh(model.clone(attention="fused"), mesh)


@pytest.mark.slow
def test_steps_with_the_kernel_are_those_without(config):
    """Two steps on 8 devices, the kernel's state split over 4; the second from one put back."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 48, 48, 3), np.uint8),
        "label": rng.integers(0, 5, 16, np.int32),
        "skipped": np.zeros(16, np.int32),
    }
    model = setup.make_model(config)
    ends = []
    for attention, fsdp in (("xla", 1), (Fused(interpret=True), 4)):
        mesh = sharding.make_mesh(fsdp)
        form = model.clone(attention=attention, positional="blend")
        program = Program.make(config, form, mesh, 10, 100)
        step, images = program.jitted_step(), sharding.put_batch(batch, mesh)
        state, _ = step(program.init_state(), images)
        kept = jax.device_get(state)
        state, metrics = step(state, images)
        again, _ = step(jax.device_put(kept, program.state_shardings), images)
        jax.tree.map(np.testing.assert_array_equal, state, again)
        ends.append((jax.device_get(state.params), float(metrics["loss"])))
    (expected, loss), (params, other) = ends
    assert other == pytest.approx(loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["convit", "deit"])
def test_timms_logits_come_out_of_the_kernel(family):
    _, torch = reference.import_timm()
    theirs, ours, variables = reference.timm_pair(family)
    images = np.random.default_rng(1).normal(size=(2, *ours.image_shape)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(reference.timm_images(images, torch)).numpy()
    kernel = ours.clone(attention=Fused(interpret=True), positional="auto")
    found = jax.jit(kernel.apply)(variables, images)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
