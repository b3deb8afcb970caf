"""What a forward pass returns besides the logits, and what may be added to it on the way.

Shapes: B batch, N patches, D width, R and C rows and columns of patches.
"""

from collections.abc import Mapping, Sequence
import operator

import jax

Array = jax.Array


def check_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Returns the numbers of blocks, counted from 0; -1 is the last block.

    Raises:
      ValueError: if they are not a sequence, or the model has no such block.
    """
    valid = f"expected blocks 0 to {depth - 1}, or -{depth} to -1 from the last"
    if not isinstance(blocks, Sequence) or isinstance(blocks, str):
        raise ValueError(f"return_features: {valid}, in a tuple or list, got {blocks!r}")
    try:
        numbers = [operator.index(block) for block in blocks]
    except TypeError:
        raise ValueError(f"return_features: {valid}, got {blocks!r}") from None
    wrong = [number for number in numbers if not -depth <= number < depth]
    if wrong:
        raise ValueError(f"return_features: {valid}, got {', '.join(map(str, wrong))}")
    return tuple(number % depth for number in numbers)


def check_offsets(
    offsets: Mapping[str, Array] | None, layers: Mapping[str, int]
) -> Mapping[str, Array]:
    """Returns the attention offsets, {} for None.

    Args:
      offsets: `attention_offsets` of a model.
      layers: number of layers in each group of the model.

    Raises:
      ValueError: if the model has no such group, or another number of layers in it.
    """
    for group, offset in (offsets or {}).items():
        if group not in layers:
            raise ValueError(
                f"attention_offsets: expected some of {', '.join(layers)}, got {group!r}"
            )
        if offset.ndim != 5 or offset.shape[0] != layers[group]:
            raise ValueError(
                f"attention_offsets[{group!r}]: expected ({layers[group]}, batch, heads, queries, "
                f"keys), got {offset.shape}"
            )
    return offsets or {}


def feature_map(tokens: Array, grid: tuple[int, int]) -> Array:
    """Returns the patches as a map: (B, N, D) or (B, 1 + N, D) -> (B, R, C, D)."""
    rows, columns = grid
    patches = tokens[:, tokens.shape[1] - rows * columns :]
    return patches.reshape(tokens.shape[0], rows, columns, tokens.shape[2])
