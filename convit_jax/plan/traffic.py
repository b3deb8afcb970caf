"""Bytes that a compiled program reads from and writes to the main memory of a device.

Each instruction reads its operands and writes its result, once. A fusion is one instruction. Of an
operand that is only sliced, the slice is read; of an array that is updated in place, the update is
written. Arrays in the memory on a TPU's chip do not count. XLA's "bytes accessed" counts those too,
and the body of a loop once.
"""

import collections
from collections.abc import Iterator

from convit_jax.plan.hlo import Array, Computation, Instruction, Program, arrays

# Instructions that move nothing themselves: names of arrays, and frames of other instructions.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "async-start", "async-update", "async-done", "after-all", "partition-id",
    "replica-id", "opt-barrier", "copy-done", "slice-done", "dynamic-slice-done",
    "all-reduce-done", "all-gather-done", "collective-permute-done", "send", "send-done", "recv",
    "recv-done",
}  # fmt: skip
_SLICES = ("slice", "dynamic-slice")
# Copies beside other work. The types are (to, from, context) or (from, to, context).
_FETCHES = ("copy-start", "slice-start", "dynamic-slice-start")
_UPDATE = "dynamic-update-slice"


def bytes_moved(program: Program, main_memory_only: bool = True, turns: bool = True) -> int:
    """Returns the bytes that a step reads and writes on one device.

    Args:
      program: the compiled program.
      main_memory_only: whether to leave out arrays in the memory on the chip.
      turns: whether the body of a loop counts once for each turn, and not once in all.
    """
    total = 0
    for name, instruction, count in program.runs():
        if instruction.kind not in _FREE and not _only_allocates(instruction):
            moved = _Moved(program, program.computations[name], main_memory_only)
            total += moved.by(instruction) * (count if turns else 1)
    return total


def _only_allocates(instruction: Instruction) -> bool:
    return 'custom_call_target="AllocateBuffer"' in instruction.attributes


class _Moved:
    """Counts the bytes of the instructions of one computation.

    Attributes:
      program: the compiled program.
      computation: the computation.
      main_memory_only: whether to leave out arrays in the memory on the chip.
    """

    def __init__(self, program: Program, computation: Computation, main_memory_only: bool):
        self.program, self.computation = program, computation
        self.main_memory_only = main_memory_only

    def by(self, instruction: Instruction) -> int:
        """Returns the bytes that an instruction moves."""
        operands = [self.computation[name].type for name in instruction.operands]
        if instruction.kind == "fusion":
            return self._by_fusion(instruction, operands)
        if instruction.kind in _SLICES:
            return 2 * self._size(instruction.type)
        if instruction.kind == _UPDATE:
            return 2 * self._size(operands[1])
        if instruction.kind in _FETCHES:
            ends = arrays(instruction.type)[:2]
            return min(end.bytes for end in ends) * sum(self._counts(end) for end in ends)
        return self._size(instruction.type) + sum(map(self._size, operands))

    def _size(self, type_: str) -> int:
        return sum(map(self._of, arrays(type_)))

    def _of(self, array: Array) -> int:
        return array.bytes if self._counts(array) else 0

    def _counts(self, array: Array) -> bool:
        return array.in_main_memory or not self.main_memory_only

    def _by_fusion(self, instruction: Instruction, operands: list[str]) -> int:
        inside = self.program.computations[self.program.called(instruction)[0]]
        readers = collections.defaultdict(list)
        for inner in inside.values():
            for name in inner.operands:
                readers[name].append(inner)
        total = 0
        for parameter in inside.values():
            if parameter.kind == "parameter":
                operand = operands[int(parameter.content)]
                total += int(self._size(operand) * _share_read(parameter, readers, operand))
        results = _results(inside)
        for array, result in zip(arrays(instruction.type), results, strict=False):
            updated = result.kind == _UPDATE
            part = _bytes(inside[result.operands[1]].type) if updated else array.bytes
            total += min(part, array.bytes) if self._counts(array) else 0
        return total


def _bytes(type_: str) -> int:
    return sum(array.bytes for array in arrays(type_))


def _share_read(
    parameter: Instruction, readers: dict[str, list[Instruction]], operand: str
) -> float:
    """Returns the share of an operand that a fusion reads: 1 if all of it."""
    found = list(_through_bitcasts(parameter, readers))
    if not found or any(
        reader.operands[0] != source.name or reader.kind not in (*_SLICES, _UPDATE)
        for source, reader in found
    ):
        return 1.0
    sliced = sum(_bytes(reader.type) for _, reader in found if reader.kind in _SLICES)
    return min(1.0, sliced / max(1, _bytes(operand)))


def _through_bitcasts(
    source: Instruction, readers: dict[str, list[Instruction]]
) -> Iterator[tuple[Instruction, Instruction]]:
    for reader in readers[source.name]:
        if reader.kind == "bitcast":
            yield from _through_bitcasts(reader, readers)
        else:
            yield source, reader


def _results(inside: Computation) -> list[Instruction]:
    """Returns the instructions that make the results of a fusion, one for each array."""
    root = next(inner for inner in inside.values() if inner.is_root)
    results = []
    for name in root.operands if root.kind == "tuple" else (root.name,):
        result = inside[name]
        while result.kind == "bitcast":
            result = inside[result.operands[0]]
        results.append(result)
    return results
