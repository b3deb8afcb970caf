"""The weights of `init_from`: what they decide about a model, and the parameters to start from.

The weights decide every option of the model that the configuration leaves open. What the
configuration states must agree with them, or be one of the changes that it allows.
"""

import logging
from typing import Any

import ml_collections

from convit_jax import recipe
from convit_jax.data import class_mapping
from convit_jax.model import image_size
from convit_jax.model.network import ConViT
from convit_jax.model.normalise import of_channels
from convit_jax.model.variants import (
    VARIANTS,
    default_of,
    options_of_kind,
    plain,
    structure_of,
    variant_of,
)
from convit_jax.train import same_run
from convit_jax.weights import adapt
from convit_jax.weights.load import read_weights
from convit_jax.weights.loaded import Loaded
from convit_jax.workdir.checkpoints import newest_step
from convit_jax.workdir.folder import Workdir

log = logging.getLogger(__name__)

# Options that the weights or the run decide where they are open. The data decide num_classes.
_DECIDED = tuple(
    name for name in options_of_kind("structure", "changeable", "function") if name != "num_classes"
)

# Options of the initialisation.
_OF_RANDOM_WEIGHTS = ("locality_strength", "use_local_init", "gate_init")


def settle_model(config: ml_collections.ConfigDict, workdir: Workdir) -> Loaded | None:
    """Decides the model of a run: fills in the keys that the configuration leaves open.

    With weights to start from, a run that has started keeps its model.

    Args:
      config: the configuration, see `convit_jax.recipe`; its section `model` is changed.
      workdir: the working directory.

    Returns:
      The weights to start from; None if the run starts from random ones or from a checkpoint.

    Raises:
      ValueError: if the weights contradict what the configuration states.
      OSError: if the weights cannot be read.
    """
    found = same_run.config_of_run(workdir)
    if config.init_from and found is not None:
        for key in ("name", *_DECIDED):
            if config.model[key] is None:
                config.model[key] = found.model[key]
        if newest_step(workdir.checkpoints) is not None:
            return None
    return settle_new_model(config)


def settle_new_model(config: ml_collections.ConfigDict) -> Loaded | None:
    """Fills in the model's open keys, from `init_from` or from the recipe.

    Returns the weights of `init_from`, None without them. Raises the errors of `settle_model`.
    """
    if not config.init_from:
        if config.model.name is None:
            config.model.name = recipe.DEFAULT_MODEL
        if config.model.image_size is None:
            config.model.image_size = recipe.KEYS["model.image_size"].default
        return None
    loaded = read_weights(config.init_from, ema=config.init_ema, heads_if_open=stated_heads(config))
    complete(config, loaded)
    _check_structure(config, loaded)
    for key in _OF_RANDOM_WEIGHTS:
        if config.model[key] is not None:
            log.warning(
                "model.%s=%s changes nothing: it is an option of random weights, and init_from=%s "
                "has others",
                key, config.model[key], config.init_from,
            )  # fmt: skip
    return loaded


def stated_heads(config: ml_collections.ConfigDict) -> int | None:
    """Returns the number of heads that a configuration states; None if it leaves it open."""
    name, heads = config.model.name, config.model.num_heads
    return heads or (None if name is None else VARIANTS[name]["num_heads"])


def complete(config: ml_collections.ConfigDict, loaded: Loaded) -> None:
    """Fills in the model's open keys from weights, and logs them in one line.

    Args:
      config: the configuration; its section `model` is changed.
      loaded: the weights.

    Raises:
      ValueError: if a configuration cannot express an option of the weights.
    """
    values = {key: plain(getattr(loaded.model, key)) for key in _DECIDED}
    values = {key: value for key, value in values.items() if value != default_of(key)}
    size = loaded.model.image_shape[:2]
    values["image_size"] = size[0] if size[0] == size[1] else image_size.text(size)
    if config.model.name is not None or (name := variant_of(loaded.model)) is not None:
        for key in options_of_kind("structure"):
            values.pop(key, None)  # the name decides them
        if config.model.name is None:
            values["name"] = name
    else:
        values |= {key: plain(getattr(loaded.model, key)) for key in options_of_kind("structure")}
    taken = {key: value for key, value in values.items() if config.model[key] is None}
    for key, value in taken.items():
        if key == "patch_size" and not isinstance(value, int):
            raise ValueError(
                f"model.patch_size: expected weights of square patches, got {value} in "
                f"{loaded.source}"
            )
        config.model[key] = value
    if taken:
        text = ", ".join(f"model.{key}={value}" for key, value in sorted(taken.items()))
        log.info("taken from %s: %s", loaded.source, text)


def _check_structure(config: ml_collections.ConfigDict, loaded: Loaded) -> None:
    """Raises ValueError if the configuration states another structure than the weights have."""
    name, found = config.model.name, loaded.model
    by_name = {} if name is None else structure_of(name)
    problems = []
    for key in options_of_kind("structure"):
        stated, has = config.model[key], plain(getattr(found, key))
        value = by_name.get(key, has) if stated is None else stated
        same = value == has
        if key == "mlp_ratio":  # several ratios give the same hidden width
            same = int(found.embed_dim * value) == int(found.embed_dim * has)
        if not same:
            source = f" (by model.name={name})" if stated is None else ""
            problems.append(
                f"model.{key}: the configuration says {value}{source}, the weights {has}"
            )
    if problems:
        variant = variant_of(found)
        named = "" if variant is None else f", or set model.name={variant}"
        raise ValueError(
            f"init_from: the configuration's model is not that of {loaded.source}: leave these "
            "keys and model.name open, as configs/finetune.py does, and the weights decide"
            f"{named}\n  " + "\n  ".join(problems)
        )
    for key in options_of_kind("function"):
        stated, has = config.model[key], getattr(found, key)
        if stated is not None and stated != has:
            log.warning("model.%s=%s, but %s have %s", key, stated, loaded.source, has)


def fit_params(
    config: ml_collections.ConfigDict,
    model: ConViT,
    loaded: Loaded,
    class_names: tuple[str, ...],
) -> dict[str, Any]:
    """Fits the weights of `init_from` to the model to train, as far as the configuration allows.

    Args:
      config: the configuration.
      model: the model to train.
      loaded: the weights.
      class_names: classes of the data.

    Raises:
      ValueError: names every parameter whose shape is not the model's.
    """
    for key in ("mean", "std"):
        expected = of_channels(getattr(loaded, key), model.in_channels)
        if expected != tuple(config.data[key]):
            log.warning(
                "data.%s=%s, but %s were probably trained with %s",
                key, config.data[key], config.init_from, expected,
            )  # fmt: skip
    if not config.init_new_head and not class_mapping.are_same(
        class_names, loaded.class_names, loaded.model.num_classes
    ):
        log.warning(
            "the head of %s is kept, but its classes are not those of %s in the same order: "
            "init_new_head=True makes a new head",
            config.init_from, config.data.source,
        )  # fmt: skip
    return adapt.fit_params(
        loaded.params,
        model,
        new_head=config.init_new_head,
        resize_pos_embed=config.init_resize_pos_embed,
        adapt_channels=config.init_adapt_channels,
        seed=config.seed,
        grid=loaded.model.grid,
    )
