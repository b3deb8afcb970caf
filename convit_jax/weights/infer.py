"""The model that a set of weights belongs to, inferred from shapes and from stated options.

Names and shapes of the parameters determine nearly every option. They do not determine the number
of heads of a DeiT, which follows from the width in the paper's models only. They do not determine a
patch grid that is not a square either.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
from typing import Any

from convit_jax.model.image_size import pair
from convit_jax.model.network import ConViT
from convit_jax.model.variants import OPTIONS, VARIANTS, options_of_kind, plain, structure_of


@dataclasses.dataclass(frozen=True)
class Claim:
    """Options that a file or the caller states for the weights.

    Attributes:
      who: where the options come from, for messages.
      options: options of `ConViT`.
    """

    who: str
    options: Mapping[str, Any]


def model_of(
    params: Mapping[str, Any],
    stated: Claim | None = None,
    variant: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    heads_if_open: int | None = None,
) -> ConViT:
    """Returns the model that the parameters belong to.

    Args:
      params: Flax parameters, such as `from_torch` returns.
      stated: options that the file states.
      variant: name of `VARIANTS` that the caller states.
      overrides: options of `ConViT` that the caller states. Of the options of kind "changeable"
        only image_size is read, for a patch grid that the weights do not determine.
      heads_if_open: number of heads if neither the weights nor anything stated determines it; None
        means that of the paper's DeiT of the same width.

    Raises:
      ValueError: if a name is unknown, an option cannot be determined, or the weights contradict a
        stated option.
    """
    overrides = dict(overrides or {})
    _check_names("options", overrides)
    claims = [] if stated is None else [stated]
    if stated is not None:
        _check_names(stated.who, stated.options)
    kept = {k: v for k, v in overrides.items() if k not in options_of_kind("changeable")}
    if variant is not None:
        named = {k: v for k, v in structure_of(variant).items() if k not in kept}
        claims.append(Claim(f"variant={variant!r}", named))
    claims.append(Claim("the options given", kept))

    options = _seen(params)
    # If claims differ, the file's value is used here, and the others are reported below.
    known = {k: plain(v) for claim in reversed(claims) for k, v in claim.options.items()}
    options |= _patches(params, options, known, overrides.get("image_size"))
    if "mlp_ratio" in known and _hidden(options, known) == _hidden(options, options):
        options["mlp_ratio"] = known["mlp_ratio"]  # several ratios give the same hidden width
    if "num_heads" not in options:
        options["num_heads"] = (
            known.get("num_heads") or heads_if_open or _heads_of_width(options["embed_dim"])
        )
    problems = [
        f"{key}: {claim.who}: {plain(claim.options[key])}; the weights: {plain(options[key])}"
        for claim in claims
        for key in options_of_kind("structure", "changeable")
        if key in claim.options and plain(claim.options[key]) != plain(options[key])
    ]
    if problems:
        raise ValueError("the weights contradict what is stated:\n  " + "\n  ".join(problems))
    rest = {k: v for k, v in known.items() if k not in options and k not in kept}
    return ConViT(**options, **rest)


def _seen(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that names and shapes of the parameters determine."""
    if "last_block" not in params:
        raise ValueError(f"parameters: expected last_block among them, got {', '.join(params)}")
    width = params["cls_token"].shape[-1]
    gpsa, plain, last = params.get("gpsa_blocks"), params.get("blocks"), params["last_block"]
    num_gpsa = len(gpsa["attn"]["gate"]) if gpsa else 0
    num_plain = len(plain["norm1"]["scale"]) if plain else 0
    hidden = last["mlp"]["fc1"]["kernel"].shape[-1]
    kernel = params["patch_embed"]["kernel"].shape
    options = {
        "embed_dim": width,
        "depth": num_gpsa + num_plain + 1,
        "local_up_to_layer": num_gpsa,
        "mlp_ratio": _ratio(hidden, width),
        "patch_size": kernel[0] if kernel[0] == kernel[1] else tuple(kernel[:2]),
        "in_channels": kernel[2],
        "qkv_bias": "bias" in last["attn"]["qkv"],
        "use_pos_embed": "pos_embed" in params,
        "num_classes": params["head"]["kernel"].shape[-1] if "head" in params else 0,
    }
    if gpsa:
        options["num_heads"] = gpsa["attn"]["gate"].shape[-1]
    return options


def _ratio(hidden: int, width: int) -> float:
    """Returns a ratio for which int(width * ratio), the model's rule, is the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _hidden(width_of: Mapping[str, Any], ratio_of: Mapping[str, Any]) -> int:
    return int(width_of["embed_dim"] * ratio_of["mlp_ratio"])


def _patches(
    params: Mapping[str, Any],
    seen: Mapping[str, Any],
    known: Mapping[str, Any],
    wanted: int | tuple[int, int] | None,
) -> dict[str, Any]:
    """Returns image_size and cls_pos_embed, from the number of position embeddings.

    Args:
      params: the parameters.
      seen: options that `_seen` returned.
      known: options stated for the weights.
      wanted: image size that the caller asks for. It is taken for the weights' own size if their
        patches do not form a square and it has their number of patches.
    """
    patch = pair(seen["patch_size"])
    if "pos_embed" not in params:  # the weights fit every image size
        size = known.get("image_size", (14 * patch[0], 14 * patch[1]))
        return {"image_size": plain(size), "cls_pos_embed": False}
    tokens = params["pos_embed"].shape[1]
    # Only a class token that enters at the first block has a position embedding.
    prefixes = (0,) if seen["local_up_to_layer"] else (0, 1)

    def candidates() -> Iterator[tuple[int, int]]:
        if "image_size" in known:
            yield pair(known["image_size"])
        for prefix in prefixes:
            side = math.isqrt(tokens - prefix)
            yield side * patch[0], side * patch[1]
        if wanted is not None:
            yield pair(wanted)

    for size in candidates():
        for prefix in prefixes:
            if (size[0] // patch[0]) * (size[1] // patch[1]) + prefix == tokens:
                return {"image_size": plain(size), "cls_pos_embed": bool(prefix)}
    raise ValueError(
        f"image_size: the {tokens} position embeddings form no square, and nothing states their "
        "grid. Give image_size=(height, width) as the model was trained; change to another size in "
        "a second step"
    )


def _heads_of_width(width: int) -> int:
    """Returns the number of heads of the paper's DeiT of this width."""
    deits = {name: options for name, options in VARIANTS.items() if name.startswith("deit")}
    heads = {options["num_heads"] for options in deits.values() if options["embed_dim"] == width}
    if len(heads) != 1:
        widths = ", ".join(f"{name} {options['embed_dim']}" for name, options in deits.items())
        raise ValueError(
            f"num_heads: no shape tells it for a model without GPSA, and a width of {width} is "
            f"none of the paper's ({widths}): give num_heads=N"
        )
    return heads.pop()


def _check_names(who: str, options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(
            f"{who}: expected options of ConViT, some of {', '.join(sorted(OPTIONS))}, got "
            f"{', '.join(unknown)}"
        )
