"""The tables of the study, from the files of runs."""

import json

from convit_jax import recipe, saved_config, storage
from convit_jax.cli import options
from convit_jax.study import picture, plans, results, runner
from convit_jax.workdir.folder import Workdir


def write_run(folder, run, top1, masked=None):
    """Writes what a finished run leaves, as far as a table reads it."""
    workdir = Workdir(folder / run.name)
    workdir.masking.parent.mkdir(parents=True)
    lines = [{"kind": "eval", "step": step, "top1": x} for step, x in ((1, 0.99), (2, top1))]
    workdir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workdir.weights.touch()
    if masked is not None:
        found = [{"masked": name, "layers": n, "top1": x} for name, n, x in masked]
        workdir.masking.write_text(json.dumps({"results": found}))


def test_a_cell_is_the_mean_and_deviation_of_the_last_evaluations(tmp_path):
    config = options.configuration("mnist5k", [])
    study = plans.sample_efficiency(config, range(3), [0.1, 1.0])
    convit, deit = study.cells[1].runs, study.cells[3].runs
    for run, top1 in zip(convit, (0.5, 0.6, 0.7), strict=True):
        write_run(tmp_path, run, top1)
    write_run(tmp_path, deit[0], 0.25)
    found = results.collect(study, tmp_path)
    assert results.markdown(study, found) == (
        "| model  | 10% | 100%          |\n"
        "| ------ | --- | ------------- |\n"
        "| ConViT | -   | 60.0 ± 10.0   |\n"
        "| DeiT   | -   | 25.0 (1 of 3) |\n"
    )
    cells = json.loads(results.to_json(study, found, saved_config.to_json(config)))["cells"]
    assert cells[1]["mean"] == 60.0
    picture.draw(study, found, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000


def test_the_table_of_masking(tmp_path):
    config = options.configuration("mnist5k", [])
    study = plans.masking_study(config, [0])
    masked = [("nothing", None, 0.9), ("position embedding", None, 0.8), ("content", 2, 0.7)]
    for run in study.runs:
        write_run(tmp_path, run, 0.9, masked)
    found = results.collect(study, tmp_path)
    assert found["ConViT", "content, 2"].text() == "70.0"
    assert found["ConViT", "position, 2"].text() == "-"  # not in the file
    assert ("DeiT", "content, 2") not in found
    assert "|            |" in results.markdown(study, found)
    picture.draw(study, found, tmp_path / "table.png")
    jobs = runner.jobs(study, "mnist5k", [], tmp_path)
    assert [job.words[0] for job in jobs] == ["train", "analyse", "train", "analyse"]
    assert all(job.result.exists() for job in jobs)


def test_what_a_run_completes_is_not_another_configuration(tmp_path):
    asked = options.configuration("digits", ["--config.data.mean=(0.485,0.456,0.406)"])
    saved = asked.copy_and_resolve_references()
    saved.data.mean = (0.449,)
    saved.distill.sha256 = "ab"
    workdir = Workdir(tmp_path)
    storage.write_text(workdir.config, json.dumps(saved_config.to_json(saved)))
    asked.data.mean = recipe.KEYS["data.mean"].default
    runner.check(workdir, asked)
