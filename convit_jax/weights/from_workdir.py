"""Weights of a run, read from its workdir."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from convit_jax import saved_config
from convit_jax.model import image_size
from convit_jax.model.variants import options_of_kind, structure_of
from convit_jax.weights.infer import Claim
from convit_jax.workdir import checkpoint_errors, record
from convit_jax.workdir.checkpoints import best_step, newest_step, read_metrics, steps_of
from convit_jax.workdir.folder import Workdir
from convit_jax.workdir.orbax_paths import for_orbax

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Found:
    """The place of a run's weights.

    Attributes:
      path: folder of a checkpoint, or the file of the final weights.
      step: step of the checkpoint; None for the file.
      ema: whether the weights are the averaged ones.
      chosen: what was chosen, such as "the best checkpoint by top-1".
    """

    path: pathlib.Path
    step: int | None
    ema: bool
    chosen: str


def find(workdir: Workdir, *, ema: bool | None, wanted: str = "best") -> Found:
    """Finds the weights of a run: a checkpoint, or the final weights if it has no checkpoint.

    Args:
      workdir: the workdir of the run.
      ema: whether to take the averaged weights. The best checkpoint is then the best by their
        accuracy. None takes what the run hands out at its end: the averaged weights if it has any.
      wanted: "best", the checkpoint with the highest top-1 accuracy on the test images, or the
        newest if none has been evaluated; "newest", evaluated or not; or the step of a checkpoint.

    Raises:
      FileNotFoundError: if the folder is not a workdir, or has neither the checkpoint nor the
        final weights.
      ValueError: if `wanted` is anything else, or `ema` is set and the run has no averaged weights.
    """
    if wanted not in ("best", "newest") and not wanted.isdigit():
        raise ValueError(f"checkpoint: expected best, newest or a step, got {wanted!r}")
    if not workdir.config.is_file():
        raise FileNotFoundError(
            f"{workdir}: expected a workdir of main.py (config.json, checkpoints) or a folder "
            "with model.safetensors, pytorch_model.bin or the list of its shards, found none"
        )
    averages = _config(workdir).optim.ema_decay > 0
    if ema and not averages:
        raise ValueError(f"{workdir}: the run has no averaged weights (optim.ema_decay=0)")
    folder, ema = workdir.checkpoints, averages if ema is None else ema
    step, chosen = _choose(folder, ema, wanted)
    if step is not None:
        kind = "averaged weights" if ema else "weights"
        log.info("%s: %s of step %d, %s", workdir, kind, step, chosen)
        if averages:
            other = "the weights without averaging" if ema else "averaged weights"
            log.info("%s: the run has %s too; not used", workdir, other)
        return Found(folder / str(step), step, ema, chosen)
    final = workdir.weights
    if not final.is_file():
        raise FileNotFoundError(f"{workdir}: holds no checkpoint and no {final.name} yet")
    log.info("%s: no checkpoint, using %s%s", workdir, final.name, ", averaged" if averages else "")
    return Found(final, None, averages, f"{final.name} of the end of the run")


def _choose(folder: pathlib.Path, ema: bool, wanted: str) -> tuple[int | None, str]:
    """Returns the step of the wanted checkpoint, None if there is no checkpoint, and its label."""
    if wanted.isdigit():
        steps = steps_of(folder)
        if int(wanted) not in steps:
            raise FileNotFoundError(
                f"{folder}: no checkpoint of step {wanted}; there are {steps or 'none'}"
            )
        return int(wanted), "the checkpoint asked for"
    if wanted == "newest":
        return newest_step(folder), "the newest checkpoint"
    best = best_step(folder, "ema_top1" if ema else "top1")
    if best is None:
        return newest_step(folder), "the newest checkpoint, since none has been evaluated"
    return best, f"the best checkpoint by top-1{' of the averaged weights' if ema else ''}"


def restore(found: Found) -> dict[str, Any]:
    """Reads the parameters of a checkpoint, and nothing else of its state, as numpy arrays.

    Args:
      found: a checkpoint.

    Raises:
      OSError: if the checkpoint cannot be read.
    """
    checkpoint_errors.hide_late_answers()
    part, item = "ema" if found.ema else "params", for_orbax(found.path / "state")
    try:
        # A Checkpointer would warn that the folder has no metadata of its own.
        handler = ocp.PyTreeCheckpointHandler()
        tree = {part: handler.metadata(item).tree[part]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy, partial_restore=True)
        return handler.restore(item, args=args)[part]
    except Exception as error:  # Orbax raises many types for broken files
        outage = checkpoint_errors.outage(error, found.path)
        reason = outage or checkpoint_errors.first_line(error)
        raise OSError(f"{found.path}: cannot read this checkpoint: {reason}") from error


def measured(found: Found) -> dict[str, float] | None:
    """Returns the metrics of a checkpoint's weights, such as "top1"; None if not evaluated."""
    if found.step is None:
        return None
    metrics = read_metrics(found.path.parent, found.step)
    if metrics is None or not found.ema:
        return metrics and {k: v for k, v in metrics.items() if not k.startswith("ema_")}
    averaged = {k.removeprefix("ema_"): v for k, v in metrics.items() if k.startswith("ema_")}
    return {"images": metrics["images"], **averaged} if "images" in metrics else averaged


def describe(workdir: Workdir) -> tuple[Claim, dict[str, Any]]:
    """Returns the options of a run's model, and the fields of `Loaded` that predictions need."""
    config = _config(workdir)
    options = {k: v for k, v in config.model.items() if v is not None}
    options["image_size"] = image_size.parse(config.model.image_size)
    if "name" in options:  # without it, the options are all there
        options = structure_of(options.pop("name")) | options
    options = {k: v for k, v in options.items() if k not in options_of_kind("computation")}
    extras = {
        "mean": config.data.mean,
        "std": config.data.std,
        "crop_pct": config.augment.eval_crop,
        "class_names": record.read_class_names(workdir),
    }
    return Claim(f"config.json of {workdir}", options), extras


def _config(workdir: Workdir) -> ml_collections.ConfigDict:
    saved = record.read_config(workdir)
    if saved is None:
        raise ValueError(f"{workdir.config}: not the configuration of a run")
    return saved_config.from_json(saved, str(workdir.config))
