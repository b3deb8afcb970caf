"""Loading weights from a file, the workdir of a run, a bucket or huggingface.co.

    model, variables = load("convit_base")              # or a file, or the workdir of a run

`load` returns the model and its variables. `read_weights` also returns what predictions need: class
names, normalisation and crop. `files`, `from_workdir` and `hub` read the kinds of source.
"""

from collections.abc import Mapping
import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np

from convit_jax import extras, storage
from convit_jax.model.network import ConViT
from convit_jax.model.normalise import of_channels
from convit_jax.model.variants import describe
from convit_jax.weights import adapt, files, hub, infer, names
from convit_jax.weights.infer import Claim
from convit_jax.weights.loaded import Contents, Loaded
from convit_jax.weights.state_dict import from_torch

log = logging.getLogger(__name__)


def load(
    source: str | os.PathLike,
    variant: str | None = None,
    *,
    ema: bool = False,
    offline: bool = False,
    **overrides: Any,
) -> tuple[ConViT, dict[str, Any]]:
    """Loads a model and its variables from a file, a run, or huggingface.co.

    The options of the model are inferred from the shapes of the weights and from what the source
    states. They are logged.

    Args:
      source: one of
        - a safetensors file, or the list of its shards (model.safetensors.index.json);
        - a PyTorch file with a state dict or a training checkpoint of the original code, timm or
          others. No code in it is run. The first bytes tell the format, not the suffix;
        - the workdir of a run: its best checkpoint by top-1 accuracy, the newest if none has been
          evaluated, its weights.safetensors if it has no checkpoint;
        - such a file or run in a bucket: gs://BUCKET/NAME or s3://BUCKET/NAME;
        - a name on huggingface.co, such as "convit_base", "timm/convit_base.fb_in1k" or
          "hf-hub:ORGANISATION/NAME". A file or folder of the same name takes precedence.
      variant: name of `VARIANTS`, for options that the shapes do not determine. It is checked
        against the shapes.
      ema: whether to take the averaged weights of a checkpoint or run.
      offline: whether to look for a name on huggingface.co in the local cache only.
      **overrides: options of `ConViT`. Another num_classes makes a new head, and 0 drops the head.
        Another image_size interpolates the position embedding and other in_channels adapt the first
        convolution, both as timm does. All other options that decide the parameters, such as depth,
        must agree with the weights.

    Returns:
      (model, variables), for `model.apply(variables, images)`.

    Raises:
      ValueError: if the weights are not those of a ConViT or DeiT (the message names every wrong
        key), or the options are ambiguous or contradict the weights.
      OSError: if the source does not exist, cannot be read, or the network is missing.
    """
    loaded = read_weights(source, variant, ema=ema, offline=offline, **overrides)
    return loaded.model, {"params": loaded.params}


