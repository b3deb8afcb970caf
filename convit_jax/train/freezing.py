"""Parameters that are not trained: `optim.freeze`, for the whole run or for its first epochs.

A frozen parameter keeps its bits: it has neither updates nor weight decay, and its average is kept
too. A parameter that is frozen for the whole run has no optimiser state and needs no gradient. A
parameter that is frozen for some epochs starts after them with fresh optimiser state.
"""

import dataclasses
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

log = logging.getLogger(__name__)

# Regular expressions of whole names. A name is a path in the tree, such as gpsa_blocks/attn/gate.
GROUPS = {
    "backbone": r"(?!head/).*",  # all but the head
    "gates": r"gpsa_blocks/attn/gate",
    "positional": r"gpsa_blocks/attn/pos_proj/.*",
    "gpsa": r"gpsa_blocks/attn/.*",  # attention of the GPSA layers: all of GPSA, no norms, no MLPs
}


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """Which parameters are frozen, and how long.

    Attributes:
      mask: tree of booleans with the structure of the parameters: True for those that are frozen.
      steps: number of steps after which they are trained; None freezes them for the whole run.
    """

    mask: Any
    steps: int | None

    def without_gradient(self, params: Any) -> Any:
        """Returns the parameters; no gradient is computed for those frozen for the whole run."""
        if self.steps is not None:
            return params
        return jax.tree.map(lambda f, p: jax.lax.stop_gradient(p) if f else p, self.mask, params)

    def gradients(self, step: jax.Array, grads: Any) -> Any:
        """Returns the gradients of a step, with zeros for frozen parameters."""
        return self.kept(step, jax.tree.map(jnp.zeros_like, grads), grads)

    def kept(self, step: jax.Array, old: Any, new: Any) -> Any:
        """Returns `new`, but `old` for frozen parameters; both have the parameters' structure."""

        def choose(frozen: bool, old: jax.Array, new: jax.Array) -> jax.Array:
            if not frozen:
                return new
            return old if self.steps is None else jnp.where(step < self.steps, old, new)

        return jax.tree.map(choose, self.mask, old, new)

    def optimizer(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns an optimiser that is `inner` for each parameter from its first update on."""
        always = optax.masked(inner, jax.tree.map(lambda f: not f, self.mask))
        if self.steps is None:
            return always
        later = optax.conditionally_mask(inner, lambda step: step >= self.steps)
        return optax.chain(always, optax.masked(later, self.mask))


def find(freeze: str, params: Any, steps: int | None) -> Frozen:
    """Finds the parameters that `optim.freeze` names, and logs how many there are.

    Args:
      freeze: names of `GROUPS` and regular expressions of whole names, separated by commas.
      params: the parameters, or their shapes.
      steps: see `Frozen`.

    Raises:
      ValueError: if a part of `freeze` matches no parameter, or nothing is left to train.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    mask = [False] * len(names)
    for part in (part.strip() for part in freeze.split(",")):
        try:
            matches = [bool(re.fullmatch(GROUPS.get(part, part), name)) for name in names]
        except re.error as error:
            raise ValueError(
                f"optim.freeze: {part!r} is not a regular expression: {error}"
            ) from None
        if not any(matches):
            raise ValueError(
                f"optim.freeze: {part!r} matches no parameter; expected one of "
                f"{', '.join(GROUPS)}, or a regular expression of whole names among "
                f"{', '.join(names)}"
            )
        mask = [a or b for a, b in zip(mask, matches, strict=True)]
    if all(mask):
        raise ValueError(f"optim.freeze: {freeze!r} leaves no parameter to train")
    sizes = [leaf.size for _, leaf in leaves]
    log.info(
        "frozen for %s: %s of %s parameters (optim.freeze=%s)",
        "the whole run" if steps is None else f"the first {steps} steps",
        f"{sum(size for size, f in zip(sizes, mask, strict=True) if f):,}",
        f"{sum(sizes):,}",
        freeze,
    )
    return Frozen(jax.tree.unflatten(tree, mask), steps)
