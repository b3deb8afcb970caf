"""Prepares an evaluation: reads the weights, opens the images, and checks that they fit.

Everything is checked before anything is compiled.
"""

import dataclasses
import logging
import math
import re

import jax
from jax.sharding import Mesh
import ml_collections

from convit_jax.data import class_mapping
from convit_jax.data.batches.chunks import Share
from convit_jax.data.batches.workers import num_workers
from convit_jax.data.class_mapping import ClassMapping
from convit_jax.data.fit import check_fit, fit_normalisation, settle_reading
from convit_jax.data.identity import Identity
from convit_jax.data.source import Source
from convit_jax.model import image_size
from convit_jax.model.network import ConViT
from convit_jax.model.variants import options_of_kind, variant_of
from convit_jax.parallel import processes, sharding
from convit_jax.train import init_from, same_run, setup
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

# tfds declares ImageNet's 1,000 classes for these, of which only 200 have images. Their authors
# evaluate over these 200 (arXiv:1907.07174, arXiv:2006.16241).
_PARTIAL = ("imagenet_a", "imagenet_r")
_BATCH_A_DEVICE = 128  # most images a device; more are no faster and need memory


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user chose for an evaluation.

    Attributes:
      checkpoint: which checkpoint of a run to evaluate: "best" by top-1, "newest", or a step.
      ema: whether to evaluate the averaged weights; None means those of a run that has any, and of
        a file the weights that are not averaged.
      sizes: (height, width) in pixels of every evaluation; () is the model's own size.
      predictions: whether to write the predictions for every image.
    """

    checkpoint: str = "best"
    ema: bool | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    predictions: bool = False


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """An evaluation that is ready to run.

    Attributes:
      config: the configuration, see `convit_jax.recipe`.
      workdir: folder for the results; None writes no results.
      choices: what the user chose.
      mesh: mesh of all devices.
      loaded: the weights.
      models: one model for each image size; they are the same otherwise.
      source: the images.
      classes: the logit of each class of the images.
      share: the part of every global batch that this process reads.
      workers: number of processes that make batches.
    """

    config: ml_collections.ConfigDict
    workdir: Workdir | None
    choices: Choices
    mesh: Mesh
    loaded: Loaded
    models: tuple[ConViT, ...]
    source: Source
    classes: ClassMapping
    share: Share
    workers: int


def prepare(
    config: ml_collections.ConfigDict | None, workdir: Workdir | None, choices: Choices
) -> EvalRun:
    """Reads the weights and opens the data; compiles nothing.

    If the working directory holds a run, that run is evaluated. Otherwise the weights
    `config.init_from` are evaluated, on all images of class folders that nothing divides into
    splits: no run has held out some of them.

    Args:
      config: the configuration, see `convit_jax.recipe`; None is the configuration of the run.
      workdir: working directory, for the results; None writes no results.
      choices: what the user chose.

    Raises:
      ValueError: if there is nothing to evaluate, or weights, configuration and data do not fit.
      OSError: if weights or data are missing, or the working directory cannot be written.
      RuntimeError: if another process failed, or has another configuration or other data.
    """
    if choices.predictions and workdir is None:
        raise ValueError("--predictions: expected --workdir, the folder to write them into")
    mesh = sharding.make_mesh()
    config = config and config.copy_and_resolve_references()
    config, loaded, of_run = processes.on_all(lambda: _weights(config, workdir, choices))
    init_from.complete(config, loaded)
    fit_normalisation(config, loaded.model.in_channels)
    source = processes.on_all(lambda: setup.open_split(config, "test", workdir, whole=not of_run))
    settle_reading(config, source)
    data = {"test": Identity.of(source)}
    same_run.check_processes(config, data)
    if workdir is not None and of_run:
        for text in same_run.image_changes(workdir, data):
            log.info("changed since the run's last start: %s", text)
    model = setup.make_model(config, loaded.model.num_classes)
    _check_model(model, loaded, any_size=bool(choices.sizes))
    model.check_classifies(loaded.source)
    classes = _match_classes(config, loaded, source, workdir)
    check_fit(config, model, source, any_size=True, any_classes=True)
    _warn_of_other_preprocessing(config, loaded)
    # What is "auto" in the configuration is chosen for each size: it depends on the patches.
    count = loaded.model.num_classes
    models = tuple(setup.make_model(config, count, size=size) for size in choices.sizes) or (model,)
    if workdir is not None:
        processes.check_shared_folder(workdir.path)
    batch_size = _batch_size(config.train.batch_size or len(source), len(source), mesh.size)
    share = Share(batch_size, jax.process_index(), jax.process_count())
    return EvalRun(
        config=config,
        workdir=workdir,
        choices=choices,
        mesh=mesh,
        loaded=loaded,
        models=models,
        source=source,
        classes=classes,
        share=share,
        workers=num_workers(config.data.workers, source),
    )


def _weights(
    config: ml_collections.ConfigDict | None, workdir: Workdir | None, choices: Choices
) -> tuple[ml_collections.ConfigDict, Loaded, bool]:
    """Returns the configuration, the weights, and whether they are of the run in the workdir."""
    saved = same_run.config_of_run(workdir) if workdir else None
    if workdir is not None and saved is not None:
        if config is not None and config.init_from and config.init_from != saved.init_from:
            raise ValueError(
                f"init_from: {workdir} holds a run, which would be evaluated, not "
                f"{config.init_from}: choose another --workdir for the result"
            )
        if config is not None:
            same_run.keep_data_rules(saved, config)
        loaded = read_weights(workdir.path, ema=choices.ema, checkpoint=choices.checkpoint)
        return config or saved, loaded, True
    if config is None or not config.init_from:
        there = (
            f"{workdir} holds no run (config.json)" if workdir else "no --workdir of a run is given"
        )
        raise ValueError(
            f"nothing to evaluate: {there}, and no weights are named (--config.init_from=WEIGHTS)"
        )
    ema = choices.ema if choices.ema is not None else (config.init_ema or None)
    heads = init_from.stated_heads(config)
    return config, read_weights(config.init_from, ema=ema, heads_if_open=heads), False


def _check_model(model: ConViT, loaded: Loaded, any_size: bool) -> None:
    """Raises ValueError if model and weights differ; it names every key that differs."""
    found = loaded.model
    problems = []
    for key in options_of_kind("structure", "changeable", "function"):
        values = getattr(model, key), getattr(found, key)
        if key == "image_size":
            if any_size or not found.use_pos_embed:
                continue
            values = model.image_shape[:2], found.image_shape[:2]
        if values[0] != values[1]:
            said, has = (image_size.text(v) if key == "image_size" else v for v in values)
            problems.append(f"model.{key}: the configuration says {said}, the weights {has}")
            if key == "image_size":
                problems[-1] += f" (--eval_size={said} interpolates the position embedding)"
    if problems:
        variant = variant_of(found) or "none of the paper's"
        raise ValueError(
            f"the configuration's model is not that of {loaded.source}, which is {variant}:\n  "
            + "\n  ".join(problems)
            + ("\nWithout --config a run is evaluated with its own." if loaded.step else "")
        )


def _match_classes(
    config: ml_collections.ConfigDict, loaded: Loaded, source: Source, workdir: Workdir | None
) -> ClassMapping:
    """Returns the logit of each class of the data; raises ValueError for classes without one."""
    name, count = config.data.source, loaded.model.num_classes
    mapping = class_mapping.match(
        source.class_names,
        loaded.class_names,
        count,
        source=name,
        loaded=loaded.source,
        ordered=config.data.class_order != "sorted",
    )
    data_set = re.match(r"tfds:(\w+)", name)
    if data_set and data_set[1] in _PARTIAL:
        cache_dir = str(workdir.index) if workdir else None
        mapping = mapping.restrict(source.names_and_labels(cache_dir)[1])
    if data_set and data_set[1] == "imagenet2012_real":
        log.warning("%s: the labels are ImageNet's own; ReaL's labels are not read", name)
    if mapping.how != "by name" or not mapping.is_identity:
        log.info("classes: found %s", mapping.how)
    return mapping


def _warn_of_other_preprocessing(config: ml_collections.ConfigDict, loaded: Loaded) -> None:
    """Warns if the configuration normalises or crops images differently than the weights expect."""
    chosen = {
        "mean": ("data.mean", tuple(config.data.mean)),
        "std": ("data.std", tuple(config.data.std)),
        "crop_pct": ("augment.eval_crop", config.augment.eval_crop),
    }
    for field in dataclasses.fields(loaded):
        known = getattr(loaded, field.name)
        # Weights without this value have the default, so the default tells nothing.
        if field.name in chosen and known not in (field.default, chosen[field.name][1]):
            key, value = chosen[field.name]
            log.warning("%s is %s; %s says %s", key, value, loaded.source, known)


def _batch_size(wanted: int | None, num_images: int, devices: int) -> int:
    """Returns a batch size that is a multiple of the number of devices.

    The results do not depend on it, except for the order of sums.

    Args:
      wanted: train.batch_size, None if it is open.
      num_images: number of images to evaluate.
      devices: number of devices.
    """
    wanted = min(wanted or num_images, _BATCH_A_DEVICE * devices, num_images)
    return max(1, math.ceil(wanted / devices)) * devices
