"""Checks that a start continues the run in its workdir, and that all processes start the same run.

The configuration, the classes and the images belong to a run. `convit_jax.recipe` says which keys
of the configuration may change between two starts. Other classes are refused. Other images are
logged: a corrupt one may have been removed.
"""

from collections.abc import Mapping
import json
import logging

import jax
import ml_collections

from convit_jax import recipe, saved_config
from convit_jax.data.identity import (
    Identity,
    class_difference,
    image_difference,
    process_differences,
)
from convit_jax.parallel import processes
from convit_jax.workdir import record
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

# Keys that may differ between the processes of a run.
_OF_A_HOST = ("data.cache", "data.dir", "data.workers", "distill.teacher")


def config_of_run(workdir: Workdir) -> ml_collections.ConfigDict | None:
    """Returns the configuration of the run in a workdir; None if there is no run."""
    saved = record.read_config(workdir)
    return None if saved is None else saved_config.from_json(saved, str(workdir.config))


def keep_data_rules(
    found: ml_collections.ConfigDict | None, config: ml_collections.ConfigDict
) -> None:
    """Gives a configuration the rules by which a run holds out images and reads them.

    Args:
      found: configuration of the run; None if there is no run.
      config: configuration of the present start; changed.
    """
    if found is not None:
        for text in saved_config.keep_division(found, config) + saved_config.keep_reading(
            found, config
        ):
            log.info("%s", text)


def check_config(
    workdir: Workdir, config: ml_collections.ConfigDict, data: Mapping[str, Identity]
) -> list[str]:
    """Returns the permitted differences from the run in the workdir, if there is a run.

    Args:
      workdir: the workdir.
      config: configuration of the present start.
      data: the identity of each split. If its images are those of the run, their folder may be
        another one.

    Raises:
      ValueError: if the run there has another model or recipe; names the keys that differ.
    """
    saved = record.read_config(workdir)
    if saved is None:
        return []
    found = saved_config.from_json(saved, str(workdir.config))
    differences = saved_config.differences(found, config)
    may_change = set(recipe.MAY_CHANGE)
    if _are_folders(found, config) and _are_the_same(workdir, data):
        may_change.add("data.source")
    wrong = [text for name, text in differences.items() if name not in may_change]
    if wrong:
        raise ValueError(
            f"{workdir} holds a run with another configuration: choose another --workdir, delete "
            "this one, or start with the run's own values:\n  " + "\n  ".join(wrong)
        )
    return [*differences.values(), *saved_config.changes_since(saved, config)]


def _are_folders(*configs: ml_collections.ConfigDict) -> bool:
    return all(config.data.source.startswith("folder:") for config in configs)


def _are_the_same(workdir: Workdir, data: Mapping[str, Identity]) -> bool:
    """Returns whether the images are known to be those of the run's last start."""
    known = record.read_data(workdir).keys() >= data.keys()
    return known and not image_changes(workdir, data)


def check_data(workdir: Workdir, data: Mapping[str, Identity]) -> list[str]:
    """Returns how the images differ from those of the run's last start, if there is a run.

    Args:
      workdir: the workdir.
      data: the identity of each split.

    Raises:
      ValueError: if the classes differ.
    """
    class_names = record.read_class_names(workdir)
    if class_names is None:
        return []
    if difference := class_difference(class_names, data["train"].class_names):
        raise ValueError(
            f"{workdir} holds a run with other classes than {data['train'].description}: "
            f"{difference}. Restore the classes, or choose another --workdir. If classes were only "
            f"renamed, in the same order, rename them in {workdir.classes} too"
        )
    return image_changes(workdir, data)


def image_changes(workdir: Workdir, data: Mapping[str, Identity]) -> list[str]:
    """Returns how the images differ from those of the run's last start, if there is a run."""
    changes = []
    saved, fingerprints = record.read_data(workdir), record.read_fingerprints(workdir)
    for split, found in data.items():
        now, last = found.summary(), saved.get(split)
        if last is None or (last["images"], last["hash"]) == (now["images"], now["hash"]):
            continue  # None: a run of an earlier version
        difference = image_difference(fingerprints.get(split), found.fingerprints)
        changes.append(
            f"{split} data: {now['images']:,} images, saved {last['images']:,}{difference}"
        )
    return changes


def check_processes(config: ml_collections.ConfigDict, data: Mapping[str, Identity]) -> None:
    """Checks that all processes of the run have the same configuration and the same data.

    Every process must call it.

    Raises:
      RuntimeError: on every process, if they differ; names the processes and the differences.
    """
    if jax.process_count() == 1:
        return
    texts = processes.gather_texts(json.dumps(saved_config.to_json(config)))
    configs = [saved_config.from_json(json.loads(text), "configuration") for text in texts]
    problems = [
        f"process {process} has another configuration than process 0: {text}"
        for process, other in enumerate(configs)
        for name, text in saved_config.differences(configs[0], other).items()
        if name not in _OF_A_HOST and not (name == "data.source" and _are_folders(other))
    ]
    summaries = {split: found.summary() for split, found in data.items()}
    problems += process_differences(processes.gather_texts(json.dumps(summaries)))
    if problems:
        raise RuntimeError("the processes start different runs:\n  " + "\n  ".join(problems))


def record_start(
    workdir: Workdir, config: ml_collections.ConfigDict, data: Mapping[str, Identity], step: int
) -> None:
    """Writes what later starts are compared with, and a line for this start.

    Only one process calls it.

    Args:
      workdir: the workdir; its folder must exist.
      config: configuration of the run.
      data: the identity of each split.
      step: number of finished steps.

    Raises:
      OSError: if a file cannot be written.
    """
    record.record_start(
        workdir,
        saved_config.to_json(config),
        step,
        data["train"].class_names,
        {split: found.summary() for split, found in data.items()},
        {split: found.fingerprints for split, found in data.items()},
    )
