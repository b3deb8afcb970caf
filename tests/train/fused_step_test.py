"""The TPU's compiler takes the training step with the fused kernel, on a machine without a TPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
from runs import ROOT

CODE = """
import sys
import jax
from jax.experimental import topologies
from convit_jax import recipe
from convit_jax.parallel import sharding
from convit_jax.train import setup
from convit_jax.train.step import Program

devices = topologies.get_topology_desc("v4:2x2x1", "tpu", chip_config_name="megacore").devices
config = recipe.get_config()
config.train.batch_size = 16
config.model.update(name="convit_tiny", depth=3, local_up_to_layer=1, num_classes=10)
config.model.embed_dim, config.model.image_size = map(int, sys.argv[1:])
model = setup.make_model(config, backend="tpu")
mesh = sharding.make_mesh(devices=list(devices))
program = Program.make(config, model, mesh, 10, 100)
shapes = {"image": (model.image_shape, "uint8"), "label": ((), "int32"), "skipped": ((), "int32")}
batch = {
    name: jax.ShapeDtypeStruct((16, *shape), dtype, sharding=sharding.over_batch(mesh))
    for name, (shape, dtype) in shapes.items()
}
text = program.jitted_step().lower(program.abstract_state, batch).compile().as_text()
print("kernels:", text.count('custom_call_target="tpu_custom_call"'))
print("gathered:", text.count("all-gather"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize(("width", "pixels"), [(192, 224), (256, 112)])  # heads of 48 and of 64
def test_the_step_compiles_for_four_chips_of_the_least_memory(width, pixels):
    """Three blocks, each with a kernel forward and one backward. libtpu has its own process."""
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    alone |= {"TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | alone
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(width), str(pixels)],
        cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kernels: 6" in done.stdout
    assert "gathered: 0" in done.stdout
