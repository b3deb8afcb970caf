"""Reads the text of a compiled program (HLO): its instructions, and how often each one runs.

XLA's own `cost_analysis` counts the body of a loop once. The layers of the model are a loop.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

_ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
    "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8,
}  # fmt: skip
# "f32[2,128]{1,0:T(8,128)S(1)}"; T is the tile that the TPU's memory is padded to, S the memory.
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\(([1-9]\d*)\)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a compiled program.

    Attributes:
      dtype: XLA's name of the type, such as "bf16".
      shape: the shape on one device.
      layout: XLA's text about the order of the axes, tiles and memory; "" without one.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes, without the padding of tiles; 0 for types without data, such as tokens."""
        return self.size * _ITEM_BYTES.get(self.dtype, 0)

    @property
    def in_main_memory(self) -> bool:
        """Whether the array lies in the device's main memory, and not in a memory on the chip."""
        return not _SPACE.search(self.layout)


def arrays(text: str) -> list[Array]:
    """Returns the arrays of a type, of which a tuple may have several."""
    return [
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program.

    Attributes:
      name: unique name in its computation.
      type: text of the result's type, for `arrays`.
      kind: name of the operation, such as "fusion".
      operands: names of its operands.
      content: text between the brackets: operands, a constant's value or a parameter's number.
      attributes: text after the operands.
      is_root: whether its result is that of the computation.
    """

    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    content: str
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the word after `name=`, such as the computation of calls=%NAME."""
        found = re.search(rf"\b{name}=\{{?%?([\w.-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: {name: {name of an instruction: instruction}}.
      entry: name of the computation that runs first.
    """

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads the text of `jax.stages.Compiled.as_text()`."""
        computations: dict[str, Computation] = {}
        entry, current = "", {}
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                current = computations.setdefault(start[2], {})
                entry = start[2] if start[1] else entry
            elif found := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)", line):
                current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
        return cls(computations, entry)

    def runs(self, fused: bool = False) -> Iterator[tuple[str, Instruction, int]]:
        """Yields (computation, instruction, how often it runs in a step) for all that runs.

        A loop whose number of turns is not in the program counts as one turn. Those loops draw
        random numbers until one is accepted.

        Args:
          fused: whether to yield the instructions inside of fusions too.
        """
        kinds = ("call", "conditional", "async-start", *(("fusion",) if fused else ()))

        def walk(name: str, turns: int) -> Iterator[tuple[str, Instruction, int]]:
            for instruction in self.computations[name].values():
                yield name, instruction, turns
                if instruction.kind == "while":
                    body = instruction.attribute("body")
                    yield from walk(str(body), turns * self._turns(instruction))
                elif instruction.kind in kinds:
                    for called in self.called(instruction):
                        yield from walk(called, turns)

        yield from walk(self.entry, 1)

    def called(self, instruction: Instruction) -> list[str]:
        """Returns the names of the computations that an instruction calls."""
        lists = re.findall(
            r"(?:calls|to_apply|_computations?)=(\{[^}]*\}|%?[\w.-]+)", instruction.attributes
        )
        names = [name for text in lists for name in re.findall(r"[\w.-]+", text)]
        return [name for name in names if name in self.computations]

    def _turns(self, loop: Instruction) -> int:
        """Returns the turns of a loop: those that XLA notes, or of `counter < constant`."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        condition = self.computations[str(loop.attribute("condition"))]
        constants = [
            int(i.content)
            for i in condition.values()
            if i.kind == "constant" and i.type.startswith("s32[]")
        ]
        return constants[0] if len(constants) == 1 else 1


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    """Reads what follows "name =": TYPE KIND(OPERANDS), ATTRIBUTES."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest, 0) - 1
    content = rest[: close - 1]
    operands = tuple(re.findall(r"%([\w.-]+)", content))
    return Instruction(name, text[:end], kind, operands, content, rest[close:], is_root)


def _closing(text: str, start: int) -> int:
    """Returns the position after the bracket that closes the one at `start`."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f"a compiled program: expected a closing bracket in {text[:100]!r}")
