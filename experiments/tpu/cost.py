"""The cost of a compiled program on one device: FLOPs, bytes moved, collectives.

XLA's own `cost_analysis` counts the body of a loop once. Here the body counts as often as the loop
runs it. One branch of each conditional counts (`lax.cond`: a refresh of the masks or none); for an
ordinary step it is the cheapest.

FLOPs are those of matrix products and convolutions, with 2 for a multiply-add and none for padding,
and those that Pallas kernels report. Bytes are those that go into or out of the main memory of the
device, without the padding of tiles. Arrays that the compiler keeps on the chip are free. Of an
array that is only sliced or updated in place, the slice counts. A Pallas kernel counts as it
reports; without a report, it reads and writes each of its arrays once. The kernels of this project
report the bytes of each array. Other kernels do not report how often they read arrays on the chip,
so these arrays are subtracted once, and the other arrays count at most once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from experiments.tpu.hlo import Array, Computation, Instruction, Module, trips

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = frozenset({
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "domain", "add-dependency",
})  # fmt: skip
_VIEWS = ("bitcast", "get-tuple-element", "reshape")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass
class Cost:
    """The cost of a program on one device.

    Attributes:
        flops: the FLOPs of matrix products and convolutions.
        moved: the bytes into and out of the main memory.
        sent: the bytes that leave the device, with the best algorithm on a ring.
        collectives: the number of collectives by kind and by bytes of each participant.
        alternatives: the number of conditionals.
        unknown_loops: the number of loops with an unknown trip count, whose body counts once.
        unknown_kernels: the number of kernels that do not report their cost.
    """

    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    collectives: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    alternatives: int = 0
    unknown_loops: int = 0
    unknown_kernels: int = 0

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds another cost, multiplied by a number of times."""
        self.flops += times * other.flops
        self.moved += times * other.moved
        self.sent += times * other.sent
        for key, count in other.collectives.items():
            self.collectives[key] += times * count
        self.alternatives += other.alternatives
        self.unknown_loops += other.unknown_loops
        self.unknown_kernels += other.unknown_kernels


Choice = Callable[[Sequence[Cost]], Cost]


def cheapest(costs: Sequence[Cost]) -> Cost:
    """The branch with the fewest bytes and FLOPs."""
    return min(costs, key=lambda c: (c.moved, c.flops))


def dearest(costs: Sequence[Cost]) -> Cost:
    """The branch with the most bytes and FLOPs."""
    return max(costs, key=lambda c: (c.moved, c.flops))


def cost(module: Module, devices: int, choose: Choice = cheapest) -> Cost:
    """The cost of a module on each of its devices."""
    return _Counter(module, devices, choose).computation(module.entry)


