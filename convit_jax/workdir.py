"""The working directory of a run: whose it is, and what it was made with.

`config.json` is the configuration, which a later start has to match; `classes.json` has the names
of the classes in the order of the logits; `starts.jsonl` says, a line a start, from which step, on
what devices and with which versions. Checkpoints and metrics lie beside
them (`convit_jax.checkpoint`, `convit_jax.metrics`).
"""

from collections.abc import Iterator, Sequence
import contextlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import ml_collections

# What may change between two starts of a run: how long it is, where things lie, what it shows and
# saves, how the work is split and in what order it is summed. Splitting a batch (accum_steps)
# draws other dropout.
_MAY_CHANGE = frozenset(
    {
        "train.epochs",
        "train.log_every",
        "train.eval_every",
        "train.accum_steps",
        "train.remat",
        "data.epochs_scale",
        "data.dir",
        "data.workers",
        "model.attention",
        "model.positional",
        "model.unroll",
        "mesh.fsdp",
        "checkpoint.every",
        "checkpoint.keep",
        "compilation_cache",
    }
)
_PACKAGES = ("convit-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check(path: pathlib.Path, config: ml_collections.ConfigDict) -> list[str]:
    """Checks that a run may go on, or begin, in a working directory; makes nothing.

    Returns:
      What differs from the run that is there, if one is, in ways that may differ.

    Raises:
      ValueError: if there is a run with another model or recipe; names the keys.
      OSError: if the directory cannot be written.
    """
    exists = path
    while not exists.exists():
        exists = exists.parent
    with tempfile.TemporaryFile(dir=exists) as file:  # says why it cannot
        file.write(bytes(1 << 16))
    try:
        saved = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        return []
    except ValueError:
        raise ValueError(
            f"{path / 'config.json'}: not readable: choose another --workdir or delete it"
        ) from None
    differences = dict(_differences(saved, json.loads(config.to_json())))
    wrong = [text for key, text in differences.items() if key not in _MAY_CHANGE]
    if wrong:
        raise ValueError(
            f"{path} holds a run with another configuration: choose another --workdir, delete it, "
            "or start with what it was made with:\n  " + "\n  ".join(wrong)
        )
    return list(differences.values())


def load_config(path: pathlib.Path) -> ml_collections.ConfigDict | None:
    """The configuration of the run in a working directory; None if there is no run.

    Raises:
      ValueError: if it is not readable.
    """
    try:
        text = (path / "config.json").read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return ml_collections.ConfigDict(_with_tuples(json.loads(text)))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: not readable: {error}") from None


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def record_start(
    path: pathlib.Path,
    config: ml_collections.ConfigDict,
    step: int,
    class_names: Sequence[str],
) -> None:
    """Writes the configuration, the classes and the line of this start; by one process."""
    texts = {
        "classes.json": json.dumps(class_names),
        "config.json": config.to_json(indent=2),
    }
    for name, text in texts.items():
        unfinished = path / f"{name}.part"
        unfinished.write_text(text + "\n")
        unfinished.replace(path / name)
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "step": step,
        "command": sys.argv,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "git_revision": _git_revision(),
        "python": sys.version.split()[0],
        "versions": dict(versions()),
    }
    with (path / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")


def _differences(saved: Any, found: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every leaf that differs."""
    if isinstance(saved, dict) and isinstance(found, dict):
        for name in sorted(saved.keys() | found.keys()):
            path = f"{key}.{name}" if key else name
            yield from _differences(saved.get(name), found.get(name), path)
    elif saved != found:
        yield key, f"{key}: there {saved!r}, now {found!r}"


def versions() -> Iterator[tuple[str, str]]:
    """Of the packages that decide what comes out: (name, version)."""
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not installed itself
            yield package, importlib.metadata.version(package)


def _git_revision() -> str | None:
    """Of the code, with "-dirty" if it was changed since; None if it is not a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
