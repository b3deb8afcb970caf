"""A run made ready: everything that can be checked before the first compilation is checked here."""

import dataclasses
import logging
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from convit_jax import (
    augment,
    checkpoint,
    data,
    distributed,
    fit,
    mixup,
    sharding,
    sources,
    weights,
    workdir,
)
from convit_jax.attention import choose_forms
from convit_jax.model import ConViT, create_model

log = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run works on."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    model: ConViT
    train_chunks: data.TrainChunks
    test_chunks: data.EvalChunks
    workers: int
    init_params: dict[str, Any] | None
    profile: bool = False

    @property
    def steps_per_epoch(self) -> float:
        draws = data.draws_per_epoch(len(self.train_chunks.source), self.train_chunks.repeats)
        return draws / self.config.train.batch_size

    @property
    def total_steps(self) -> int:
        epochs = self.config.train.epochs * self.config.data.epochs_scale
        return max(1, int(epochs * self.steps_per_epoch))


def make_model(
    config: ml_collections.ConfigDict,
    num_classes: int | None = None,
    backend: str | None = None,
) -> ConViT:
    """The model of `config.model`, in the precision of `config.train`; nothing is left to "auto".

    Args:
      config: see `configs/common.py`.
      num_classes: the data's, for a configuration that leaves it open.
      backend: that the model is to run on, "cpu", "gpu" or "tpu"; None is JAX's default.
    """
    if config.train.dtype not in _DTYPES:
        raise ValueError(f"train.dtype: expected one of {_DTYPES}, got {config.train.dtype!r}")
    backend = backend or jax.default_backend()
    dtype = config.train.dtype
    if dtype == "auto":
        dtype = "float32" if backend == "cpu" else "bfloat16"
    options = {} if num_classes is None else {"num_classes": num_classes}
    options |= {name: value for name, value in config.model.items() if value is not None}
    model = create_model(**options, dtype=jnp.dtype(dtype), remat=config.train.remat)
    attention, positional = choose_forms(
        model.attention, model.positional, math.prod(model.grid), model.attn_dropout, backend
    )
    return model.clone(attention=attention, positional=positional)


def prepare(config: ml_collections.ConfigDict, folder: str, profile: bool = False) -> Run:
    """Checks a configuration and opens what it names; compiles nothing.

    Args:
      config: see `configs/common.py`.
      folder: the working directory; made if missing.
      profile: whether to record a few steps.

    Raises:
      ValueError: if the configuration has no meaning, does not fit the data, or is not that of the
        run in the working directory.
      FileNotFoundError: if the data are not where they were looked for.
      OSError: if the working directory cannot be written.
    """
    _check_options(config)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch_size(config.train.batch_size, config.train.accum_steps, mesh)
    model = make_model(config)
    if config.model.num_classes == 0 or model.global_pool == "none":
        raise ValueError(
            "training needs one vector of logits an image: expected model.num_classes > 0 and "
            f"model.global_pool token or avg, got {model.num_classes} and {model.global_pool}"
        )
    train_transform, eval_transform = make_transforms(config, model)
    path = pathlib.Path(folder)
    changed = workdir.check(path, config)
    train_source, test_source = (
        open_source(config, split, cache_dir=str(path / "index")) for split in ("train", "test")
    )
    _check_data(config, model, train_source)
    model = make_model(config, train_source.num_classes)
    init_params = None
    newest = checkpoint.newest(path / "checkpoints")
    if config.init_from and newest is None:
        init_params = _init_params(config, model)
    path.mkdir(parents=True, exist_ok=True)
    distributed.check_shared_folder(path)
    for text in changed:
        log.info("changed since the last start: %s", text)

    share = data.Share(config.train.batch_size, jax.process_index(), jax.process_count())
    run = Run(
        config=config,
        workdir=path,
        mesh=mesh,
        model=model,
        train_chunks=data.TrainChunks(
            train_source,
            train_transform,
            share,
            seed=config.seed,
            repeats=config.data.repeats,
            skip_corrupt=config.data.skip_corrupt,
        ),
        test_chunks=data.EvalChunks(test_source, eval_transform, share),
        workers=data.num_workers(config.data.workers, train_source),
        init_params=init_params,
        profile=profile,
    )
    if newest is not None and newest > run.total_steps:
        raise ValueError(
            f"train.epochs: expected at least the {newest} steps that {path} has finished, got "
            f"{run.total_steps} steps"
        )
    return run