class _Counter:
    def __init__(self, module: Module, devices: int, choose: Choice):
        self._module, self._devices, self._choose = module, devices, choose

    def computation(self, inside: Computation) -> Cost:
        total = Cost()
        for instruction in inside:
            self._add(total, instruction, inside)
        return total

    def _add(self, total: Cost, instruction: Instruction, inside: Computation) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            turns = trips(self._module, instruction)
            body = self.computation(self._module.called(instruction, "body")[0])
            body.unknown_loops += turns is None
            total.add(body, 1 if turns is None else turns)
        elif opcode == "conditional":
            total.add(self._choose(self._branches(instruction)))
            total.alternatives += 1
        elif opcode == "call":
            total.add(self.computation(self._module.called(instruction, "to_apply")[0]))
        elif opcode not in _FREE:
            total.moved += _moved(self._module, instruction, inside)
            self._work(total, instruction, inside)

    def _branches(self, instruction: Instruction) -> list[Cost]:
        names = ("branch_computations", "true_computation", "false_computation")
        found = [c for name in names for c in self._module.called(instruction, name)]
        return [self.computation(branch) for branch in found]

    def _work(self, total: Cost, instruction: Instruction, inside: Computation) -> None:
        """Adds products and collectives, including those inside fusions."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            kind = "reduce-scatter" if self._only_a_part_stays(instruction, inside) else kind
            size = sum(a.bytes for name in instruction.operands for a in inside[name].arrays)
            group = _group(instruction, self._devices)
            size *= group if kind == "all-gather" else 1
            total.collectives[kind, round(size)] += 1
            total.sent += size * _share(kind, group)
        elif kind == "convolution":
            total.flops += _convolution_flops(instruction, inside)
        elif kind == "dot":
            total.flops += _dot_flops(instruction, inside)
        elif kind == "custom-call":
            _add_kernel(total, instruction)
        for inner in self._module.called(instruction):
            for each in inner:
                self._work(total, each, inner)

    def _only_a_part_stays(self, instruction: Instruction, inside: Computation) -> bool:
        """Whether an all-reduce is part of a fusion that is a reduce-scatter."""
        if instruction.opcode != "all-reduce" or inside is self._module.entry:
            return False
        return inside.root.opcode == "dynamic-slice" and instruction.name in inside.root.operands


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.attribute("custom_call_target") == '"tpu_custom_call"'


def _estimate(kernel: Instruction) -> dict[str, float] | None:
    """The cost that a kernel reports; None if it does not."""
    found = re.search(r'"cost_estimate":\s*(\{[^}]*\})', kernel.attributes)
    return {k: float(v) for k, v in json.loads(found[1]).items()} if found else None


def _add_kernel(total: Cost, instruction: Instruction) -> None:
    if not _is_kernel(instruction):
        return
    if estimate := _estimate(instruction):
        total.flops += estimate["flops"]
    else:
        total.unknown_kernels += 1


def _kernel_moved(kernel: Instruction, inside: Computation) -> float:
    """The bytes that a kernel reports, or those of its arrays; arrays on the chip are free."""
    operands = [a for name in kernel.operands for a in inside[name].arrays]
    arrays = (*operands, *kernel.arrays)
    estimate = _estimate(kernel)
    if estimate is None:
        return _main(arrays)
    said, least, most = estimate["bytes_accessed"], _each(kernel, "least"), _each(kernel, "most")
    if least and most:
        off = sum(size for size, a in zip(most, arrays, strict=True) if a.space)
        return max(said - off, sum(s for s, a in zip(least, arrays, strict=True) if a.space == 0))
    on_chip = sum(a.bytes for a in arrays if a.space)
    return max(0.0, min(said - on_chip, _main(arrays))) if on_chip else said


def _each(kernel: Instruction, bound: str) -> list[float]:
    """The `least` or `most` bytes of each array that a kernel of this project reports."""
    found = re.search(rf'kernel_metadata=\{{[^}}]*"{bound}_bytes":"([\d ]+)"', kernel.attributes)
    return [float(size) for size in found[1].split()] if found else []


def _share(kind: str, group: int) -> float:
    """The share of its bytes that a device sends on a ring."""
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group


def _group(instruction: Instruction, devices: int) -> int:
    """The number of devices that take part in one collective."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return devices


def _dot_flops(instruction: Instruction, inside: Computation) -> float:
    left = inside[instruction.operands[0]].arrays[0].dims
    contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
    size = math.prod(instruction.arrays[0].dims)
    return 2.0 * size * math.prod(left[int(axis)] for axis in contracted)


def _convolution_flops(instruction: Instruction, inside: Computation) -> float:
    arrays = [inside[name].arrays[0] for name in instruction.operands[:2]] + [*instruction.arrays]
    labels = re.split(r"_|->", instruction.attribute("dim_labels") or "")
    left, right, out = (
        dict(zip(axes, array.dims, strict=True)) for axes, array in zip(labels, arrays, strict=True)
    )
    window = re.findall(r"(\w+)=([^\s}]+)", instruction.attribute("window") or "")
    products = 1
    for axis in filter(str.isdigit, labels[0]):
        along = {key: values.split("x")[int(axis)] for key, values in window}
        products *= _meetings(left[axis], right[axis], out[axis], along)
    return 2.0 * out["b"] * out["f"] * right["i"] * products


