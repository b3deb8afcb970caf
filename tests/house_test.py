"""The house: imports run one way and without circles, and each thing has one owner."""

import ast
import functools
import pathlib

import pytest
from runs import ROOT

PACKAGE = ROOT / "convit_jax"
# A room may import from the lines below it and from itself, but not from others of its line.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"study"},
    {"analysis", "plan"},
    {"train", "predict"},
    {"weights", "data"},
    {"saved_config"},
    {"recipe", "ablations"},
    {"model"},
    {"workdir", "parallel"},
    {"storage"},
    {"extras", "__init__"},
)
# Names of files and folders in the working directory, which only one module may spell.
PATHS = {
    "config.json", "classes.json", "starts.jsonl", "metrics.jsonl", "checkpoints", "eval.json",
    "predictions.jsonl", "weights.safetensors", "compilation_cache", "data.json", "lock.json",
    "fingerprints.npz", "report.html",
}  # fmt: skip


@functools.cache
def modules(root: pathlib.Path = PACKAGE) -> dict[str, ast.Module]:
    """Returns {dotted name below the package: syntax tree} of every file."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text()
        )
        for path in root.rglob("*.py")
    }


def imports(tree: ast.AST, known: set[str], top_level: bool = False) -> set[str]:
    """Modules of the package that a tree imports; with `top_level`, only outside functions."""
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("convit_jax"):
            base = node.module.partition(".")[2]
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            found |= {name if name in known else base or "__init__" for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if "convit_jax." in a.name}
    return found


def upward(trees: dict[str, ast.Module]) -> list[str]:
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    problems = []
    for name, tree in trees.items():
        room = name.partition(".")[0]
        if room == "__init__":
            continue  # the front door shows what is inside
        for other in imports(tree, set(trees)):
            there = other.partition(".")[0]
            if there != room and floor[there] <= floor[room]:
                problems.append(f"{name} imports {other}")
    return problems


def circles(trees: dict[str, ast.Module]) -> list[str]:
    graph = {name: imports(tree, set(trees), True) - {name} for name, tree in trees.items()}
    graph.pop("__init__")
    done, found = set(), []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return found


def strings(tree: ast.AST) -> list[str]:
    """String constants of the code, without docstrings and messages of several words."""
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in PATHS]


def test_imports_run_downwards():
    assert upward(modules()) == []


def test_imports_have_no_circles():
    assert circles(modules()) == []


def test_every_room_has_a_floor():
    rooms = {name.partition(".")[0] for name in modules()}
    assert rooms <= set().union(*FLOORS)


def test_a_runs_paths_have_one_owner():
    # huggingface.co's repositories have a config.json too, and an option of the recipe is a cache.
    others = {"weights.hub": {"config.json"}, "recipe": {"compilation_cache"}}
    spelled = {
        name: set(strings(tree)) - others.get(name, set())
        for name, tree in modules().items()
        if name != "workdir.folder"
    }
    assert {name: found for name, found in spelled.items() if found} == {}


def test_files_are_renamed_by_storage_alone():
    """Calls of os.replace and os.rename, and of Path.replace or .rename with one argument."""
    allowed = {
        "storage.whole": 1,
        "storage.folders": 1,  # a checkpoint that cannot be read is set aside
        "data.imagenet.prepare": 1,  # the finished data set's folder
    }
    counts: dict[str, int] = {}
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                by_os = getattr(node.func.value, "id", "") == "os"
                renames = node.func.attr in ("rename", "replace", "renames")
                one_argument = len(node.args) == 1 and not node.keywords
                if renames and (by_os or one_argument):
                    counts[name] = counts.get(name, 0) + 1
    assert counts == allowed


def test_no_function_is_a_drawer():
    """No module called utils, helpers or common."""
    names = {part for name in modules() for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize(
    ("name", "code", "problem"),
    [
        ("model.new", "from convit_jax.train.step import Program", "upward"),
        ("data.new", "def f():\n    from convit_jax.weights import load", "upward"),
        ("storage", "from convit_jax import recipe", "upward"),
        ("model.sdpa", "from convit_jax.model import attention", "circle"),
    ],
)
def test_the_checks_can_fail(name, code, problem):
    trees = modules() | {name: ast.parse(code)}
    assert (upward if problem == "upward" else circles)(trees)
