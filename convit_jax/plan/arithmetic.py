"""Arithmetic of a traced program: FLOPs of its matrix products, with the turns of its loops.

The trace has every product of the forward and backward pass and those that rematerialisation
repeats. Products that nothing uses are left out. Loops of a known length count as often as they
run, others once. Kernels (Pallas) count as what their author states.
"""

import collections
from collections.abc import Iterator
import dataclasses
import math
from typing import Any

# Operations that contain matrix products which the trace does not show.
_OPAQUE = (
    "conv_general_dilated", "ragged_dot", "ffi_call", "dot_product_attention", "call_exported",
)  # fmt: skip


@dataclasses.dataclass
class Arithmetic:
    """What a program computes.

    Attributes:
      flops: FLOPs of all matrix products; a multiplication and its addition count as two.
      kernels: number of kernels that run and state their FLOPs.
      uncounted: {operation: how often it runs} of those that do not state their FLOPs.
    """

    flops: float = 0.0
    kernels: int = 0
    uncounted: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Arithmetic", times: int) -> None:
        """Adds what runs a number of times."""
        self.flops += other.flops * times
        self.kernels += other.kernels * times
        for name, count in other.uncounted.items():
            self.uncounted[name] += count * times


def of_jaxpr(jaxpr: Any) -> Arithmetic:
    """Counts the arithmetic of a program, over all of its devices.

    Args:
      jaxpr: the program, such as `jax.jit(f).trace(...).jaxpr`.
    """
    found = Arithmetic()
    for equation in _used(getattr(jaxpr, "jaxpr", jaxpr)):
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            found.flops += _product_flops(equation)
        elif name == "pallas_call":
            _add_kernel(found, params)
        elif name.startswith(_OPAQUE):
            found.uncounted[name] += 1
        elif name == "cond":  # one branch runs: the largest is an upper bound
            found.add(max(map(of_jaxpr, params["branches"]), key=lambda a: a.flops), 1)
        else:
            times = params["length"] if name == "scan" else 1
            times *= params["mesh"].size if name == "shard_map" else 1
            for inner in _programs(params):
                found.add(of_jaxpr(inner), times)
    return found


def _used(jaxpr: Any) -> list[Any]:
    """Returns the operations of a program whose results are used: the compiler drops the others.

    Rematerialisation traces the forward kernel of attention again, whose result is kept.
    """
    wanted = {id(value) for value in jaxpr.outvars}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(id(value) in wanted for value in equation.outvars):
            kept.append(equation)
            wanted |= {id(value) for value in equation.invars}
    return kept[::-1]


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs among the parameters of an operation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield item


def _product_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _add_kernel(found: Arithmetic, params: dict[str, Any]) -> None:
    estimate = params.get("cost_estimate")
    if estimate is None:
        found.uncounted["pallas_call"] += 1
    else:
        found.kernels += 1
        found.flops += estimate.flops
