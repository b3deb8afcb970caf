"""The record of a run: its configuration, its classes, and each of its starts."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from typing import Any
import zipfile

import jax
import numpy as np

from convit_jax import storage
from convit_jax.workdir.folder import Workdir

_PACKAGES = ("convit-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def read_config(workdir: Workdir) -> dict[str, Any] | None:
    """Returns the configuration of the run in a workdir; None if the workdir has no run.

    Raises:
      ValueError: if the file is not readable.
    """
    try:
        saved = json.loads(workdir.config.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"{workdir.config}: not readable: choose another --workdir or delete it")
    return saved


def read_class_names(workdir: Workdir) -> tuple[str, ...] | None:
    """Returns the names of the run's classes in the order of the logits; None if unknown."""
    if not workdir.classes.is_file():
        return None
    return tuple(json.loads(workdir.classes.read_text()))


def read_data(workdir: Workdir) -> dict[str, Any]:
    """Returns the description of the images of each split; empty if unknown."""
    return json.loads(workdir.data.read_text()) if workdir.data.is_file() else {}


def read_fingerprints(workdir: Workdir) -> dict[str, np.ndarray]:
    """Returns {split: hash of each image} of the run's last start; empty if unknown.

    Raises:
      OSError: if the workdir is in a bucket that cannot be read.
    """
    try:
        # Opened here, because numpy does not close a file that turns out to be damaged.
        with workdir.fingerprints.open("rb") as file, np.load(file) as arrays:
            return {split: arrays[split] for split in arrays.files}
    except storage.BucketError:
        raise  # they may be there
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}  # a run of an earlier version, or a folder that was deleted as a cache


def read_starts(workdir: Workdir) -> list[dict[str, Any]]:
    """Returns the starts of the run, see `record_start`; a line cut off by a crash is left out."""
    found = []
    if workdir.starts.is_file():
        for line in workdir.starts.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [start for start in found if isinstance(start, dict)]


def record_start(
    workdir: Workdir,
    config: Mapping[str, Any],
    step: int,
    class_names: Sequence[str],
    data: Mapping[str, Mapping[str, Any]],
    fingerprints: Mapping[str, np.ndarray],
) -> None:
    """Writes the configuration, the classes and a line for this start. Only one process calls it.

    Args:
      workdir: the workdir; its folder must exist.
      config: configuration, as JSON types.
      step: number of finished steps.
      class_names: names of the classes in the order of the logits.
      data: description of the images of each split, as JSON types.
      fingerprints: hash of each image of each split.

    Raises:
      OSError: if a file cannot be written.
    """
    storage.write_text(workdir.classes, json.dumps(class_names) + "\n")
    storage.write_text(workdir.data, json.dumps(data, indent=2) + "\n")
    storage.make_folder(workdir.fingerprints.parent)
    with storage.whole_file(workdir.fingerprints) as unfinished, unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, **fingerprints)
    storage.write_text(workdir.config, json.dumps(config, indent=2) + "\n")
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
    with storage.GrowingFile(workdir.starts) as file:
        file.write(json.dumps(start).encode() + b"\n")


def versions() -> Iterator[tuple[str, str]]:
    """Yields (name, version) of the installed packages that affect the numbers of a run."""
    for package in _PACKAGES:
        # convit-jax has no version if it runs from a checkout without being installed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def _git_revision() -> str | None:
    """Returns the revision of this package's git checkout, with "-dirty" if files were changed.

    Returns None if the package is not in a checkout of its own, for example if it is installed in
    a virtual environment inside another project's checkout.
    """

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command],
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", "record.py"):
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.TimeoutExpired):
        return None
