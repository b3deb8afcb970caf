"""Prepares a run: everything that can be checked before the first compilation is checked here."""

import dataclasses
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from convit_jax import recipe, storage
from convit_jax.data import fit
from convit_jax.data.batches.chunks import EvalChunks, Share, TrainChunks, draws_per_epoch
from convit_jax.data.batches.workers import num_workers, warn_of_small_chunks
from convit_jax.data.identity import Identity
from convit_jax.data.images import transforms
from convit_jax.data.open import SPLITS, open_source
from convit_jax.data.source import Source
from convit_jax.model import image_size
from convit_jax.model.network import ConViT
from convit_jax.model.variants import create_model
from convit_jax.parallel import processes, sharding
from convit_jax.train import distillation, forms, init_from, same_run
from convit_jax.train import teacher as teachers
from convit_jax.train.step import Program
from convit_jax.workdir.checkpoints import newest_step
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

# What train.batch_size=None means.
_LARGEST_FIT = 64  # images
_LEAST_STEPS = 8  # steps in an epoch


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
      workdir: the working directory.
      program: the training step and what it is made of.
      train_chunks: the images to train on.
      test_chunks: the images to evaluate on.
      workers: number of processes that make batches.
      data: the identity of each split.
      total_steps: number of steps of the whole run.
      steps_per_epoch: number of steps in an epoch, which may be a fraction.
      init_params: parameters to start from; None starts from random ones or from a checkpoint.
      profile: whether to trace a few steps.
    """

    workdir: Workdir
    program: Program
    train_chunks: TrainChunks
    test_chunks: EvalChunks
    workers: int
    data: dict[str, Identity]
    total_steps: int
    steps_per_epoch: float
    init_params: dict[str, Any] | None
    profile: bool = False

    @property
    def config(self) -> ml_collections.ConfigDict:
        return self.program.config


def make_model(
    config: ml_collections.ConfigDict,
    num_classes: int | None = None,
    backend: str | None = None,
    size: tuple[int, int] | None = None,
) -> ConViT:
    """Makes the model of `config.model`, in the precision of `config.train`.

    Every option that is "auto" is replaced by the choice for the backend.

    Args:
      config: the configuration, see `convit_jax.recipe`.
      num_classes: number of classes of the data, used if the configuration does not say.
      backend: "cpu", "gpu" or "tpu", where the model will run; None is JAX's default.
      size: (height, width) in pixels, in place of the configuration's.
    """
    backend = backend or jax.default_backend()
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "float32" if backend == "cpu" else "bfloat16"
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    options |= {name: value for name, value in config.model.items() if value is not None}
    if size is not None:
        options["image_size"] = size
    elif "image_size" in options:
        options["image_size"] = image_size.parse(options["image_size"], "model.image_size")
    model = create_model(
        options.pop("name", recipe.DEFAULT_MODEL),
        **options,
        dtype=jnp.dtype(dtype),
        remat=config.train.remat,
    )
    return forms.settle(model, backend)


def prepare(config: ml_collections.ConfigDict, workdir: Workdir, profile: bool = False) -> Run:
    """Checks a configuration, reads the weights to start from and opens the data; compiles nothing.

    Args:
      config: the configuration, see `convit_jax.recipe`.
      workdir: the working directory; made if missing.
      profile: whether to trace a few steps.

    Raises:
      ValueError: if the configuration is not valid, does not fit the data, or is not that of the
        run in the working directory, or if the data have other classes than the run.
      RuntimeError: if another process failed, or has another configuration or other data.
      FileNotFoundError: if the data or the weights are not found.
      OSError: if the working directory cannot be written.
    """
    recipe.check(config)
    config = config.copy_and_resolve_references()
    mesh = sharding.make_mesh(config.mesh.fsdp)
    loaded = processes.on_all(lambda: init_from.settle_model(config, workdir))
    model = make_model(config)
    model.check_classifies("training")
    fit.fit_normalisation(config, model.in_channels)
    make_transforms(config, model)  # raises its errors now
    teacher = processes.on_all(lambda: teachers.read(config))
    changed, sources, data = processes.on_all(lambda: _open_data(config, workdir, model, mesh))
    same_run.check_processes(config, data)
    train_source, test_source = sources
    train_transform, eval_transform = make_transforms(config, model)  # the data settled the rest
    model = make_model(config, train_source.num_classes)
    steps_per_epoch, total_steps = number_of_steps(config, len(train_source))
    _check_finished(total_steps, workdir)
    distill = None
    if teacher is not None:
        distill = distillation.fit(teacher, config, model, train_source.class_names, mesh)
    program = Program.make(config, model, mesh, steps_per_epoch, total_steps, distill)
    program.augmentation  # noqa: B018  # made now, so that it raises its errors now
    init_params = None
    if loaded is not None:
        names = train_source.class_names
        init_params = processes.on_all(lambda: init_from.fit_params(config, model, loaded, names))
    share = Share(config.train.batch_size, jax.process_index(), jax.process_count())
    _warn_of_odd_values(config)
    processes.check_shared_folder(workdir.path)
    for text in changed:
        log.info("changed since the last start: %s", text)
    if same_run.config_of_run(workdir) is None:  # the batch size of a run may not change
        warn_of_small_chunks(share, mesh.size * config.train.accum_steps)
    return Run(
        workdir=workdir,
        program=program,
        train_chunks=TrainChunks(
            train_source,
            train_transform,
            share,
            seed=config.seed,
            repeats=config.data.repeats,
            skip_corrupt=config.data.skip_corrupt,
        ),
        test_chunks=EvalChunks(test_source, eval_transform, share, config.data.skip_corrupt),
        workers=num_workers(config.data.workers, train_source),
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        data=data,
        init_params=init_params,
        profile=profile,
    )


def _open_data(
    config: ml_collections.ConfigDict, workdir: Workdir, model: ConViT, mesh: Mesh
) -> tuple[list[str], list[Source], dict[str, Identity]]:
    """Opens both splits, and checks that they fit the configuration and the run in the workdir.

    What `config` leaves open is set: the batch size, and how images are read. So are the run's own
    rules of held-out images and of reading.

    Returns:
      What changed since the last start, the sources of both splits, and their identities.
    """
    workdir.check_writable()
    found = same_run.config_of_run(workdir)
    same_run.keep_data_rules(found, config)
    sources = [open_split(config, split, workdir) for split in SPLITS]
    fit.settle_reading(config, sources[0])
    if config.train.batch_size is None:
        config.train.batch_size = (
            found.train.batch_size if found else _fitting_batch(config, len(sources[0]), mesh)
        )
    data = {split: Identity.of(source) for split, source in zip(SPLITS, sources, strict=True)}
    changed = same_run.check_config(workdir, config, data)
    changed += same_run.check_data(workdir, data)
    fit.check_fit(config, model, sources[0])
    _check_batch(config, len(sources[0]), mesh)
    return changed, sources, data


def number_of_steps(config: ml_collections.ConfigDict, num_images: int) -> tuple[float, int]:
    """Returns the number of steps in an epoch, which may be a fraction, and in the whole run.

    Args:
      config: the configuration; its batch size must be set.
      num_images: number of training images.
    """
    steps_per_epoch = draws_per_epoch(num_images, config.data.repeats) / config.train.batch_size
    epochs = config.train.epochs * config.data.epochs_scale
    return steps_per_epoch, max(1, int(epochs * steps_per_epoch))


def _check_finished(total: int, workdir: Workdir) -> None:
    """Raises ValueError if the run has finished more than all its steps."""
    newest = newest_step(workdir.checkpoints)
    if newest is not None and newest > total:
        raise ValueError(
            f"train.epochs: expected at least the {newest} steps that {workdir} has finished, got "
            f"{total} steps"
        )


def use_compilation_cache(config: ml_collections.ConfigDict, workdir: Workdir | None) -> None:
    """Stores compiled programs in the folder `config.compilation_cache`, for later starts."""
    folder = config.compilation_cache
    if folder == "workdir":
        folder = os.fspath(workdir.compilation_cache) if workdir else ""
    # JAX has already read $JAX_COMPILATION_CACHE_DIR, which takes precedence.
    if folder and not jax.config.values["jax_compilation_cache_dir"]:
        path = storage.absolute(storage.as_path(folder))
        jax.config.update("jax_compilation_cache_dir", os.fspath(path))
        if storage.is_bucket(folder):  # XLA's own cache would become a local folder called "gs:"
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def make_transforms(
    config: ml_collections.ConfigDict, model: ConViT
) -> tuple[transforms.TrainTransform, transforms.EvalTransform]:
    """Makes the transforms that the host applies to images, in training and in evaluation."""
    size, options = model.image_shape[:2], config.augment.to_dict()
    crop_pct = options.pop("eval_crop")
    grey, reading = model.in_channels == 1, fit.reading(config)
    options |= {"crop_pct": crop_pct, "grey": grey, "reading": reading}
    train_transform = transforms.TrainTransform(size, **options)
    return train_transform, transforms.EvalTransform(size, crop_pct, grey, reading)


def open_split(
    config: ml_collections.ConfigDict, split: str, workdir: Workdir | None, whole: bool = False
) -> Source:
    """Opens the images of a split, "train" or "test"; stores indices in the working directory.

    If nothing divides the data into splits, a share of them is the test split; with `whole`, all.
    """
    return open_source(
        config.data.source,
        split,
        data_dir=config.data.dir,
        val_fraction=1.0 if whole else config.data.val_fraction,
        held_out=config.data.held_out,
        class_order=config.data.class_order,
        train_split=config.data.train_split,
        test_split=config.data.test_split,
        sampling_ratio=config.data.sampling_ratio if split == "train" else 1.0,
        cache_dir=str(workdir.index) if workdir else None,
        copy_dir=config.data.cache,
    )


def _fitting_batch(config: ml_collections.ConfigDict, num_images: int, mesh: Mesh) -> int:
    """Returns a batch size for a small data set, see train.batch_size in the recipe."""
    size = mesh.size * config.train.accum_steps
    while 2 * size <= _LARGEST_FIT and 2 * size * _LEAST_STEPS <= num_images:
        size *= 2
    log.info("train.batch_size: %d, to fit the %s training images", size, f"{num_images:,}")
    return size


def _check_batch(config: ml_collections.ConfigDict, num_images: int, mesh: Mesh) -> None:
    size, unit = config.train.batch_size, mesh.size * config.train.accum_steps
    if size > num_images >= unit:
        fits = unit << (num_images // unit).bit_length() - 1
        raise ValueError(
            f"train.batch_size: expected at most the {num_images:,} images of "
            f"{config.data.source}, got {size}: --config.train.batch_size={fits} fits"
        )
    if size > num_images:
        raise ValueError(
            f"data.source: expected at least {unit} images, one for each of the {mesh.size} "
            f"devices and {config.train.accum_steps} parts of a batch, got the {num_images} of "
            f"{config.data.source}"
        )
    sharding.check_batch_size(size, config.train.accum_steps, mesh)


def _warn_of_odd_values(config: ml_collections.ConfigDict) -> None:
    epochs, warmup = config.train.epochs * config.data.epochs_scale, config.optim.warmup_epochs
    if epochs <= warmup:
        log.warning(
            "the run ends within the warm-up of the learning rate: %g epochs of training, "
            "optim.warmup_epochs=%g",
            epochs, warmup,
        )  # fmt: skip
    if epochs <= config.optim.freeze_epochs:
        log.warning(
            "optim.freeze=%s stays frozen for the whole run: %g epochs of training, "
            "optim.freeze_epochs=%g",
            config.optim.freeze, epochs, config.optim.freeze_epochs,
        )  # fmt: skip
