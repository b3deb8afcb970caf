"""Conversion between PyTorch state dicts of ConViT and DeiT and Flax parameters, by one table.

The names on the PyTorch side are those of facebookresearch/convit, facebookresearch/deit and
timm, which agree. On the Flax side the blocks of a group are stacked along a leading layer axis;
the last block is on its own (see `convit_jax.model.network`). `from_torch` stacks the blocks, and
`to_torch` splits them.
"""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
import re
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from convit_jax.weights.names import seems_to_be

Shape = tuple[str | int, ...]
_SHOWN = 10  # names of each kind in an error

# Transpositions from PyTorch's order of the axes to Flax's.
_CONV_AXES = (2, 3, 1, 0)  # (out, in, height, width) -> (height, width, in, out)
_LINEAR_AXES = (1, 0)  # (out, in) -> (in, out)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of parameter: its name on both sides and its shape in PyTorch.

    Attributes:
      torch: name in a state dict; for a block, after "blocks.NUMBER.".
      flax: path in the Flax parameters; for a block, below the name of the group.
      shape: shape in PyTorch. A letter or word names a size, which is the same in all rows; "2D"
        is twice D.
      axes: transposition of PyTorch's axes to Flax's order; None means the same order.
      feature: an optional part of a model. A model has all rows of a feature or none.
    """

    torch: str
    flax: str
    shape: Shape
    axes: tuple[int, ...] | None = None
    feature: str | None = None


def _linear(
    torch: str, flax: str, out: str | int, in_: str | int, bias: str | None = None
) -> tuple[Row, ...]:
    """Returns the rows of a linear layer; `bias` is the feature that its bias belongs to."""
    return (
        Row(f"{torch}.weight", f"{flax}/kernel", (out, in_), _LINEAR_AXES),
        Row(f"{torch}.bias", f"{flax}/bias", (out,), feature=bias),
    )


def _norm(torch: str, flax: str) -> tuple[Row, ...]:
    return (
        Row(f"{torch}.weight", f"{flax}/scale", ("D",)),
        Row(f"{torch}.bias", f"{flax}/bias", ("D",)),
    )


def _block(*attention: Row) -> tuple[Row, ...]:
    return (
        *_norm("norm1", "norm1"),
        *attention,
        *_norm("norm2", "norm2"),
        *_linear("mlp.fc1", "mlp/fc1", "M", "D"),
        *_linear("mlp.fc2", "mlp/fc2", "D", "M"),
    )


# Shapes: D width, H heads, M hidden width of the MLPs. The rows are in PyTorch's order, so that
# `to_torch` returns the keys in the order of a saved state dict.
STEM = (
    Row("cls_token", "cls_token", (1, 1, "D")),
    Row("pos_embed", "pos_embed", (1, "tokens", "D"), feature="pos_embed"),
    Row("patch_embed.proj.weight", "patch_embed/kernel", ("D", "in", "h", "w"), _CONV_AXES),
    Row("patch_embed.proj.bias", "patch_embed/bias", ("D",)),
)
BLOCKS = {
    "gpsa_blocks": _block(
        Row("attn.gating_param", "attn/gate", ("H",)),
        *_linear("attn.qk", "attn/qk", "2D", "D", bias="qkv_bias"),
        *_linear("attn.v", "attn/v", "D", "D", bias="qkv_bias"),
        *_linear("attn.proj", "attn/proj", "D", "D"),
        *_linear("attn.pos_proj", "attn/pos_proj", "H", 3),
    ),
    "blocks": _block(
        *_linear("attn.qkv", "attn/qkv", "3D", "D", bias="qkv_bias"),
        *_linear("attn.proj", "attn/proj", "D", "D"),
    ),
}
HEAD = (
    *_norm("norm", "norm"),
    Row("head.weight", "head/kernel", ("classes", "D"), _LINEAR_AXES, feature="head"),
    Row("head.bias", "head/bias", ("classes",), feature="head"),
)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A row of the table in a certain model: one Flax parameter and its PyTorch tensors.

    Attributes:
      row: the row of the table.
      flax: full path of the Flax parameter.
      torch: names of the PyTorch tensors, one for each layer.
      stacked: whether the Flax parameter has a leading layer axis.
    """

    row: Row
    flax: str
    torch: tuple[str, ...]
    stacked: bool

    def flax_shape(self) -> Shape:
        shape = self.row.shape
        if self.row.axes:
            shape = tuple(shape[axis] for axis in self.row.axes)
        return (len(self.torch), *shape) if self.stacked else shape


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a PyTorch state dict of ConViT or DeiT to Flax parameters.

    Args:
      state_dict: name -> torch tensor or array, with the names of facebookresearch/convit,
        facebookresearch/deit and timm. The constants `rel_indices` of old checkpoints are
        ignored, since they contain no weights.

    Returns:
      A nested dictionary of float32 numpy arrays for `model.apply({"params": ...}, images)`. The
      arrays are copies.

    Raises:
      ValueError: names the keys that are missing, not known, of another shape, or not of
        floating-point numbers.
    """
    tensors = {k: v for k, v in state_dict.items() if not k.endswith(".rel_indices")}
    # A block has several tensors, so its number is below their number. Others are not known.
    numbers = {
        k: number
        for k in tensors
        if (m := re.match(r"blocks\.(\d{1,9})\.", k)) and (number := int(m[1])) < len(tensors)
    }
    gated = [number for k, number in numbers.items() if k.endswith("attn.gating_param")]
    num_gpsa = max(gated, default=-1) + 1
    depth = max(numbers.values(), default=-1) + 1
    entries = list(_entries(num_gpsa, depth - num_gpsa))

    expected = [(name, e.row.shape, e.row.feature) for e in entries for name in e.torch]
    _check("state dict", {k: tuple(v.shape) for k, v in tensors.items()}, expected)

    params = {}
    for entry in entries:
        if entry.torch[0] not in tensors:
            continue  # a feature that this model lacks
        arrays = [_to_numpy(tensors[name], name) for name in entry.torch]
        if entry.row.axes:
            arrays = [array.transpose(entry.row.axes) for array in arrays]
        params[entry.flax] = np.stack(arrays) if entry.stacked else np.array(arrays[0], order="C")
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts Flax parameters to a PyTorch state dict; the inverse of `from_torch`, to the bit.

    Args:
      params: nested dictionary of arrays, `variables["params"]`.

    Returns:
      name -> float32 numpy array. To load it in PyTorch:
      `model.load_state_dict({k: torch.from_numpy(v) for k, v in to_torch(params).items()})`.

    Raises:
      ValueError: names the parameters that are missing, not known, or of another shape.
    """
    if set(params) == {"params"}:
        raise ValueError("expected parameters, got variables: pass variables['params']")
    arrays = traverse_util.flatten_dict(params, sep="/")
    arrays = {path: _to_numpy(array, path) for path, array in arrays.items()}
    norms = (arrays.get(f"{group}/norm1/scale", np.empty((0,))) for group in BLOCKS)
    num_gpsa, num_plain = (len(norm) for norm in norms)
    entries = list(_entries(num_gpsa, num_plain + 1))

    expected = [(e.flax, e.flax_shape(), e.row.feature) for e in entries]
    _check("parameters", {path: array.shape for path, array in arrays.items()}, expected)

    state_dict = {}
    for entry in entries:
        if entry.flax not in arrays:
            continue  # a feature that this model lacks
        layers = arrays[entry.flax] if entry.stacked else arrays[entry.flax][None]
        for name, array in zip(entry.torch, layers, strict=True):
            if entry.row.axes:
                array = array.transpose(np.argsort(entry.row.axes))
            state_dict[name] = np.array(array, order="C")
    return state_dict


