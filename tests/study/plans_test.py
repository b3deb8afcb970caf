"""The runs behind the tables of the study."""

import pytest

from convit_jax import recipe
from convit_jax.cli import options
from convit_jax.study import plans


def test_table_2_of_the_paper():
    study = plans.sample_efficiency(recipe.paper("convit_small"), range(2), plans.PAPER_SHARES)
    assert study.rows == ("ConViT", "DeiT")
    assert study.columns == ("5%", "10%", "30%", "50%", "100%")
    assert len(study.runs) == 20
    # Seed 0 of every cell comes before seed 1 of any.
    assert [run.flags[-1] for run in study.runs] == 10 * ["--config.seed=0"] + 10 * [
        "--config.seed=1"
    ]
    deit = options.configuration("convit_s", study.runs[5].flags)
    assert (deit.model.name, deit.data.sampling_ratio, deit.data.epochs_scale) == (
        "deit_small", 0.05, 20.0,
    )  # fmt: skip
    assert deit.train.eval_every == 20.0
    assert study.runs[4].flags == ("--config.seed=0",)  # ConViT on all images


def test_the_deit_of_another_model_has_its_sizes():
    config = options.configuration("mnist5k", [])
    run = plans.sample_efficiency(config, [0], [1.0]).runs[1]
    deit = options.configuration("mnist5k", run.flags).model
    assert (deit.num_heads, deit.embed_dim, deit.depth) == (9, 72, 6)
    assert (deit.local_up_to_layer, deit.cls_pos_embed, deit.qkv_bias) == (0, True, True)


def test_studies_share_the_runs_that_they_have_in_common():
    config = options.configuration("mnist5k", [])
    shares = (1.0, 0.1)
    tables = [
        plans.sample_efficiency(config, [0], shares),
        plans.ablation_study(config, [0], shares),
    ]
    assert [len(table.runs) for table in tables] == [4, 14]
    assert {*tables[0].runs} < {*tables[1].runs}
    # With the paper's models they do not: its DeiT has fewer heads than its ConViT.
    paper = recipe.paper("convit_small")
    names = [{run.name for run in plan(paper, [0], shares).runs}
             for plan in (plans.sample_efficiency, plans.ablation_study)]  # fmt: skip
    assert names[0] & names[1] == {"convit-seed_0", "convit-images_0.1-seed_0"}


@pytest.mark.parametrize(("base", "layers"), [("convit_b", (3, 7, 10)), ("mnist5k", (2, 3, 5))])
def test_figure_8(base, layers):
    config = options.configuration(base, [])
    study = plans.locality(config, [0], (0.5, 1.0), plans.figure_8_layers(config), 1.0)
    assert study.rows == tuple(map(str, layers))
    first = options.configuration(base, study.runs[0].flags).model
    assert (first.local_up_to_layer, first.locality_strength) == (layers[0], 0.5)
    assert study.runs[-1].name == "convit-seed_0"  # the configuration itself


def test_tables_5_and_6():
    study = plans.masking_study(recipe.paper("convit_tiny"), [0])
    assert study.columns == (
        "nothing", "position embedding", "content, 3", "content, 5", "content, 10",
        "position, 3", "position, 5", "position, 10",
    )  # fmt: skip
    assert [cell.masked for cell in study.cells if cell.row == "DeiT"] == [
        ("nothing", None), ("position embedding", None),
    ]  # fmt: skip
    assert [run.mask_first for run in study.runs] == [(3, 5, 10), ()]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--config.model.local_up_to_layer=0"], "expected a ConViT, got a DeiT"),
        (["--config.init_from=runs/a"], "expected random weights"),
        (["--config.data.sampling_ratio=0.5"], "data.sampling_ratio: set by the study"),
    ],
)
def test_what_no_study_can_be_made_of_is_refused(flags, error):
    with pytest.raises(ValueError, match=error):
        plans.check_base(options.configuration("mnist5k", flags))


def test_runs_that_cannot_be_made_are_refused_before_the_first_is_trained():
    config = options.configuration("mnist5k", ["--config.optim.freeze=gates"])
    plans.check_run(config)
    study = plans.locality(config, [0], [1.0], [12], 1.0)
    with pytest.raises(ValueError, match="local_up_to_layer"):
        plans.check_run(options.configuration("mnist5k", study.runs[0].flags))
    deit = plans.sample_efficiency(config, [0], [1.0]).runs[1]
    flags = ["--config.optim.freeze=gates", *deit.flags]
    with pytest.raises(ValueError, match="a DeiT has no such parameters"):
        plans.check_run(options.configuration("mnist5k", flags))
