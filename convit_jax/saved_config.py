"""The configuration of a run: as it is saved, read by later versions, and compared."""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from convit_jax.model import image_size
from convit_jax.recipe import KEYS, check, get_config

# Version of saved configurations. It grows when the form or meaning of a key changes, not when a
# key with a default is added. `from_json` reads every earlier version.
FORMAT_VERSION = 4


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns a configuration as JSON types, with the version of its format."""
    values = config.copy_and_resolve_references().to_dict()
    return {"format_version": FORMAT_VERSION, **values}


def from_json(saved: Mapping[str, Any], where: str) -> ml_collections.ConfigDict:
    """Returns the configuration of a run, saved by this version or an earlier one.

    A key that did not exist in the earlier version gets its default, or the value that stands for
    what the earlier version did.

    Args:
      saved: the content of a JSON file that was written from `to_json`.
      where: name of the file, for error messages.

    Raises:
      ValueError: if `saved` is not a configuration, or was saved by a later version.
    """
    values = dict(saved)
    version = values.pop("format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{where}: written by a later version of convit_jax (format {version}; this one reads "
            f"up to {FORMAT_VERSION}): install the later version"
        )
    config = get_config()
    try:
        for name, value in _leaves(values):
            _set(config, name, tuple(value) if isinstance(value, list) else value)
        if version < 3:  # earlier versions knew no other rule
            config.data.held_out = "spread"
        if version < 4:  # earlier versions read images by Pillow's convert("RGB")
            config.data.exif, config.data.alpha = False, "drop"
        size = config.model.image_size
        if version < 2 and isinstance(size, tuple):  # a tuple in version 1
            config.model.image_size = size[0] if size[0] == size[-1] else image_size.text(size)
        check(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not the configuration of a run: {error}") from None
    return config


def keep_division(saved: ml_collections.ConfigDict, config: ml_collections.ConfigDict) -> list[str]:
    """Gives a configuration the rule by which a run divides its data, so that no split changes.

    The configuration file of a run that an earlier version started does not name the rule.

    Args:
      saved: configuration of the run.
      config: configuration of the present start; its data.held_out is changed if it differs.

    Returns:
      A text about the change, if it matters to the data set.
    """
    rule, asked = saved.data.held_out, config.data.held_out
    if rule == asked:
        return []
    config.data.held_out = rule
    if not config.data.source.startswith("folder:"):
        return []  # their split does not depend on it
    return [f"data.held_out: {rule!r}, as the run has it, not {asked!r}: its splits stay the same"]


def keep_reading(saved: ml_collections.ConfigDict, config: ml_collections.ConfigDict) -> list[str]:
    """Gives a configuration the run's way to read images where it leaves that open.

    Args:
      saved: configuration of the run.
      config: configuration of the present start; data.exif and data.alpha are changed if None.

    Returns:
      A text about each change.
    """
    texts = []
    for key in ("exif", "alpha"):
        if config.data[key] is None and saved.data[key] is not None:
            config.data[key] = saved.data[key]
            texts.append(f"data.{key}: {saved.data[key]!r}, as the run has it")
    return texts


def changes_since(saved: Mapping[str, Any], config: ml_collections.ConfigDict) -> list[str]:
    """Describes what this version computes otherwise than the version that saved a run.

    Args:
      saved: saved configuration, as `from_json` takes it.
      config: configuration of the present start.
    """
    version, changes = saved.get("format_version", 1), []
    mixes = config.mixup.prob > 0 and max(config.mixup.mixup, config.mixup.cutmix) > 0
    if version < 2 and mixes:
        changes.append(
            "mixup.group_size: the run was saved with groups of consecutive images; now "
            "consecutive images are in different groups"
        )
    if version < 3 and config.augment.crop == "pad":
        changes.append(
            "augment.crop=pad: the random numbers of crops, flips and colours are others now; "
            "their distribution is the same"
        )
    if version < 4 and config.data.source.startswith("folder:"):
        changes.append(
            "grey images of more than 8 bits, if there are any: they were white where they were "
            "above 255 of 65,535; now they are scaled"
        )
        changes.append(
            "images of more than 178,956,970 pixels, if there are any: they are refused now, as "
            "corrupt ones"
        )
    return changes


def differences(
    saved: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> dict[str, str]:
    """Returns the keys that differ between two configurations, each with a text of both values."""
    there, now = values(saved), values(config)
    return {
        name: f"{name}: saved {there.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name)
    }


def values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns every key with its value; equal image sizes, such as 8 and "8x8", become equal."""
    values = dict(_leaves(config.to_dict()))
    if (size := config.model.image_size) is not None:
        values["model.image_size"] = image_size.text(image_size.parse(size, "model.image_size"))
    return values


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for leaf, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{leaf}.")
        else:
            yield f"{path}{leaf}", value


def _set(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
    if name not in KEYS:
        raise ValueError(f"unknown key: {name}")
    section, _, leaf = name.rpartition(".")
    (config[section] if section else config)[leaf] = value
