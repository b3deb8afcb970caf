"""The documentation: its commands and examples run, its links lead somewhere, its tables are true.

`pages.py` says what a page may contain and how it is run.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import commands
import compiling
import make_imagenet
import numpy as np
import pages
from pages import ROOT, Block
from PIL import Image
import pytest
import reference
import runs

from convit_jax import VARIANTS, recipe

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages.PAGES}
# What a test cannot have: another machine, the network, ImageNet, other packages.
REASONS = ("installs ", "needs ")


def test_every_block_is_run_or_says_why_not():
    for page in PAGES.values():
        for block in pages.blocks(page):
            if block.language in pages.RUN:
                assert block.reason is None or block.reason.startswith(REASONS), block.where
            else:
                assert block.language in ("text", "bibtex"), block.where
                assert block.reason is None, block.where
        comments = re.findall(r"<!-- not run", page.read_text())
        marked = [block for block in pages.blocks(page) if block.reason]
        assert len(comments) == len(marked), f"{page.name}: a mark that is above no block"


def test_links_lead_to_files_and_headings():
    others = (ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md")
    for page in (*PAGES.values(), *others):
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"https?://", target):
                continue
            path, _, heading = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                found = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in found}
                assert heading in anchors, f"{page.name}: {target}"


def test_the_readme_is_a_front_door():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    # .ci/run takes its commands from these lines.
    assert (
        "pip install -e '.[train]' && python main.py --config=configs/digits.py "
        "--workdir=runs/digits"
    ) in lines
    assert "pip install -e '.[train,test]' && python -m pytest" in lines


def test_tables_and_configurations_agree_on_the_models():
    readme, pods = ((ROOT / name).read_text() for name in ("README.md", "docs/pods.md"))
    cells = r" \| ([\d,]+) \| ([\d.]+) \| ([\d.]*) \| ([\d,]+) \| ([\d,]+) \|$"
    rows = re.findall(rf"^\| `(\w+)` \| `configs/(\w+)\.py`{cells}", readme, re.MULTILINE)
    assert [row[0] for row in rows] == list(VARIANTS)
    for name, config, params, top1, top5, full, half in rows:
        assert f"| `{config}` | {full} | {half} |" in pods
        text = (ROOT / "configs" / f"{config}.py").read_text()
        assert f'recipe.paper("{name}")' in text
        assert f"{params} parameters" in text
        assert f"{top1}% top-1" in text
        assert f"{top5}% top-5" in text or not top5
        assert f"{full} MiB a chip with 128 images, {half} MiB with 64" in text


def test_the_page_of_keys_is_written_anew():
    path = ROOT / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PATH.read_text() == module.text(), "run: python docs/make_configuration.py"


def test_keys_and_configurations_that_pages_name_exist():
    for page in PAGES.values():
        text = page.read_text()
        for name in re.findall(r"--config\.([a-z_.]+)=", text):
            assert name in recipe.KEYS or name == "model.embed_dm", f"{page.name}: {name}"
        for name in re.findall(r"configs/(\w+)\.py", text):
            assert (ROOT / "configs" / f"{name}.py").is_file(), f"{page.name}: {name}"


def test_what_a_page_shows_is_compared():
    python = Block(ROOT / "README.md", 1, "python", "", None, "1 2\n")
    pages.check_output(python, "1 2\n")
    with pytest.raises(ValueError, match="prints\n1 3\ninstead of\n1 2"):
        pages.check_output(python, "1 3\n")
    bash = Block(ROOT / "README.md", 1, "bash", "", None, "top-1  98.6%\nwrote a\n")
    pages.check_output(bash, "start\ntop-1 7%\nstep\nwrote a\n")
    for output in ("top-1 7%\n", "wrote a\ntop-1 7%\n", "top-5 7%\nwrote a\n"):
        with pytest.raises(ValueError, match="without, at its place,"):
            pages.check_output(bash, output)


def test_a_fork_of_a_program_is_as_a_process_of_its_own(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys\n"
        "print(sys.argv[1:], sys.stdin.read(), os.getcwd(), sys.path[0], os.environ['HELLO'])\n"
        "print('colorsys' in sys.modules, file=sys.stderr)\n"
        "if len(sys.argv) == 1:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    with commands.running(dict(os.environ), packages=["colorsys"]) as forks:

        def run(*words: str, **variables: str) -> tuple[int, str, str]:
            done = subprocess.run(
                [*forks.python, str(program), *words], cwd=folder, input="in",
                env=os.environ | {"HELLO": "you"} | variables, capture_output=True, text=True,
                timeout=1200,
            )  # fmt: skip
            return done.returncode, done.stdout, done.stderr

        places = f"in {folder} {tmp_path} you\n"
        assert run("3", "a b") == (3, f"['3', 'a b'] {places}", "True\n")
        assert run()[0] == -signal.SIGKILL
        # A package would have read this variable when it was imported.
        assert run("0", JAX_PLATFORMS="tpu") == (0, f"['0'] {places}", "False\n")
        path = f"{forks.folder}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["convit", "nope"], env=os.environ | {"PATH": path}, capture_output=True, text=True,
            timeout=1200,
        )  # fmt: skip
        assert done.returncode == 1
        assert "nope" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with everything that the pages name, and how to start programs there."""
    folder = runs.once(tmp_path_factory, "docs", _prepare)
    with commands.running(_environment(folder)) as forks:
        yield folder, forks


