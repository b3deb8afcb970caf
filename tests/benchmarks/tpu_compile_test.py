"""Collectives of compiled programs are found, and the training step compiles for a TPU pod."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest
from runs import ROOT

from benchmarks import tpu_compile
from convit_jax.parallel import sharding

SMALL = (
    "--config.model.image_size=32",
    "--config.model.embed_dim=128",
    "--config.model.num_heads=4",
    "--config.model.depth=2",
    "--config.model.local_up_to_layer=1",
    "--config.model.num_classes=128",
    "--config.train.batch_size=64",
)

# In the style of the TPU's compiler: layouts in types, fused scatters, stages that share a channel.
PROGRAM = """\
HloModule jit_step
%all-reduce-scatter.3 (input_0: bf16[64,8]) -> bf16[8,8] {
  %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input_0), channel_id=1
}
%async_collective_fusion.2 (input_0: f32[2,4]) -> f32[16,4] {
  %all-gather.9 = f32[16,4]{1,0:T(8,128)} all-gather(%input_0), channel_id=2, dimensions={0}
}
%wide.body.spmd (param: (s32[], f32[6])) -> (s32[], f32[6]) {
  %all-reduce.2 = (bf16[6]{0:T(128)(2,1)}, /*index=1*/f32[]{:T(128)}) all-reduce(%a, %b), \
channel_id=3, metadata={op_name="jit(step)/while/body"}
  %f = f32[16,4]{1,0} fusion(%c), kind=kCustom, calls=%async_collective_fusion.2
}
%condition (param: (s32[], f32[6])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(10)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}
ENTRY %main.spmd (p: f32[2,4]) -> f32[8,8] {
  %start = (bf16[3,4]{1,0}, bf16[3,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=4, source_target_pairs={{0,1}}
  %done = bf16[3,4]{1,0} collective-permute-done(%start)
  %scatter = f32[2,5]{1,0} reduce-scatter(%y), channel_id=5, replica_groups=[2,4]<=[8]
  %while.1 = (s32[], f32[6]{0}) while(%t), condition=%condition, body=%wide.body.spmd
  %g = f32[16,4]{1,0} fusion(%c), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %fusion.1 = bf16[8,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_collectives_of_a_tpus_program_are_read():
    found = tpu_compile.find_collectives(PROGRAM)
    assert {(c.kind, c.arrays, c.turns) for c in found} == {
        ("collective-permute", (("bf16", 12),), 1),
        ("reduce-scatter", (("f32", 40),), 1),
        ("all-reduce", (("bf16", 6), ("f32", 1)), 10),
        ("all-gather", (("f32", 64),), 10),
        ("reduce-scatter", (("bf16", 512),), 1),
    }
    assert {c.source for c in found} == {"", "jit(step)/while/body"}


def test_what_is_sent_besides_gradients_is_named():
    mesh = sharding.make_mesh()
    batch, whole = sharding.over_batch(mesh), sharding.replicated(mesh)

    def step(weight, x):
        def loss(weight):
            mixed = x + jnp.roll(x, 1, axis=0)  # mixes images of different devices
            return jnp.tanh(mixed @ weight).sum()

        return jax.grad(loss)(weight)

    def send(x, _):
        pairs = [(i, (i + 1) % 8) for i in range(8)]
        return jnp.sin(jax.lax.ppermute(x, "data", pairs)), None

    def send_in_turn(x):
        return jax.lax.scan(send, x, length=5)[0]

    shapes = (jnp.zeros((6, 7)), jnp.zeros((16, 6)))
    step = jax.jit(step, in_shardings=(whole, batch), out_shardings=whole)
    found = tpu_compile.find_collectives(step.lower(*shapes).compile().as_text())
    problems = tpu_compile.unexpected(found, {"all-reduce": {42}})
    assert {what.split()[0] for what, _ in problems} == {"collective-permute"}
    assert not tpu_compile.unexpected(found, {"all-reduce": {42}, "collective-permute": {6}})

    spec = PartitionSpec(sharding.make_mesh().axis_names)
    loop = jax.jit(jax.shard_map(send_in_turn, mesh=mesh, in_specs=spec, out_specs=spec))
    found = tpu_compile.find_collectives(loop.lower(jnp.zeros((16, 6))).compile().as_text())
    assert {c.kind for c in found} == {"collective-permute"}
    assert sum(c.turns for c in found) == 5


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_the_step_compiles_for_a_pod():
    """In its own process: libtpu must not come into this one."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "--config=configs/convit_b.py"]
    done = subprocess.run(
        [*command, "--topology=v5e:2x4", "--fsdp=1,8", *SMALL],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^v5e:2x4 +(\d) x (\d) +8 +([\d,.]+)", done.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [("8", "1"), ("1", "8")]
    whole, part = (float(row[2].replace(",", "")) for row in rows)
    assert part / whole == pytest.approx(1 / 8, rel=0.1)
    alone, split = done.stdout.split("1 x 8")
    assert "all-reduce: " in alone
    assert "all-gather" not in alone
    assert "all-gather: " in split