def _entries(num_gpsa: int, num_plain: int) -> Iterator[_Entry]:
    """Yields the table's entries for a model with these numbers of blocks, the last one plain."""
    # Every model ends in a plain block. If the weights have none, `_check` reports it as missing.
    depth = num_gpsa + max(num_plain, 1)
    for row in STEM:
        yield _Entry(row, row.flax, (row.torch,), stacked=False)
    groups = {"gpsa_blocks": range(num_gpsa), "blocks": range(num_gpsa, depth - 1)}
    for group, numbers in groups.items():
        for row in BLOCKS[group] if numbers else ():
            names = tuple(f"blocks.{number}.{row.torch}" for number in numbers)
            yield _Entry(row, f"{group}/{row.flax}", names, stacked=True)
    for row in BLOCKS["blocks"]:
        name = f"blocks.{depth - 1}.{row.torch}"
        yield _Entry(row, f"last_block/{row.flax}", (name,), stacked=False)
    for row in HEAD:
        yield _Entry(row, row.flax, (row.torch,), stacked=False)


def _check(
    what: str,
    found: Mapping[str, tuple[int, ...]],
    expected: list[tuple[str, Shape, str | None]],
) -> None:
    """Raises ValueError if names are missing, unknown, or of an unexpected shape.

    The first line says what the names seem to belong to. Then come the first names of each kind.
    """
    features = {feature for name, _, feature in expected if name in found}
    sizes = _sizes(found, expected)
    problems: dict[str, list[str]] = {"missing": [], "not known": [], "wrong shape": []}
    for name, shape, feature in expected:
        shape = tuple(sizes.get(n, n) if isinstance(n, str) else n for n in shape)
        if name in found and found[name] != shape:
            problems["wrong shape"].append(f"{name}: expected {shape}, got {found[name]}")
        elif name not in found and (feature is None or feature in features):
            problems["missing"].append(f"{name} {shape}")
    unknown = found.keys() - {name for name, _, _ in expected}
    problems["not known"] = [f"{name} {found[name]}" for name in sorted(unknown)]
    if not any(problems.values()):
        return
    seems = seems_to_be(found)
    lines = [f"not the {what} of a ConViT or DeiT{f'; it seems to be {seems}' if seems else ''}:"]
    for kind, all_of_it in problems.items():
        lines += [f"  {kind}: {problem}" for problem in all_of_it[:_SHOWN]]
        if len(all_of_it) > _SHOWN:
            lines.append(f"  {kind}: {len(all_of_it) - _SHOWN} more")
    raise ValueError("\n".join(lines))