def _prepare(folder: pathlib.Path) -> None:
    for name in ("main.py", "configs", "benchmarks", "docs", "convit_jax"):
        (folder / name).symlink_to(ROOT / name)
    _write_pictures(folder)
    examples = make_imagenet.make_examples(per_class=2, validation=8)
    make_imagenet.write_tfds(folder / "imagenet", examples, "array_record")
    _write_weights(folder)
    done = subprocess.run(
        [sys.executable, "main.py", "--config=digits", "--workdir=runs/digits",
         "--config.train.epochs=0.5", "--config.train.eval_every=0.25",
         "--config.train.batch_size=32"],  # epochs and batch of `pages.py`; evaluated twice
        cwd=folder, env=_environment(folder), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _environment(folder: pathlib.Path) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        # One device, as a user has; programs that compile quickly.
        "XLA_FLAGS": compiling.flags(),
        # Names are looked for in this cache of huggingface.co only.
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
    }


def _write_pictures(folder: pathlib.Path) -> None:
    """photo.jpg, photos/, class folders in pictures/, and a handwritten four."""
    from sklearn import datasets

    photos = make_imagenet.photos()
    photos[0].save(folder / "photo.jpg")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number, photo in enumerate(photos[:3]):
        photo.save(folder / "photos" / f"{number}.jpg")
        (folder / "pictures" / f"class{number}").mkdir(parents=True)
        for i in range(12):
            x, y = (int(rng.integers(0, side - 96)) for side in photo.size)
            crop = photo.convert("RGB").crop((x, y, x + 96, y + 64))
            crop.save(folder / "pictures" / f"class{number}" / f"{i}.png")
    digits = datasets.load_digits()
    four = digits.images[np.flatnonzero(digits.target == 4)[0]]
    Image.fromarray(np.round(four * (255 / 16)).astype(np.uint8)).save(folder / "four.png")


def _write_weights(folder: pathlib.Path) -> None:
    """convit_tiny with random weights as both kinds of file, and as a name of the hub."""
    import jax
    import jax.numpy as jnp

    from convit_jax import create_model, to_torch
    from convit_jax.weights import hub, safetensors, torch_pickle
    from convit_jax.weights.loaded import Loaded

    model = create_model("convit_tiny")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.image_shape)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(0, 0.05, s.shape).astype(np.float32), shapes["params"]
    )
    safetensors.save_weights(folder / "convit_tiny.safetensors", Loaded(model, params))
    if importlib.util.find_spec("torch"):
        torch_pickle.write(folder / "convit_tiny.pth", to_torch(params))
    # A stand-in for the weights of convit_base, which a test cannot fetch.
    repository = folder / "hub/hub" / f"models--{hub.RELEASED['convit_base'].replace('/', '--')}"
    snapshot = repository / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    shutil.copy(folder / "convit_tiny.safetensors", snapshot / "model.safetensors")
    (snapshot / "config.json").write_text("{}")


RUNNABLE = [name for name, page in PAGES.items() if any(b.is_run for b in pages.blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNABLE)
def test_the_blocks_of_a_page_run(name, prepared, tmp_path):
    if re.search(r"\.pth|import (torch|timm)", PAGES[name].read_text()):
        reference.import_timm()
    there, forks = prepared
    folder = tmp_path / "page"
    shutil.copytree(there, folder, symlinks=True)
    command = [*forks.python, str(ROOT / "tests" / "pages.py"), name, forks.folder]
    done = subprocess.run(
        command,
        cwd=folder,
        env=_environment(there),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