def read_weights(
    source: str | os.PathLike,
    variant: str | None = None,
    *,
    ema: bool | None = False,
    offline: bool = False,
    checkpoint: str = "best",
    heads_if_open: int | None = None,
    **overrides: Any,
) -> Loaded:
    """Loads weights as `load` does, and what predictions need.

    Takes the arguments of `load` and two more. Raises the errors of `load`.

    Args:
      ema: as for `load`; or None, which takes what a run hands out: its averaged weights if it has
        any. Of a file, None takes the weights that are not averaged.
      checkpoint: the checkpoint of a run to read: "best", "newest" or a step, see
        `from_workdir.find`.
      heads_if_open: number of heads of weights that do not determine it, see `infer.model_of`.
    """
    contents = _contents(source, ema=ema, offline=offline, checkpoint=checkpoint)
    try:
        model = infer.model_of(contents.params, contents.stated, variant, overrides, heads_if_open)
        log.info("%s: %s", source, describe(model))
        wanted = model.clone(**overrides)
        params = adapt.fit_params(
            contents.params,
            wanted,
            new_head=wanted.num_classes != model.num_classes,
            resize_pos_embed=True,
            adapt_channels=True,
            grid=model.grid,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    _say_what_is_not_finite(source, contents.params)
    loaded = Loaded(wanted, params, str(source), **contents.extras)
    if wanted != model:
        loaded = dataclasses.replace(loaded, metrics=None)  # they are another model's
    return _matched(loaded, same_head=wanted.num_classes == model.num_classes)


def _contents(
    source: str | os.PathLike, *, ema: bool | None, offline: bool, checkpoint: str
) -> Contents:
    path = storage.as_path(source)
    if path.is_file():
        return _read_file(path, ema=bool(ema))
    if path.is_dir():
        return _read_folder(path, ema=ema, checkpoint=checkpoint)
    name, repository = str(source), None
    if not name.endswith(files.SUFFIXES):
        repository = hub.repository_name(name)
    if repository is None:
        raise FileNotFoundError(f"weights: no such file or folder: {source}")
    if ema:
        raise ValueError(f"{source}: a repository has no averaged weights: read it without ema")
    fetched = hub.fetch(repository, offline=offline)
    log.info("%s: using %s of %s", source, fetched.weights.name, repository)
    return _read_repository(fetched)


def _read_folder(path: pathlib.Path, *, ema: bool | None, checkpoint: str) -> Contents:
    cloned = hub.cloned(path)
    if cloned is not None and not ema:
        return _read_repository(cloned)
    from convit_jax.workdir.folder import Workdir

    with extras.needed("weights", "a run's checkpoint"):
        from convit_jax.weights import from_workdir

    workdir = Workdir(path)
    found = from_workdir.find(workdir, ema=ema, wanted=checkpoint)
    which: dict[str, Any] = {"step": found.step, "ema": found.ema, "chosen": found.chosen}
    if found.step is None:
        contents = _read_file(found.path, ema=False)
        return dataclasses.replace(contents, extras={**contents.extras, **which})
    which["metrics"] = from_workdir.measured(found)
    stated, others = from_workdir.describe(workdir)
    return Contents(from_workdir.restore(found), stated, {**others, **which})


def _read_repository(repository: hub.Repository) -> Contents:
    contents = _read_file(repository.weights, ema=False)
    stated, others = hub.describe(repository)
    # A file of this project states its own options, which come before those of config.json.
    return Contents(contents.params, contents.stated or stated, {**others, **contents.extras})


def _read_file(path: pathlib.Path, *, ema: bool) -> Contents:
    state_dict, ours = files.read_state_dict(path, ema=ema)
    stated = Claim("its metadata", ours.pop("options")) if ours else None
    try:
        params = from_torch(names.without_prefixes(path, state_dict))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    buffers = sum(name.endswith(".rel_indices") for name in state_dict)
    if buffers:
        log.info("%s: ignored %d buffers rel_indices, which are no weights", path, buffers)
    return Contents(params, stated, {**ours, "ema": ema})


def _say_what_is_not_finite(source: str | os.PathLike, params: Mapping[str, Any]) -> None:
    found = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, array in jax.tree_util.tree_leaves_with_path(params)
        if not np.isfinite(array).all()
    ]
    if found:
        log.warning("%s: NaN or infinity in %s", source, ", ".join(found))


def _matched(loaded: Loaded, *, same_head: bool) -> Loaded:
    """Fits class names and normalisation to another head or other input channels."""
    classes, mean, std = loaded.class_names, loaded.mean, loaded.std
    if classes is not None and (not same_head or len(classes) != loaded.model.num_classes):
        if same_head:
            log.warning("%s: %d class names left out, because the model has %d classes",
                        loaded.source, len(classes), loaded.model.num_classes)  # fmt: skip
        classes = None
    mean, std = (of_channels(values, loaded.model.in_channels) for values in (mean, std))
    return dataclasses.replace(loaded, class_names=classes, mean=mean, std=std)
