"""Importing the package loads few other packages, and its wheel works without the checkout."""

from importlib import metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import venv

import compiling
from packaging import requirements
import pytest
from runs import ROOT


def imported(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running the code."""
    code += "; import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return set(json.loads(output.stdout))


def test_importing_takes_jax_flax_and_numpy_only():
    assert imported("import convit_jax") - imported("import typing") == {"convit_jax"}
    theirs = imported("import flax.linen, jax, numpy")
    assert imported("from convit_jax import ConViT, create_model") - theirs == {"convit_jax"}


def test_worker_processes_that_read_images_do_without_jax():
    modules = "data.batches.worker_processes", "data.folders.class_folders", "data.arrays"
    code = "import " + ", ".join(f"convit_jax.{module}" for module in modules)
    assert not imported(code) & {"jax", "flax", "orbax", "grain", "torch"}


def test_loading_safetensors_takes_no_package_of_training(tmp_path):
    code = f"""
import json, sys
for package in ("torch", "grain", "ml_collections", "cv2", "PIL", "tqdm", "sklearn"):
    sys.modules[package] = None  # as if it were not installed
import jax
import convit_jax
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.safetensors import save_weights
model = convit_jax.ConViT(image_size=8, patch_size=4, embed_dim=8, num_heads=2, depth=2,
                          local_up_to_layer=1, num_classes=3)
params = jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 3)))["params"]
save_weights({str(tmp_path / "w.safetensors")!r}, Loaded(model, jax.device_get(params)))
loaded, variables = convit_jax.load({str(tmp_path / "w.safetensors")!r})
print(jax.jit(loaded.apply)(variables, jax.numpy.ones((2, 8, 8, 3))).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "(2, 3)\n", done.stderr


MISSING = {
    "convit_jax.load('run')": ("a run's checkpoint", "ml_collections", "weights"),
    "convit_jax.load('timm/convit_tiny.fb_in1k')": (
        "a name on huggingface.co",
        "huggingface_hub",
        "weights",
    ),
    "main.main(['predict', '--help'])": ("error: convit predict", "ml_collections", "predict"),
    "main.main(['train'])": ("error: convit train", "ml_collections", "train"),
}


@pytest.mark.parametrize("code", MISSING)
def test_a_missing_package_is_named_with_its_extra(code, tmp_path):
    what, package, extra = MISSING[code]
    (tmp_path / "run").mkdir()
    code = (
        "import sys; sys.modules['ml_collections'] = sys.modules['huggingface_hub'] = None; "
        f"import convit_jax; from convit_jax.cli import main; {code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        f"{what} needs the package {package}: pip install 'convit-jax[{extra}]'"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel of the project; returns its path."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # two builds of one folder would write the same files
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("convit_jax", "configs"):
        shutil.copytree(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, source]
    subprocess.run(command, check=True, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def environment(folder: pathlib.Path, wheel: pathlib.Path) -> pathlib.Path:
    """Makes a virtual environment with a wheel alone; returns the folder of its programs."""
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", wheel], check=True)
    return programs


def link_requirements(folder: pathlib.Path, name: str) -> None:
    """Links what a package requires, and so on, from this environment into a virtual one.

    Args:
      folder: folder of the virtual environment, which has the package.
      name: name of the package.

    Raises:
      AssertionError: if a version is none of those that are required.
    """
    (site,) = folder.glob("lib/python*/site-packages")
    (package,) = metadata.distributions(name=name, path=[str(site)])
    waiting, linked = [package], set()
    while waiting:
        for text in waiting.pop().requires or ():
            needed = requirements.Requirement(text)
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            found = metadata.distribution(needed.name)
            assert needed.specifier.contains(found.version, prereleases=True), text
            if found.name in linked:
                continue
            linked.add(found.name)
            waiting.append(found)
            for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (site / top).exists():  # packages may share a folder
                    (site / top).symlink_to(found.locate_file(top))


@pytest.mark.slow
def test_every_command_works_from_a_wheel_in_an_empty_folder(wheel, tmp_path):
    programs = environment(tmp_path / "venv", wheel)
    empty = tmp_path / "empty"
    empty.mkdir()
    # Other packages come from this environment. The project does not: it is only a checkout here.
    site = str(pathlib.Path(pytest.__file__).parents[1])
    flags = compiling.flags()  # one device, as a user has
    env = os.environ | {"PYTHONPATH": site, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

    def convit(*words: str) -> str:
        done = subprocess.run(
            [programs / "convit", *words], cwd=empty, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [programs / "python", "-c", "import convit_jax; print(convit_jax.__file__)"],
        cwd=empty, env=env, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(tmp_path / "venv") in where
    assert "convert" in convit("--help")
    assert convit("--version").startswith("convit-jax 0.")
    helps = """
from convit_jax.cli.main import main
for command in ("train", "eval", "predict", "convert", "data", "data check", "data prepare"):
    try:
        main([*command.split(), "--help"])
    except SystemExit as end:
        assert not end.code
"""
    done = subprocess.run(
        [programs / "python", "-c", helps], cwd=empty, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for command in ("train", "eval", "predict", "convert", "data", "data check", "data prepare"):
        assert f"usage: convit {command} " in done.stdout
    assert "1,437 images of 10 classes" in convit("data", "check", "--config=digits")
    small = "patch_size=4", "embed_dim=8", "depth=2", "local_up_to_layer=1"
    model = [f"--config.model.{flag}" for flag in small]
    convit("train", "--config=digits", "--workdir=run", "--config.train.epochs=1", *model)
    assert "top-1" in convit("eval", "--workdir=run")
    assert "wrote run/report.html" in convit("analyse", "report", "--workdir=run")
    convit("convert", "run", "w.safetensors")
    image = ROOT / "tests" / "data"  # a folder without pictures
    done = subprocess.run(
        [programs / "convit", "predict", "--weights=w.safetensors", image],
        cwd=empty, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert "no images in this folder" in done.stderr
    module = [programs / "python", "-m", "convit_jax", "--help"]
    assert "commands:" in subprocess.run(module, env=env, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_core_alone_has_the_model_and_safetensors(wheel, tmp_path):
    programs = environment(tmp_path / "venv", wheel)
    link_requirements(tmp_path / "venv", "convit-jax")
    code = """
import jax
import convit_jax
from convit_jax import GPSA
layer = GPSA(num_heads=4)
params = layer.init(jax.random.key(0), jax.numpy.ones((2, 35, 32)), grid=(5, 7))
from convit_jax.weights.loaded import Loaded
from convit_jax.weights.safetensors import save_weights
model = convit_jax.create_model("convit_tiny", image_size=32, num_classes=2)
variables = jax.jit(model.init)(jax.random.key(0), jax.numpy.ones((1, 32, 32, 3)))
save_weights("w.safetensors", Loaded(model, jax.device_get(variables["params"])))
model, variables = convit_jax.load("w.safetensors")
print(jax.jit(model.apply)(variables, jax.numpy.ones((1, 32, 32, 3))).shape)
"""
    left_out = ("PYTHONPATH", "JAX_COMPILATION_CACHE")  # its limit needs a package
    env = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    env["JAX_PLATFORMS"] = "cpu"
    command = [programs / "python", "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "(1, 2)\n", done.stderr
    command = [programs / "convit", "train", "--config=digits", "--workdir=run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "pip install 'convit-jax[train]'" in done.stderr
