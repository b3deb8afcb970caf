"""The plan of a run as text, beside a case computed by hand."""

from convit_jax.plan import report
from convit_jax.plan.arithmetic import Arithmetic
from convit_jax.plan.chips import Chip
from convit_jax.plan.collectives import Collective
from convit_jax.plan.compiled import Memory, Step
from convit_jax.plan.hlo import Array
from convit_jax.plan.roofline import Peaks

MIB = 2**20


def test_a_step_that_is_computed_by_hand():
    summed = Collective("all-reduce", (Array("bf16", (40, MIB)),), 1, "", group=8)
    step = Step(
        "as configured", 1024, {"data": 8, "fsdp": 1}, state_bytes=99 * MIB, model_flops=157.6e12,
        arithmetic=Arithmetic(8 * 19.7e12), seconds=1.0, teacher_bytes=7 * MIB,
        memory=Memory(110 * MIB, 50 * MIB, 0, 1 * MIB), bytes_moved=81_900_000_000,
        collectives=(summed,),
    )  # fmt: skip
    chip = Chip("TPU v5 lite", 16 * 2**30, Peaks(197e12, 819e9, 200e9))
    place = report.Place("v5e:2x4", chip, 8, 2, "jax 0", epochs=300, steps=36_000)
    lines = report.text(place, "a model", [step]).splitlines()

    assert "  arguments         110  the state, 99, the teacher, 7, and the batch" in lines
    assert "  matrix products   19,700 GFLOP, 1.00 times what the model needs" in lines
    # 19.7 TFLOP at 197 TFLOP/s, and 81.9 GB at 819 GB/s.
    assert "  matrix products 100 ms, memory 100 ms: at least 100 ms a step" in lines
    assert "  at least 1 hours and 8 device-hours for 300 epochs, 36,000 steps" in lines
    # Of 80 MiB, 2 x 7/8 at 200 GB/s.
    sending = "sending, apart from that: 140 MiB by each device, at least 0.734 ms at 200 GB/s"
    assert f"  {sending} each way" in lines

    unknown = report.Place("v5e:2x4", Chip("TPU v5 lite", None, Peaks(1, 1)), 8, 2, "", 1, None)
    assert "no bandwidth between devices is known" in report.text(unknown, "a model", [step])
