"""Collectives and memory traffic per device, from the HLO text of a compiled program.

XLA's own cost analysis counts the body of a loop once; here it counts for each iteration.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # bytes of an element; names of other types contain their bits
NO_TRAFFIC = {  # instructions that move no data, or run computations that are counted separately
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"),
}
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# ROOT %name = shape opcode(operands), attributes
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*?)\)(?:, (.*)|$)")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


class Buffer(NamedTuple):
    """An array; one in on-chip memory (S in the layout) has no bytes in main memory."""

    n_bytes: int
    in_memory: int


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    buffers: tuple[Buffer, ...]  # of the result: one, or the elements of a tuple
    operands: tuple[str, ...]  # names; for a parameter its number, for a constant its value
    attributes: str
    is_root: bool

    def find(self, pattern: str) -> str:
        """Return the first group of a pattern in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    runs: dict[str, int]  # computation -> number of executions in one run of the program
    inlined: frozenset[str]  # computations of fusions, whose values never reach memory


@dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    kind: str  # of KINDS
    n_bytes: int  # sent per device in one run of the program, by the ring algorithm
    group: tuple[int, ...]  # the first group of devices, by their positions in the mesh


def parse(text: str) -> Program:
    """Return the program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if match := INSTRUCTION.match(line):
            root, name, shape, opcode, inside, attributes = match.groups()
            has_value = opcode in ("parameter", "constant")
            operands = (inside,) if has_value else tuple(re.findall(r"%([\w.\-]+)", inside))
            current[name] = Instruction(name, opcode, _buffers(shape), operands, attributes or "", bool(root))
        elif match := COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
    runs: dict[str, int] = defaultdict(int)
    inlined = set()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for x in computations[name].values():
            n = _trips(computations, name, x) if x.opcode == "while" else 1
            for called in _called(x):
                visit(called, times * n)
                if x.opcode == "fusion" or name in inlined:
                    inlined.add(called)

    visit(entry, 1)
    return Program(computations, dict(runs), frozenset(inlined))


def collectives(program: Program) -> list[Collective]:
    """Return the instructions that move data between devices."""
    by_channel: dict[str, Collective] = {}
    for name, times in program.runs.items():
        computation = program.computations[name]
        for x in computation.values():
            kind, group = x.opcode.removesuffix("-start"), _group(x)
            if kind not in KINDS or len(group) < 2:
                continue
            # On TPUs, a reduce-scatter is a fusion of this name, with an all-reduce and a slice.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            operand = sum(y.n_bytes for y in _operands(computation, x))
            collective = Collective(kind, times * _sent(kind, operand, len(group)), group)
            # On TPUs, one that overlaps with computation is split into several with the same channel.
            channel = x.find(r"channel_id=(\d+)") or f"{name}/{x.name}"
            by_channel[channel] = max(by_channel.get(channel, collective), collective, key=lambda y: y.n_bytes)
    return list(by_channel.values())


def axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes of a mesh {name: size} that a group of its devices extends over."""
    places = np.unravel_index(np.array(group), tuple(mesh.values()))
    return tuple(name for name, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1)


def traffic(program: Program) -> int:
    """Return the bytes that a device reads from and writes to main memory in one run.

    If a fusion uses only a slice of an operand, the slice counts; for an update in place, the update counts.
    """
    return sum(
        times * sum(_moved(program, program.computations[name], x) for x in program.computations[name].values())
        for name, times in program.runs.items()
        if name not in program.inlined
    )


def _buffers(shape: str) -> tuple[Buffer, ...]:
    buffers = []
    for dtype, dimensions, layout in ARRAY.findall(shape):
        bits = 8 * SIZES[dtype] if dtype in SIZES else int((re.search(r"\d+", dtype) or ["0"])[0])
        n_bytes = math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8
        buffers.append(Buffer(n_bytes, 0 if re.search(r"S\(\d+\)", layout) else n_bytes))
    return tuple(buffers)


def _operands(computation: Computation, x: Instruction) -> list[Buffer]:
    return [buffer for name in x.operands if name in computation for buffer in computation[name].buffers]


def _in_memory(buffers: Iterable[Buffer]) -> int:
    return sum(buffer.in_memory for buffer in buffers)


def _called(x: Instruction) -> Iterator[str]:
    """Yield the computations that an instruction runs, except the operator of a reduction."""
    for key, names in re.findall(r"(calls|body|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)", x.attributes):
        if key != "to_apply" or x.opcode == "call":
            yield from re.findall(r"[\w.\-]+", names)


def _trips(computations: dict[str, Computation], within: str, x: Instruction) -> int:
    """Return the number of iterations of a loop, as annotated by XLA or, on TPUs, from a counter and a constant limit.

    Raises ValueError for any other loop.
    """
    if known := x.find(r'"known_trip_count":\{"n":"(\d+)"\}'):
        return int(known)
    condition, outside = computations[x.find(r"condition=%?([\w.\-]+)")], computations[within]
    test = next(y for y in condition.values() if y.is_root)
    if test.opcode == "compare" and "direction=LT" in test.attributes:
        start, limit = (condition[name] for name in test.operands)
        if place := start.find(r"index=(\d+)"):
            start = outside[outside[x.operands[0]].operands[int(place)]]
        while start.opcode == "copy":
            start = outside[start.operands[0]]
        if limit.opcode == start.opcode == "constant":
            return int(limit.operands[0]) - int(start.operands[0])
    raise ValueError(f"the loop {x.name} runs while {test}")


