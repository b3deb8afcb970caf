"""What belongs to a run: its configuration, its classes and its images, for all its processes."""

import re

import jax
from PIL import Image
import pytest
from several import finish, start_pair

from convit_jax import recipe
from convit_jax.parallel import sharding
from convit_jax.train import eval_setup, same_run, setup
from convit_jax.weights.loaded import Loaded
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
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    changed, _, data = setup._open_data(config, workdir, model, mesh)
    workdir.path.mkdir(exist_ok=True)
    same_run.record_start(workdir, config, data, step=0)
    return changed


def test_the_same_images_under_another_path_go_on(tmp_path):
    workdir = Workdir(tmp_path / "run")
    here, there = (write(tmp_path / name) for name in ("here", "there"))
    begin(here, workdir)
    assert begin(there, workdir) == [f"data.source: saved 'folder:{here}', now 'folder:{there}'"]
    assert begin(there, workdir) == []
    (here / "train" / "bee" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*data.source: saved"):
        begin(here, workdir)


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
    assert begin(data, workdir) == [
        "test data: 11 images, saved 12: which of them differ is not known"
    ]


def test_an_evaluation_says_that_the_images_of_the_run_changed(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    workdir, data = Workdir(tmp_path / "run"), write(tmp_path / "data")
    begin(data, workdir)
    (data / "val" / "bee" / "2.png").unlink()
    config = configuration(data)
    loaded = Loaded(setup.make_model(config, 3), {}, str(workdir), ("ant", "bee", "cat"))
    monkeypatch.setattr(eval_setup, "read_weights", lambda *args, **options: loaded)
    eval_setup.prepare(None, workdir, eval_setup.Choices())
    said = "changed since the run's last start: test data: 11 images, saved 12: 0 more and 1 fewer"
    assert said in caplog.text


def test_a_run_of_an_earlier_version_has_no_record_of_its_images(tmp_path):
    workdir, data = Workdir(tmp_path / "run"), write(tmp_path / "data")
    begin(data, workdir)
    workdir.fingerprints.unlink()
    workdir.data.unlink()
    assert begin(data, workdir) == []


def test_an_open_batch_size_fits_the_images_and_stays_with_the_run(tmp_path, caplog):
    caplog.set_level("INFO")
    workdir, data = Workdir(tmp_path / "run"), write(tmp_path / "data", images=90)
    config = configuration(data)
    config.train.batch_size = None
    run = setup.prepare(config, workdir)
    assert run.config.train.batch_size == 32  # 270 images, at least 8 steps
    assert "train.batch_size: 32, to fit the 270 training images" in caplog.text
    same_run.record_start(workdir, run.config, run.data, step=0)
    for path in (data / "train" / "ant").iterdir():  # 180 images would fit 16
        path.unlink()
    Image.new("RGB", (8, 8)).save(data / "train" / "ant" / "0.png")
    assert setup.prepare(config, workdir).config.train.batch_size == 32


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (20, r"at most the 60 images of folder:.*, got 64: --config.train.batch_size=32 fits"),
        (2, r"data.source: expected at least 8 images.*got the 6 of folder"),
    ],
)
def test_a_batch_larger_than_the_data_gets_the_flag_that_fits(tmp_path, images, message):
    config = configuration(write(tmp_path, images=images))
    config.train.batch_size = 64
    with pytest.raises(ValueError, match=message):
        setup.prepare(config, Workdir(tmp_path / "run"))


def test_a_run_within_the_warmup_is_warned_of(tmp_path, caplog):
    config = configuration(write(tmp_path))
    config.train.epochs = 3.0
    setup.prepare(config, Workdir(tmp_path / "run"))
    assert "3 epochs of training, optim.warmup_epochs=5" in caplog.text


HOSTS = """
by_hand()
import pathlib
from convit_jax.cli import options
from convit_jax.train import same_run, setup
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
cache = f"--config.data.cache=cache{jax.process_index()}"
same_run.check_processes(options.configuration("convit_ti", [cache]), {})
print("cache | ready")
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
    assert first["cache"] == second["cache"] == "ready", texts  # each host has its own
    assert "train: process 1 has 15 images, process 0 12" in first["train"]
    assert "test: process 1 has 15 images, process 0 12" in first["train"]
    assert "'ant' missing, 'zebra' new, compared with process 0" in first["names"]
    assert "process 1 has another configuration than process 0: optim.lr: " in first["lr"]
    assert all(first[case] == second[case] for case in ("train", "names", "lr"))
    assert "cow" in second["missing"]
    assert first["missing"] == f"process 1 stopped: {second['missing']}"
