"""config.json of a repository, in the form from which timm builds the model and its transform."""

from typing import Any

from convit_jax.model.network import ConViT
from convit_jax.model.variants import plain, structure_of, variant_of
from convit_jax.weights.loaded import Loaded

# Names of VARIANTS that timm has, and timm's names of them.
_TIMM = {
    "convit_tiny": "convit_tiny",
    "convit_small": "convit_small",
    "convit_base": "convit_base",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
}
# Options of structure that timm's classes have under the same name; its DeiT lacks the last two.
_ARGUMENTS = (
    "patch_size", "depth", "num_heads", "embed_dim", "mlp_ratio", "qkv_bias", "local_up_to_layer",
    "use_pos_embed",
)  # fmt: skip


def why_timm_cannot(model: ConViT) -> str | None:
    """Returns why timm has no class for a model; None if it has one."""
    squares = all(isinstance(plain(size), int) for size in (model.image_size, model.patch_size))
    if not model.cls_pos_embed and not squares:
        return "timm's ConViT takes square images and patches only"
    if model.qk_scale is not None:
        return "timm's classes have no qk_scale"
    if model.global_pool == "none":
        return "timm classifies one token or the mean of the patches"
    return None


def timm_config(loaded: Loaded) -> dict[str, Any]:
    """Returns the content of config.json.

    For a model that timm cannot build it has no "architecture" and no "model_args".
    """
    model = loaded.model
    config: dict[str, Any] = {}
    if why_timm_cannot(model) is None:
        config |= _architecture(model)
    config |= {
        "num_classes": model.num_classes,
        "num_features": model.embed_dim,
        "global_pool": model.global_pool,
        "pretrained_cfg": {
            "input_size": [model.in_channels, *model.image_shape[:2]],
            "fixed_input_size": model.use_pos_embed,
            "interpolation": "bicubic",
            "crop_mode": "center",
            "crop_pct": loaded.crop_pct,
            "mean": list(loaded.mean),
            "std": list(loaded.std),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if loaded.class_names is not None:
        config["label_names"] = list(loaded.class_names)
    return config


def _architecture(model: ConViT) -> dict[str, Any]:
    """Returns timm's name of the nearest model, and the arguments by which this one differs."""
    kind = "deit" if model.cls_pos_embed else "convit"
    names = [name for name in _TIMM if name.startswith(kind)]
    of_width = (n for n in names if structure_of(n)["embed_dim"] == model.embed_dim)
    name, changed = next(of_width, names[0]), dict[str, Any]()
    if variant_of(model) != name:
        changed = {key: plain(getattr(model, key)) for key in _ARGUMENTS}
        if model.cls_pos_embed:
            del changed["local_up_to_layer"], changed["use_pos_embed"]
        else:
            changed["embed_dim"] = model.embed_dim // model.num_heads  # timm's is that of a head
    if plain(model.image_size) != 224:
        changed["img_size"] = plain(model.image_size)
    if model.in_channels != 3:
        changed["in_chans"] = model.in_channels
    if model.global_pool != "token":
        changed["global_pool"] = model.global_pool
        if model.cls_pos_embed:
            changed["fc_norm"] = False  # the norm comes before the mean
    return {"architecture": _TIMM[name], **({"model_args": changed} if changed else {})}
