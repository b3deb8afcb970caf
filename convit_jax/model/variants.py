"""The paper's models by name, and the options of a model by kind."""

import dataclasses
from typing import Any

from convit_jax.model import image_size
from convit_jax.model.network import ConViT

# Sizes of ConViT and of the "+" models of DeiT: d'Ascoli et al. 2021, Table 1. Sizes of the other
# DeiT models: Touvron et al. 2021 (arXiv:2012.12877), Table 1. In a DeiT the class token enters at
# the input with a position embedding of its own, and q, k, v have biases (facebookresearch/deit).
_DEIT = {"local_up_to_layer": 0, "cls_pos_embed": True, "qkv_bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "convit_tiny": {"num_heads": 4, "embed_dim": 192},
    "convit_tiny_plus": {"num_heads": 4, "embed_dim": 256},
    "convit_small": {"num_heads": 9, "embed_dim": 432},
    "convit_small_plus": {"num_heads": 9, "embed_dim": 576},
    "convit_base": {"num_heads": 16, "embed_dim": 768},
    "convit_base_plus": {"num_heads": 16, "embed_dim": 1024},
    "deit_tiny": {"num_heads": 3, "embed_dim": 192, **_DEIT},
    "deit_tiny_plus": {"num_heads": 4, "embed_dim": 256, **_DEIT},
    "deit_small": {"num_heads": 6, "embed_dim": 384, **_DEIT},
    "deit_small_plus": {"num_heads": 9, "embed_dim": 576, **_DEIT},
    "deit_base": {"num_heads": 12, "embed_dim": 768, **_DEIT},
    "deit_base_plus": {"num_heads": 16, "embed_dim": 1024, **_DEIT},
}

_FIELDS = {f.name: f for f in dataclasses.fields(ConViT) if f.name not in ("name", "parent")}
OPTIONS = tuple(_FIELDS)


def options_of_kind(*kinds: str) -> tuple[str, ...]:
    """Returns the names of the options of `ConViT` of these kinds, in the order of its fields.

    The kinds are "structure", "changeable", "function", "training" and "computation". network.py
    explains them above `ConViT` and states the kind of each option beside its field.
    """
    return tuple(name for name, field in _FIELDS.items() if field.metadata["kind"] in kinds)


def default_of(option: str) -> Any:
    """Returns the default of an option of `ConViT`."""
    return _FIELDS[option].default


def create_model(variant: str, /, **overrides: Any) -> ConViT:
    """Returns one of the paper's models.

    Args:
      variant: a name of `VARIANTS`.
      **overrides: options of `ConViT`; they replace those of the variant. Inside a compact module,
        `name` names the model's parameters, as for every linen module.

    Raises:
      ValueError: if the name or an option is unknown, or the options do not fit together.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown model: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    unknown = sorted(set(overrides) - {*OPTIONS, "name"})
    if unknown:
        raise ValueError(
            f"unknown options of {variant}: expected some of {', '.join(sorted(OPTIONS))}, "
            f"got {', '.join(unknown)}"
        )
    return ConViT(**{**VARIANTS[variant], **overrides})


def structure_of(name: str) -> dict[str, Any]:
    """Returns the options of kind "structure" of one of the paper's models.

    Args:
      name: a name of `VARIANTS`.

    Raises:
      ValueError: if the name is unknown.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}")
    return {key: default_of(key) for key in options_of_kind("structure")} | VARIANTS[name]


def variant_of(model: ConViT) -> str | None:
    """Returns the name of the paper's model that has the structure of `model`, or None.

    Number of classes, image size and input channels may differ from the paper's.
    """
    structure = {key: plain(getattr(model, key)) for key in options_of_kind("structure")}
    return next((name for name in VARIANTS if structure == structure_of(name)), None)


def describe(model: ConViT) -> str:
    """Returns the variant, structure and sizes of a model as one line of text."""
    keys = options_of_kind("structure", "changeable")
    parts = [f"{key}={plain(getattr(model, key))}" for key in keys]
    return f"{variant_of(model) or 'none of the paper'}: {', '.join(parts)}"


def to_json(model: ConViT) -> dict[str, Any]:
    """Returns the options of a model as JSON types, without those of kind "computation"."""
    left_out = options_of_kind("computation")
    return {key: plain(getattr(model, key)) for key in sorted(OPTIONS) if key not in left_out}


def plain(value: Any) -> Any:
    """Returns an option's value in a form that can be compared.

    A pair of equal sizes becomes one number, and any other pair a tuple.
    """
    if isinstance(value, (list, tuple)):
        return image_size.single((value[0], value[1]))
    return value
