"""Names of tensors in a state dict: removes prefixes, and recognises other models."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
import logging
import os
import re
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

# What wrappers insert into names: DistributedDataParallel and timm's average, torch.compile,
# FullyShardedDataParallel, and its checkpointing of activations.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Counts the steps of torch.optim.swa_utils.AveragedModel.
_COUNTER = "n_averaged"

# What is found in the names of other models, and what they are.
_OTHERS = {
    r"(^|\.)(dist_token|head_dist\.)": "a distilled DeiT (dist_token, head_dist), with a second "
    "token and head that this project does not have; load a DeiT without distillation instead",
    r"(\.gamma_[12]|\.ls[12]\.gamma)$": "a ViT with LayerScale (DeiT-III or CaiT), another model",
    r"embeddings\.cls_token|encoder\.layer\.0\.": "a model of transformers, whose names "
    "differ; take timm's file of the model",
    r"class_token$|encoder_layer_0\.": "a ViT of torchvision, which has other names and parts",
    r"lora_[AB]": "an adapter (LoRA); merge it into its model first",
    r"relative_position_bias_table$": "a model with tables of relative positions (Swin or BEiT)",
    r"(^|\.)reg(ister)?_tokens?$": "a ViT with register tokens",
    r"\.q_norm\.": "a ViT that normalises queries and keys",
    r"(^|\.)layer1\.0\.conv1\.": "a ResNet",
    r"(^|\.)exp_avg(_sq)?$|^param_groups": "the state of an optimiser",
}


def without_prefixes(source: str | os.PathLike, tensors: Mapping[str, T]) -> dict[str, T]:
    """Removes from names what wrappers and modules around the model put before them.

    What wrappers add ("module.", "_orig_mod.") is removed wherever it is, in any order. Then a
    prefix that all names share, such as "model." or "net.backbone.", is removed. Each is logged.

    Args:
      source: where the tensors are from, for messages.
      tensors: name -> tensor.

    Raises:
      ValueError: if two tensors have the same name without prefixes.
    """
    names = {name: _unwrapped(name) for name in tensors}
    parts = {part for name in names for part in name.split(".")} & _WRAPPERS
    if parts:
        names.pop(_COUNTER, None)
    prefix = _prefix(names.values())
    if all(name.startswith(prefix) for name in names.values()):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
        parts.add(prefix.removesuffix("."))
    twice = [short for short, number in Counter(names.values()).items() if number > 1]
    if twice:
        same = ", ".join(name for name, short in names.items() if short == twice[0])
        raise ValueError(f"expected one model, got the same name below several prefixes: {same}")
    removed = [f"{part}." for part in sorted(parts) if part]
    if removed:
        log.info("%s: removed from the names: %s", source, ", ".join(removed))
    return {short: tensors[name] for name, short in names.items()}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(names: Iterable[str]) -> str:
    """Returns what is before "cls_token", a name that every model has; "" if none has it."""
    class_token = next((name for name in names if name.endswith(".cls_token")), "cls_token")
    return class_token.removesuffix("cls_token")


def seems_to_be(names: Collection[str]) -> str | None:
    """Returns in a few words what the names seem to belong to, None if nothing known.

    Args:
      names: names of a state dict that is not one of a ConViT or DeiT.
    """
    for pattern, what in _OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            return what
    prefix = _prefix(names)
    number = sum(name.startswith(prefix) for name in names)
    if prefix:
        return f"a model among other things: {number} of {len(names)} names begin with {prefix!r}"
    return None
