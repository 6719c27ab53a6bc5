"""Parses the text of a compiled module: its computations, and the trip counts of its loops."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([0-9,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.-]+)")
_METADATA = re.compile(r"kernel_metadata=\{[^}]*\}")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a shape. Memory space 0 is the main memory; other spaces are on the chip."""

    bits: int
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """The size without padding."""
        return math.prod(self.dims) * self.bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line `name = arrays opcode(argument), attributes`. The arrays of a tuple are flattened."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    argument: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads."""
        return _NAME.findall(self.argument)

    def attribute(self, name: str) -> str | None:
        """The value in `name=value`, including braces and what is between them."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else None

    def called(self, name: str = "calls") -> list[str]:
        """The names of the computations that an attribute lists."""
        return _NAME.findall(self.attribute(name) or "")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order."""

    instructions: Mapping[str, Instruction]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in self if i.root)

    def users(self, name: str) -> Iterator[Instruction]:
        """The instructions that read an instruction."""
        return (i for i in self if name in i.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, and the entry computation."""

    computations: Mapping[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction, name: str = "calls") -> list[Computation]:
        """The computations that an attribute lists."""
        return [self.computations[c] for c in instruction.called(name)]


def parse(text: str) -> Module:
    """Parses the text of `jax.stages.Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    lines: dict[str, Instruction] = {}
    entry = ""
    # Everything else about an instruction is on one line.
    text = _METADATA.sub(lambda found: found[0].replace("\n", ""), text)
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = {}
            computations[header[2]] = Computation(lines)
            entry = header[2] if header[1] else entry
        elif found := _LINE.match(line):
            lines[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    return Module(computations, computations[entry])


def trips(module: Module, loop: Instruction) -> int | None:
    """The trip count of a `while` loop, if the text contains it.

    Loops of `lax.scan` and `lax.fori_loop` count from 0 in steps of 1 to a constant: the condition
    is one comparison with it. None for any other.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = list(_flat(module, module.called(loop, "condition")[0]))
    compares = [i for i in condition if i.opcode == "compare"]
    limits = [i.argument for i in condition if i.opcode == "constant" and i.argument.isdigit()]
    if len(compares) != 1 or len(limits) != 1 or compares[0].attribute("direction") != "LT":
        return None
    return int(limits[0])


def _flat(module: Module, computation: Computation) -> Iterator[Instruction]:
    for instruction in computation:
        yield instruction
        for inner in module.called(instruction):
            yield from _flat(module, inner)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    return Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(_array(*found.groups()) for found in _ARRAY.finditer(shape)),
        argument=rest[len(opcode) + 1 : close - 1],
        attributes=rest[close:],
        root=root,
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if not depth:
            return position + 1
    raise ValueError(f"no closing parenthesis: {text[:100]}")


def _array(dtype: str, dims: str, layout: str | None) -> Array:
    bits = _BITS.get(dtype)
    if bits is None:
        bits = int(re.findall(r"\d+", dtype)[0])
    space = _SPACE.search(layout or "")
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    return Array(bits, sizes, int(space[1]) if space else 0)
