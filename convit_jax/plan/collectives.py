"""What the devices send one another in a step of a compiled program, and what they should send."""

import dataclasses
import math
import re
from typing import Any

import jax

from convit_jax.model.network import ConViT
from convit_jax.plan.hlo import Array, Instruction, Program, arrays
from convit_jax.train.step import TrainState

_KINDS = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-\w+)(-start)?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation: something that devices send to one another in a step.

    Attributes:
      kind: name of the operation, such as "all-reduce".
      arrays: the whole arrays.
      turns: how often the operation runs in a step.
      source: where in the program it comes from.
      group: number of devices that take part in it together.
    """

    kind: str
    arrays: tuple[Array, ...]
    turns: int
    source: str
    group: int

    @property
    def bytes(self) -> int:
        """Bytes of the arrays, in all turns."""
        return self.turns * sum(array.bytes for array in self.arrays)

    @property
    def bytes_sent(self) -> float:
        """The least bytes that each device sends, in all turns.

        Of n devices, each sends (n - 1) / n of the arrays to gather, to scatter or to exchange
        them. A sum that all receive is a scatter and a gather (Patarasuk and Yuan 2009,
        doi:10.1016/j.jpdc.2008.09.002).
        """
        if self.kind.startswith("collective-"):  # from one device to another
            return self.bytes
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.group - 1) / self.group


def find(program: Program, devices: int) -> list[Collective]:
    """Finds all collectives of a compiled program, and counts the turns of loops.

    Args:
      program: the program.
      devices: number of devices that it runs on.
    """
    found: dict[str, Collective] = {}
    for computation, instruction, turns in program.runs(fused=True):
        if match := _KINDS.fullmatch(instruction.kind):
            group = _group_size(instruction) or devices
            collective = _read(computation, instruction, match[1], bool(match[2]), turns, group)
            channel = instruction.attribute("channel_id")
            key = channel or f"{computation} {instruction.name}"
            # A collective that overlaps with arithmetic appears once for each of its stages.
            if key not in found or found[key].turns < turns:
                found[key] = collective
    return list(found.values())


def _read(
    computation: str, instruction: Instruction, kind: str, is_start: bool, turns: int, group: int
) -> Collective:
    sent = arrays(instruction.type)
    if is_start and kind == "collective-permute":
        sent = sent[1:2]  # the types are (input, output, and two for synchronisation)
    elif is_start and kind == "all-gather":
        sent = sent[len(sent) // 2 :]  # the types are (inputs, outputs)
    if kind == "reduce-scatter":
        sent = [dataclasses.replace(array, shape=(group, *array.shape)) for array in sent]
    if computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # how TPU programs write it: each device keeps its part
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, tuple(sent), turns, source[1] if source else "", group)


def _group_size(instruction: Instruction) -> int | None:
    """Returns the number of devices that take part in a collective together; None means all.

    XLA writes groups as [GROUPS,SIZE]<=[...], as {{0,1},{2,3}}, or as axes of a mesh:
    mesh['a'=4,'b'=2] {'b'}, where 'a':(1)2 is a part of an axis, of size 2.
    """
    text = instruction.attributes
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"a compiled program: expected groups of devices in {text[:200]!r}")
    return None


def expected_sizes(state: TrainState, model: ConViT, teacher: Any = None) -> dict[str, set[int]]:
    """Returns {kind: numbers of elements of the arrays that a step should send}.

    Gradients, of all layers or of one layer, are reduced. The gradient of a layer's positional
    attention is reduced too, before the gradients of its few parameters are computed from it. Split
    parameters are gathered, those of a teacher too. Their parts are also sent around a ring while
    they are multiplied or while their gradients are computed.

    Args:
      state: shapes of the state.
      model: the model.
      teacher: shapes of a teacher's parameters; None without one.
    """
    reduced, gathered, parts = {1}, set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, teacher)):
        layers = leaf.shape[0] if path[1].key in ("gpsa_blocks", "blocks") else 1
        sizes = {leaf.size, leaf.size // layers}
        if path[0].idx == 0:  # a teacher has no gradients
            reduced |= sizes
        if not leaf.sharding.is_fully_replicated:
            gathered |= sizes
            part = math.prod(leaf.sharding.shard_shape(leaf.shape))
            parts |= {part, part // layers}
            reduced |= {part, part // layers} if path[0].idx == 0 else set()
    rows, columns = model.grid
    reduced |= {model.num_heads * n**2 for n in (rows, columns, rows * columns)}
    return {
        "all-reduce": reduced,
        "reduce-scatter": reduced,
        "all-gather": gathered,
        "collective-permute": parts,
    }


def unexpected(
    collectives: list[Collective], expected: dict[str, set[int]]
) -> list[tuple[str, str]]:
    """Returns what a step should not send: a list of (array, where it comes from)."""
    return [
        (f"{c.kind} of {array.dtype}[{array.size}]", c.source)
        for c in collectives
        for array in c.arrays
        if array.size not in expected.get(c.kind, set())
    ]