def _sizes(
    found: Mapping[str, tuple[int, ...]], expected: list[tuple[str, Shape, str | None]]
) -> dict[str, int]:
    """Returns the size of each letter of the table: the size that most arrays agree on."""
    votes: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for name, shape, _ in expected:
        if len(found.get(name, ())) == len(shape):
            for letter, size in zip(shape, found[name], strict=True):
                if isinstance(letter, str):
                    votes[letter][size] += 1
    sizes = {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}
    return sizes | {f"{times}D": times * sizes["D"] for times in (2, 3) if "D" in sizes}


def _to_numpy(array: Any, name: str) -> np.ndarray:
    """Converts a torch tensor, jax array or numpy array to numpy float32.

    The conversion of float16 and bfloat16 is exact.

    Raises:
      ValueError: if the numbers are no floating-point numbers.
    """
    torch_tensor = hasattr(array, "detach")
    if not torch_tensor:
        array = np.asarray(array)
    floating = (
        array.is_floating_point() if torch_tensor else jnp.issubdtype(array.dtype, jnp.floating)
    )
    if not floating:
        raise ValueError(f"{name}: expected floating-point numbers, got {array.dtype}")
    if torch_tensor:  # torch cannot convert bfloat16 to numpy
        array = array.detach().cpu().float().numpy()
    return np.asarray(array, dtype=np.float32)
