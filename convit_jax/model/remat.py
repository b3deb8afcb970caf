"""What a training step holds in memory between its forward and its backward pass.

With rematerialisation, the forward pass of a block stores a part of its arrays, and the backward
pass computes the rest again. Policies find what to keep by a tag or as the result of a matrix
product.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
Result = TypeVar("Result")

_KEPT = "kept"
_policies = jax.checkpoint_policies

# For each value of `remat` but "none". "dots" keeps the outputs of attention and of all products
# with weights. "mlp" computes the hidden layer of the MLP again. It saves four of the ten arrays
# that "dots" keeps of a block, each of the size of the block's input, and repeats a third of the
# block's forward products.
POLICIES = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(_KEPT)
    ),
    "mlp": _policies.save_only_these_names(_KEPT),
    "block": _policies.nothing_saveable,
}
REMAT = ("none", *POLICIES)


def keep(x: Array) -> Array:
    """Tags an array that every policy but "block" keeps."""
    return checkpoint_name(x, _KEPT)


def product_of_kept(x: Array, weights: Array, dimensions: Any, **options: Any) -> Array:
    """Computes `jax.lax.dot_general`, and keeps x.

    Rematerialisation rounds an array that it keeps and also uses (`reduce_precision`). That changes
    no value, but on TPU it copies the result of a kernel. Inside a jitted function JAX does not
    round.
    """

    def product(x: Array, weights: Array) -> Array:
        return jax.lax.dot_general(keep(x), weights, dimensions, **options)

    result: Array = jax.jit(product)(x, weights)
    return result


def finish_backward(
    model: nn.Module, names: Sequence[str], x: Array, function: Callable[[Any, Array], Result]
) -> Result:
    """Returns function(model, x), whose backward pass ends before that of the layers before begins.

    Otherwise TPU's compiler computes gradients of the weights as late as it can. What they are
    computed from then stays in memory during the backward pass of the layers before. Results and
    gradients are the same. On several devices these gradients are also reduced first. JAX before
    0.11 computes gradients of these weights even where they are frozen.

    Args:
      model: a module whose parameters are initialised.
      names: submodules that the function uses; those without parameters are left out.
      x: input of the function.
      function: applies submodules of a module.
    """
    tied: dict[str, Array] = {}

    def tie(variables: Mapping[str, Any]) -> dict[str, Any]:
        params = variables["params"]
        used = {name: params[name] for name in names if name in params}
        used, tied["x"] = jax.lax.optimization_barrier((used, x))  # both gradients, at one time
        return {"params": {**params, **used}}

    apply = nn.map_variables(lambda model: function(model, tied["x"]), "params", trans_in_fn=tie)
    result: Result = apply(model)
    return result
