"""Bytes that a compiled program reads from and writes to the main memory of a device.

Each instruction reads its operands and writes its result, once. A fusion is one instruction. Of an
operand that is only sliced, the slice is read; of an array that is updated in place, the update is
written. Arrays in the memory on a TPU's chip do not count. XLA's "bytes accessed" counts those too,
and the body of a loop once.
"""

import collections
from collections.abc import Iterator

from convit_jax.plan.hlo import Computation, Instruction, Program, arrays

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


def bytes_moved(program: Program) -> int:
    """Returns the bytes that a step reads and writes on one device."""
    return sum(
        turns * _Moved(program, program.computations[name]).by(instruction)
        for name, instruction, turns in program.runs()
        if instruction.kind not in _FREE and not _only_allocates(instruction)
    )


def _only_allocates(instruction: Instruction) -> bool:
    return 'custom_call_target="AllocateBuffer"' in instruction.attributes


class _Moved:
    """Counts the bytes of the instructions of one computation of a program."""

    def __init__(self, program: Program, computation: Computation):
        self.program, self.computation = program, computation

    def by(self, instruction: Instruction) -> int:
        """Returns the bytes that an instruction moves."""
        operands = [self.computation[name].type for name in instruction.operands]
        if instruction.kind == "fusion":
            return self._by_fusion(instruction, operands)
        if instruction.kind in _SLICES:
            return 2 * _size(instruction.type)
        if instruction.kind == _UPDATE:
            return 2 * _size(operands[1])
        if instruction.kind in _FETCHES:
            ends = arrays(instruction.type)[:2]
            return min(end.bytes for end in ends) * sum(end.in_main_memory for end in ends)
        return _size(instruction.type) + sum(map(_size, operands))

    def _by_fusion(self, instruction: Instruction, operands: list[str]) -> int:
        inside = self.program.computations[self.program.called(instruction)[0]]
        total = 0
        for parameter in inside.values():
            if parameter.kind == "parameter":
                operand = operands[int(parameter.content)]
                total += int(_size(operand) * _share_read(self.program, inside, parameter))
        written, results = arrays(instruction.type), _results(inside)
        if len(written) != len(results):  # one operation with several results
            return total + _size(instruction.type)
        for array, result in zip(written, results, strict=True):
            updated = result.kind == _UPDATE
            part = _bytes(inside[result.operands[1]].type) if updated else array.bytes
            total += min(part, array.bytes) if array.in_main_memory else 0
        return total


def _size(type_: str) -> int:
    """Returns the bytes in the main memory."""
    return sum(array.bytes for array in arrays(type_) if array.in_main_memory)


def _bytes(type_: str) -> int:
    """Returns the bytes in any memory."""
    return sum(array.bytes for array in arrays(type_))


def _elements(type_: str) -> int:
    """Returns the number of elements of an array."""
    return sum(array.size for array in arrays(type_))


def _share_read(program: Program, inside: Computation, parameter: Instruction) -> float:
    """Returns the share of an operand that a fusion reads: 1 if all of it.

    A slice may also convert, so elements are counted. It may be in a fusion within the fusion.
    """
    readers = collections.defaultdict(list)
    for reader in inside.values():
        for name in reader.operands:
            readers[name].append(reader)
    found, share = list(_through_bitcasts(parameter, readers)), 0.0
    for source, reader in found:
        places = [i for i, name in enumerate(reader.operands) if name == source.name]
        if reader.kind == "fusion":
            inner = program.computations[program.called(reader)[0]]
            share += sum(
                _share_read(program, inner, other)
                for other in inner.values()
                if other.kind == "parameter" and int(other.content) in places
            )
        elif places != [0] or reader.kind not in (*_SLICES, _UPDATE):
            return 1.0
        elif reader.kind in _SLICES:
            share += _elements(reader.type) / max(1, _elements(source.type))
    return min(1.0, share) if found else 1.0


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
