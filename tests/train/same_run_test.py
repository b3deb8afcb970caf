"""What belongs to a run: its configuration, its classes and its images, for all its processes."""

import json
import re

from PIL import Image
import pytest
from several import finish, start_pair

from convit_jax import recipe
from convit_jax.train import setup
from convit_jax.workdir import identity
from convit_jax.workdir.folder import Workdir


def write(folder, classes=("ant", "bee", "cat"), images=4, splits=("train", "val")):
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(images):
                Image.new("RGB", (8, 8), (i, i, i)).save(folder / split / name / f"{i}.png")
    return folder


def configuration(folder):
    config = recipe.get_config()
    config.model.update(name="convit_tiny", image_size=8, patch_size=4)
    config.data.update(source=f"folder:{folder}", workers=0)
    config.train.batch_size = 8
    return config


def begin(folder, workdir):
    """Prepares a run and records its start, as the training loop does; returns what changed."""
    config = configuration(folder)
    model = setup.make_model(config)
    changed, sources, data = setup._open_data(config, workdir, model)
    workdir.path.mkdir(exist_ok=True)
    identity.record_start(
        workdir,
        recipe.to_json(config),
        0,
        sources[0].class_names,
        {split: found.summary() for split, found in data.items()},
        {split: found.fingerprints for split, found in data.items()},
    )
    return changed


def test_the_same_images_under_another_path_go_on(tmp_path):
    workdir = Workdir(tmp_path / "run")
    begin(write(tmp_path / "here"), workdir)
    saved = json.loads(workdir.config.read_text())
    saved["data"]["source"] = f"folder:{write(tmp_path / 'there')}"
    workdir.config.write_text(json.dumps(saved))
    assert begin(tmp_path / "there", workdir) == []


def test_a_renamed_class_is_refused_by_name(tmp_path):
    workdir, data = Workdir(tmp_path / "run"), write(tmp_path / "data")
    begin(data, workdir)
    before = workdir.classes.read_text()
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "wasp")
    with pytest.raises(ValueError, match=r"other classes .*'ant' missing, 'wasp' new"):
        setup.prepare(configuration(data), workdir)
    assert workdir.classes.read_text() == before


def test_an_added_class_is_refused_by_name(tmp_path):
    workdir, data = Workdir(tmp_path / "run"), write(tmp_path / "data")
    begin(data, workdir)
    write(data, ("cow",))
    with pytest.raises(ValueError, match="4 classes instead of 3: 'cow' new"):
        setup.prepare(configuration(data), workdir)


def test_other_images_are_counted(tmp_path):
    workdir, data = Workdir(tmp_path / "run"), write(tmp_path / "data")
    begin(data, workdir)
    (data / "train" / "bee" / "2.png").unlink()
    Image.new("RGB", (8, 8)).save(data / "train" / "bee" / "7.png")
    Image.new("RGB", (8, 8)).save(data / "train" / "bee" / "8.png")
    assert begin(data, workdir) == ["train data: 13 images, saved 12: 2 more and 1 fewer"]
    assert begin(data, workdir) == []
    (data / "val" / "cat" / "0.png").unlink()
    workdir.fingerprints.unlink()  # the folder of indices is a cache
    assert begin(data, workdir) == ["test data: 11 images, saved 12"]


def test_a_run_of_an_earlier_version_has_no_record_of_its_images(tmp_path):
    workdir, data = Workdir(tmp_path / "run"), write(tmp_path / "data")
    begin(data, workdir)
    workdir.fingerprints.unlink()
    workdir.data.unlink()
    assert begin(data, workdir) == []


HOSTS = """
by_hand()
import pathlib
from convit_jax.cli import options
from convit_jax.train import setup
from convit_jax.workdir.folder import Workdir
own = pathlib.Path(sys.argv[3]) / f"host{jax.process_index()}"
for case in ("same", "train", "names", "missing", "lr"):
    os.chdir(own / (case if case != "lr" else "same"))
    lr = 0.1 * (1 + jax.process_index()) if case == "lr" else 0.1
    overrides = ["--config.model.image_size=8", "--config.model.patch_size=4",
        "--config.model.name=convit_tiny", "--config.data.source=folder:data",
        "--config.data.workers=0", "--config.train.batch_size=8", f"--config.optim.lr={lr}"]
    try:
        setup.prepare(options.configuration("convit_ti", overrides), Workdir(sys.argv[3] + "/run"))
    except (ValueError, OSError, RuntimeError) as error:
        print(case, "|", str(error).replace("\\n", " "))
    else:
        print(case, "| ready")
"""


def test_processes_with_other_data_or_another_configuration_are_refused(tmp_path):
    for host in ("host0", "host1"):
        write(tmp_path / host / "same" / "data")
        write(tmp_path / host / "missing" / "data")
        write(tmp_path / host / "train" / "data", images=5 if host == "host1" else 4)
        write(tmp_path / host / "names" / "data", ("zebra" if host == "host1" else "ant", "bee"))
    for path in (tmp_path / "host1" / "missing" / "data" / "val" / "cat").iterdir():
        path.unlink()
    (tmp_path / "host1" / "missing" / "data" / "val" / "cat").rename(
        tmp_path / "host1" / "missing" / "data" / "val" / "cow"
    )
    texts = finish(start_pair(HOSTS, tmp_path))
    first, second = (dict(re.findall(r"^(\w+) \| (.*)$", text, re.M)) for text in texts)
    assert first["same"] == second["same"] == "ready", texts
    assert "train: process 1 has 15 images, process 0 12" in first["train"]
    assert "test: process 1 has 15 images, process 0 12" in first["train"]
    assert "'ant' missing, 'zebra' new, compared with process 0" in first["names"]
    assert "process 1 has another configuration than process 0: optim.lr: " in first["lr"]
    assert all(first[case] == second[case] for case in ("train", "names", "lr"))
    assert "cow" in second["missing"]
    assert first["missing"] == f"process 1 stopped: {second['missing']}"
