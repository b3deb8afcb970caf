"""The probe of gates and non-locality. tests/train/loop_test.py has it in a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import MODEL, random_params

from configs import digits
from convit_jax.model import locality
from convit_jax.model.normalise import normalise
from convit_jax.parallel import sharding
from convit_jax.train import probe, setup
from convit_jax.workdir.folder import Workdir

MEAN, STD = (0.5,) * 3, (0.25,) * 3


def test_the_mean_is_over_the_images_that_count():
    """In batches of other sizes, with padding and a corrupt image."""
    params, mesh = random_params(), sharding.make_mesh(devices=jax.devices()[:1])
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    mask = np.asarray([1, 1, 0, 1, -1, 1, 1, 0], np.float32)
    step = probe.make_step(MODEL, MEAN, STD, mesh)
    parts = [{"image": images[i : i + 4], "mask": mask[i : i + 4]} for i in (0, 4)]
    found = probe.measure(step, params, parts)
    normal = normalise(jnp.asarray(images[mask > 0]), MEAN, STD)
    _, maps = jax.jit(lambda x: MODEL.apply({"params": params}, x, return_attention=True))(normal)
    expected = locality.nonlocality(maps, MODEL.grid)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


def test_maps_too_large_to_write_out_are_not_measured_and_the_log_says_so(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    run = setup.prepare(digits.get_config(), Workdir(tmp_path))
    monkeypatch.setattr(probe, "_LARGEST", -1)
    gate = np.array([[0.0, np.log(3)]], np.float32)
    found = probe.Probe(run)({"gpsa_blocks": {"attn": {"gate": gate}}})
    assert found == {"head_gates": [pytest.approx([0.5, 0.75])]}
    assert "evaluations measure no non-locality: at this image size" in caplog.text
