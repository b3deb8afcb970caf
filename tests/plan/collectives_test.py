"""What devices send one another is found in compiled programs."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from convit_jax.parallel import sharding
from convit_jax.plan import collectives
from convit_jax.plan.hlo import Program

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
channel_id=3, replica_groups=mesh['a'=4,'b'=8] {'a':(1)2,'b'}, \
metadata={op_name="jit(step)/while/body"}
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


def find(function, *arguments) -> list[collectives.Collective]:
    return collectives.find(Program.parse(function.lower(*arguments).compile().as_text()), 8)


def test_collectives_of_a_tpus_program_are_read():
    found = collectives.find(Program.parse(PROGRAM), devices=8)
    sizes = {(c.kind, tuple((a.dtype, a.size) for a in c.arrays), c.turns) for c in found}
    assert sizes == {
        ("collective-permute", (("bf16", 12),), 1),
        ("reduce-scatter", (("f32", 40),), 1),
        ("all-reduce", (("bf16", 6), ("f32", 1)), 10),
        ("all-gather", (("f32", 64),), 10),
        ("reduce-scatter", (("bf16", 512),), 1),
    }
    assert {c.source for c in found} == {"", "jit(step)/while/body"}
    assert {c.bytes for c in found} == {2 * 12, 4 * 40, 10 * (2 * 6 + 4), 10 * 4 * 64, 2 * 512}
    # By hand: of n devices each sends (n - 1) / n of what is gathered or scattered, and twice that
    # of a sum for all. What is passed on is sent whole. The program runs on 8 devices if it does
    # not say in which groups.
    sent = {24, 3 / 4 * 160, 2 * 15 / 16 * 160, 7 / 8 * 2560, 7 / 8 * 1024}
    assert {c.bytes_sent for c in found} == sent


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
    found = find(step, *shapes)
    problems = collectives.unexpected(found, {"all-reduce": {42}})
    assert {what.split()[0] for what, _ in problems} == {"collective-permute"}
    assert not collectives.unexpected(found, {"all-reduce": {42}, "collective-permute": {6}})

    spec = PartitionSpec(sharding.make_mesh().axis_names)
    loop = jax.jit(jax.shard_map(send_in_turn, mesh=mesh, in_specs=spec, out_specs=spec))
    found = find(loop, jnp.zeros((16, 6)))
    assert {c.kind for c in found} == {"collective-permute"}
    assert sum(c.turns for c in found) == 5
