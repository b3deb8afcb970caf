"""The benchmark of an accelerator: what it plans, prints and stores, tried on small models."""

import json

import pytest

from benchmarks import accelerator, accelerator_plan
from benchmarks.accelerator_plan import CONVIT, DEIT_LIKE, Row
from benchmarks.contenders import COMPILED, OURS, TIMM

FORWARD = ["--quick", "--work", "forward", "--repetitions", "2", "--dtype", "float32"]


def test_every_row_of_the_plan_is_a_model_and_comes_once():
    rows = [row for stage in accelerator_plan.stages() for row in stage]
    assert len(set(rows)) == len(rows)
    assert accelerator_plan.VARIANTS == ("convit_small", "convit_base", "convit_tiny")
    for row in rows:
        model = row.spec("bfloat16", {}, devices=2).model
        assert (model.local_up_to_layer == 0) == (row.family == DEIT_LIKE)
    first = rows[0]
    assert str(first) == "ConViT, timm"
    assert first.spec("bfloat16", {}, devices=2).batch == 2 * first.batch


def test_rows_are_chosen_by_flags():
    form = (("unroll", 2),)
    (rows,) = accelerator_plan.stages(["convit_base"], ["step"], [4, 4], [form], (OURS, TIMM))
    base = {"what": "step", "variant": "convit_base", "batch": 4}
    assert rows == [
        Row(CONVIT, TIMM, **base),
        Row(CONVIT, OURS, **base),
        Row(CONVIT, OURS, **base, form=form),
        Row(DEIT_LIKE, TIMM, **base),
        Row(DEIT_LIKE, OURS, **base),
    ]
    late = list(accelerator_plan.stages(["convit_tiny"], ["step"], whos=(OURS, TIMM, COMPILED)))
    assert [row.who for row in late[1]][:2] == [COMPILED, COMPILED]


def test_a_row_that_cannot_run_says_why_and_the_table_goes_on(tmp_path, capsys):
    output = tmp_path / "results.json"
    options = ["--peer", "none", "--options", "attention=cudnn", "--output", str(output)]
    accelerator.main([*FORWARD, *options])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| con" in line]
    assert [cells[1] for cells in table] == [
        "ConViT, ours",
        "ConViT, ours, attention=cudnn",
        "DeiT, ours",
    ]
    assert "failed: ValueError: attention='cudnn': expected bfloat16" in table[1][4]
    assert " to " in table[2][9]  # DeiT's speed over that of ConViT

    stored = json.loads(output.read_text())
    assert stored["dtype"] == "float32"
    assert "jax " in stored["versions"]
    default, failed, deit = stored["rows"]
    assert (default["form"], failed["form"]) == ({}, {"attention": "cudnn"})
    assert "failed" in failed
    assert default["bytes"] > 0
    assert default["mfu"] is None  # nobody knows this CPU's peak
    assert deit["speed_over"]["ours"][0] > 0


def test_no_row_is_begun_when_the_time_is_over(tmp_path, capsys):
    output = tmp_path / "results.json"
    options = ["--peer", "none", "--options", "--minutes", "0", "--output", str(output)]
    accelerator.main([*FORWARD, *options])
    assert "2 of 2 rows were not begun" in capsys.readouterr().out
    assert not output.exists()
    with pytest.raises(SystemExit, match="no row of the plan"):
        accelerator.main(["--variants", "convit_base", "--work", "whole step", "--peer", "none"])