def _meetings(source: int, taps: int, out: int, window: dict[str, str]) -> int:
    """The number of pairs of output and tap that read an entry, not padding or a dilation gap."""
    stride, base_dilation, window_dilation = (
        int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window.get("pad", "0_0").split("_")[0])
    at = np.arange(out)[:, None] * stride + np.arange(taps) * window_dilation - before
    return int(np.sum((at >= 0) & (at % base_dilation == 0) & (at // base_dilation < source)))


def _moved(module: Module, instruction: Instruction, inside: Computation) -> float:
    if instruction.opcode.endswith("-start") and instruction.opcode != "async-start":
        return 0.0  # It is counted where it is done.
    if _is_kernel(instruction):
        return _kernel_moved(instruction, inside)
    if instruction.opcode.endswith(("-done", "-update")):
        return _moved_by(inside[instruction.operands[0]], instruction.arrays, inside)
    read = sum(_read(module, instruction, i, inside) for i in range(len(instruction.operands)))
    return read + _written(module, instruction, inside)


def _moved_by(start: Instruction, result: tuple[Array, ...], inside: Computation) -> float:
    """The bytes that an asynchronous copy, slice or collective moves."""
    if start.opcode.startswith("async"):
        return _main(result)
    read = sum(_main(inside[name].arrays) for name in start.operands)
    if start.opcode.startswith(("copy", "slice")):
        read = min(read, sum(a.bytes for a in result))
    return read + _main(result)


def _main(arrays: tuple[Array, ...]) -> float:
    """The bytes of the arrays in the main memory."""
    return sum(a.bytes for a in arrays if a.space == 0)


def _read(module: Module, instruction: Instruction, i: int, inside: Computation) -> float:
    """The bytes of its i-th operand that an instruction reads from the main memory."""
    whole = _main(inside[instruction.operands[i]].arrays)
    return min(whole, _used(module, instruction, i, whole)) if whole else 0.0


def _used(module: Module, user: Instruction, i: int, whole: float) -> float:
    if user.opcode in _SLICES and i == 0:
        return sum(a.bytes for a in user.arrays)
    if user.opcode in ("dynamic-update-slice", "scatter") and i == 0:
        return 0.0
    if user.opcode in ("fusion", "async-start"):
        inner = module.called(user)[0]
        named = next(p for p in inner if p.opcode == "parameter" and p.argument == str(i))
        return _used_inside(module, inner, named.name, whole)
    return whole


def _used_inside(module: Module, inner: Computation, name: str, whole: float) -> float:
    total = 0.0
    for user in inner.users(name):
        if user.opcode in _VIEWS:
            total += _used_inside(module, inner, user.name, whole)
        elif user.opcode != "tuple":
            total += _used(module, user, user.operands.index(name), whole)
    return total


def _written(module: Module, instruction: Instruction, inside: Computation) -> float:
    """The bytes that an instruction writes to the main memory."""
    if instruction.opcode == "async-start":
        return 0.0  # It is counted where it is done.
    sizes = _sizes(module, instruction, inside)
    if len(sizes) != len(instruction.arrays):
        return _main(instruction.arrays)
    return sum(s for s, a in zip(sizes, instruction.arrays, strict=True) if a.space == 0)


def _sizes(module: Module, made: Instruction, inside: Computation) -> list[float]:
    """The bytes that are new in each of the arrays that an instruction makes."""
    if made.opcode == "dynamic-update-slice":
        return [sum(a.bytes for a in inside[made.operands[1]].arrays)]
    if made.opcode == "fusion":
        inner = module.called(made)[0]
        return _sizes(module, inner.root, inner)
    if made.opcode in _VIEWS and made.opcode != "get-tuple-element":
        return _sizes(module, inside[made.operands[0]], inside)
    if made.opcode == "tuple":
        return [s for name in made.operands for s in _sizes(module, inside[name], inside)]
    return [a.bytes for a in made.arrays]