def _init_params(config: ml_collections.ConfigDict, model: ConViT) -> dict[str, Any]:
    """The weights of `config.init_from`, fitted to the model as the configuration allows."""
    # The heads of a DeiT are told by no shape: the model to be trained says what is expected.
    loaded = weights.read(config.init_from, ema=config.init_ema, num_heads=model.num_heads)
    for key in ("mean", "std"):
        if getattr(loaded, key) != tuple(config.data[key]):
            log.warning(
                "data.%s=%s is not what %s were made with, as far as is known: %s",
                key, config.data[key], config.init_from, getattr(loaded, key),
            )  # fmt: skip
    return fit.fit_params(
        loaded.params,
        model,
        new_head=config.init_new_head,
        resize_pos_embed=config.init_resize_pos_embed,
        adapt_channels=config.init_adapt_channels,
        seed=config.seed,
        grid=loaded.model.grid,
    )


def _check_options(config: ml_collections.ConfigDict) -> None:
    positive = ("train.epochs", "train.eval_every", "train.log_every", "train.accum_steps",
                "data.epochs_scale", "data.repeats", "optim.lr", "checkpoint.every",
                "checkpoint.keep")  # fmt: skip
    for key in positive:
        section, name = key.split(".")
        if config[section][name] <= 0:
            raise ValueError(f"{key}: expected more than 0, got {config[section][name]}")
    for key in ("optim.clip_norm", "optim.ema_decay", "optim.weight_decay"):
        section, name = key.split(".")
        if config[section][name] < 0:
            raise ValueError(f"{key}: expected 0 or more, got {config[section][name]}")
    if config.optim.ema_decay >= 1:
        raise ValueError(f"optim.ema_decay: expected less than 1, got {config.optim.ema_decay}")
    mixup.check_options(smoothing=config.train.label_smoothing, **config.mixup)


def use_compilation_cache(config: ml_collections.ConfigDict, path: pathlib.Path | None) -> None:
    """Keeps compiled programs where `config.compilation_cache` says, for later starts.

    `path` is the working directory, if there is one.
    """
    folder = config.compilation_cache
    if folder == "workdir":
        folder = str((path / "compilation_cache").resolve()) if path else ""
    if folder and not jax.config.jax_compilation_cache_dir:  # $JAX_COMPILATION_CACHE_DIR first
        jax.config.update("jax_compilation_cache_dir", folder)


def make_transforms(
    config: ml_collections.ConfigDict, model: ConViT
) -> tuple[augment.TrainTransform, augment.EvalTransform]:
    """What the host does to an image, in training and in evaluation."""
    size, options = model.image_shape[:2], config.augment.to_dict()
    crop_pct = options.pop("eval_crop")
    train_transform = augment.TrainTransform(size, crop_pct=crop_pct, **options)
    return train_transform, augment.EvalTransform(size, crop_pct=crop_pct)


def open_source(
    config: ml_collections.ConfigDict, split: str, cache_dir: str | None
) -> sources.Source:
    """The images of a split, "train" or "test", as `config.data` says."""
    return sources.open_source(
        config.data.source,
        split,
        data_dir=config.data.dir,
        val_fraction=config.data.val_fraction,
        sampling_ratio=config.data.sampling_ratio if split == "train" else 1.0,
        cache_dir=cache_dir,
    )


def _check_data(config: ml_collections.ConfigDict, model: ConViT, source: sources.Source) -> None:
    name, num_classes = config.data.source, config.model.num_classes
    if num_classes is not None and num_classes != source.num_classes:
        raise ValueError(
            f"model.num_classes: expected {source.num_classes} as in {name}, got {num_classes}"
        )
    image = source[0]["image"]
    if not isinstance(image, bytes) and image.shape != model.image_shape:
        raise ValueError(
            f"model.image_size and model.in_channels: expected {image.shape} (height, width, "
            f"channels) as in {name}, got {model.image_shape}"
        )
    if isinstance(image, bytes) and model.in_channels != 3:
        raise ValueError(f"model.in_channels: expected 3 for {name}, got {model.in_channels}")
    for key in ("mean", "std"):
        if len(config.data[key]) != model.in_channels:
            raise ValueError(
                f"data.{key}: expected {model.in_channels} values, got {config.data[key]}"
            )
    if len(source) < config.train.batch_size:
        raise ValueError(
            f"train.batch_size: expected at most the {len(source)} images of {name}, "
            f"got {config.train.batch_size}"
        )