def _group(x: Instruction) -> tuple[int, ...]:
    """Return the first group of participating devices, in any of XLA's notations."""
    if text := x.find(r"source_target_pairs=\{\{(\d+,\d+)\}") or x.find(r"replica_groups=\{\{([\d,]+)\}"):
        return _ints(text)
    # [groups, size]<=[shape]T(permutation): the devices counted in that shape, its axes permuted, in rows.
    if text := x.find(r"replica_groups=(\[\d+,\d+\]<=[^ ]+)"):
        shape, _, counted = text.rstrip(",").partition("<=")
        return tuple(_iota(counted).reshape(_ints(shape[1:-1]))[0].tolist())
    # mesh['axis'=size, ...], device_ids=(as above) {'axis', ...}: the axes that a group extends over.
    if text := x.find(r"replica_groups=(mesh\[[^\]]*\](?:, device_ids=\(\S+\))? \{[^}]*\})"):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text)}
        extended = re.findall(r"'([^']+)'", text.rpartition("{")[2])
        ids = re.search(r"device_ids=\((\S+)\) ", text)
        devices = _iota(ids[1] if ids else f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
        return tuple(devices[tuple(slice(None) if name in extended else 0 for name in sizes)].ravel().tolist())
    return ()


def _iota(text: str) -> np.ndarray:
    """Return the device numbers of [shape] or [shape]T(permutation)."""
    shape, _, permutation = text.rstrip(")").partition("T(")
    devices = np.arange(math.prod(_ints(shape[1:-1]))).reshape(_ints(shape[1:-1]))
    return (devices.transpose(_ints(permutation)) if permutation else devices).ravel()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _sent(kind: str, operand: int, n: int) -> int:
    """Return the bytes that a device sends in a collective; `operand` is in bytes, n is the size of the group."""
    if kind == "all-gather":
        return (n - 1) * operand
    if kind == "collective-permute":
        return operand
    return (2 if kind == "all-reduce" else 1) * operand * (n - 1) // n


def _moved(program: Program, computation: Computation, x: Instruction) -> int:
    """Return the bytes that an instruction reads and writes."""
    if x.opcode in NO_TRAFFIC or x.opcode.endswith("-done") or '"AllocateBuffer"' in x.attributes:
        return 0
    if x.opcode.endswith("-start") or x.opcode in ("copy", "slice", "dynamic-slice", "gather"):
        result = _result(x)
        return min(_in_memory(_operands(computation, x)), sum(y.n_bytes for y in result)) + _in_memory(result)
    if x.opcode in ("dynamic-update-slice", "scatter"):
        update = computation[x.operands[1 if x.opcode == "dynamic-update-slice" else 2]]
        return 2 * _in_memory(update.buffers)
    if x.opcode != "fusion":
        return _in_memory(_operands(computation, x)) + _in_memory(x.buffers)
    inside = program.computations[next(_called(x))]
    wholes = [_in_memory(computation[name].buffers) for name in x.operands]
    read = sum(min(whole, _read(program, inside, i)) for i, whole in enumerate(wholes) if whole)
    return read + _written(inside, x)


def _result(x: Instruction) -> tuple[Buffer, ...]:
    """Return the results of an instruction; asynchronous ones return a tuple with their operands."""
    if not x.opcode.endswith("-start") or len(x.buffers) <= len(x.operands):
        return x.buffers
    place = 0 if x.opcode == "copy-start" else len(x.operands)
    return x.buffers[place : place + 1]


def _read(program: Program, inside: Computation, number: int) -> int:
    """Return the bytes of a fusion's operand that are read."""
    parameter = next(x for x in inside.values() if x.opcode == "parameter" and x.operands[0] == str(number))
    total, names = 0, [parameter.name]
    while names:
        name = names.pop()
        for x in inside.values():
            for place in (i for i, operand in enumerate(x.operands) if operand == name and x.opcode != "parameter"):
                if x.opcode == "bitcast":
                    names.append(x.name)
                elif x.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
                    total += x.buffers[0].n_bytes
                elif x.opcode == "fusion":
                    total += _read(program, program.computations[next(_called(x))], place)
                elif x.opcode != "dynamic-update-slice" or place:
                    return sum(y.n_bytes for y in parameter.buffers)
    return total


def _written(inside: Computation, fusion: Instruction) -> int:
    """Return the bytes that a fusion writes."""
    root = next(x for x in inside.values() if x.is_root)
    roots = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for x, result in zip(roots, fusion.buffers, strict=False):
        while x.opcode == "bitcast":
            x = inside[x.operands[0]]
        is_update = x.opcode == "dynamic-update-slice"
        total += min(result.in_memory, inside[x.operands[1]].buffers[0].n_bytes) if is_update else result.in_memory
    return total
