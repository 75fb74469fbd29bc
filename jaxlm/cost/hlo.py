"""What a compiled program does on each device: its collectives and its memory traffic, read from XLA's text of it.

XLA's own cost analysis counts the body of a loop once, however often it runs; here each count is times that.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # of an element, bytes; those of others are in their names
NO_TRAFFIC = {  # instructions that move nothing, or whose computations are counted for themselves
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "add-dependency"),
}
SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # as in the text, with the layout
    opcode: str
    operands: tuple[str, ...]  # names; that of a parameter is its number, that of a constant its value
    attributes: str
    is_root: bool


@dataclass(frozen=True)
class Program:
    computations: dict[str, dict[str, Instruction]]
    runs: dict[str, int]  # computation -> how often it runs in one run of the program
    inlined: frozenset[str]  # computations of fusions, whose values stay out of memory


@dataclass(frozen=True)
class Collective:
    """One instruction of a program that moves data between devices."""

    kind: str  # of KINDS
    n_bytes: int  # that a device sends in one run of the program, by the ring algorithm
    group: tuple[int, ...]  # the devices of one group, by their place in the mesh
    op_name: str  # where it comes from


def parse(text: str) -> Program:
    """Return the program of `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if start := INSTRUCTION.match(line):
            found = _instruction(line, start)
            current[found.name] = found
        elif start := COMPUTATION.match(line):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
    runs: dict[str, int] = defaultdict(int)
    inlined = set()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name].values():
            n = _trips(computations, name, instruction) if instruction.opcode == "while" else 1
            for called in _called(instruction):
                visit(called, times * n)
                if instruction.opcode == "fusion" or name in inlined:
                    inlined.add(called)

    visit(entry, 1)
    return Program(computations, dict(runs), frozenset(inlined))


def collectives(program: Program) -> list[Collective]:
    """Return what moves data between devices; a device's loops are counted as often as they run."""
    found: dict[str, Collective] = {}
    for computation, times in program.runs.items():
        instructions = program.computations[computation]
        for x in instructions.values():
            kind = x.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            group = _group(x.attributes)
            operand = sum(n_bytes(instructions[name].shape) for name in x.operands)
            # TPUs have a reduce-scatter as a fusion of this name, with an all-reduce and a slice.
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            sent = times * _sent(kind, operand, len(group))
            op_name = re.search(r'op_name="([^"]*)"', x.attributes)
            # TPUs split one that runs beside other work into several with the same channel.
            channel = re.search(r"channel_id=(\d+)", x.attributes)
            key = channel[1] if channel else f"{computation}/{x.name}"
            if len(group) > 1 and (key not in found or found[key].n_bytes < sent):
                found[key] = Collective(kind, sent, group, op_name[1] if op_name else "")
    return list(found.values())


def axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the axes of a mesh, {name: size}, that a group of its devices extends over."""
    places = np.unravel_index(np.array(group), tuple(mesh.values()))
    return tuple(name for name, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1)


def traffic(program: Program) -> int:
    """Return the bytes that a device's memory reads and writes in one run; on-chip memories (S in a layout) are free.

    An operand of a fusion of which only a slice is used counts as that slice, and one updated in place as the update.
    """
    total = 0
    for computation, times in program.runs.items():
        if computation not in program.inlined:
            instructions = program.computations[computation]
            total += times * sum(_moved(program, instructions, x) for x in instructions.values())
    return total


def n_bytes(shape: str, in_memory: bool = False) -> int:
    """Return the bytes of a shape or a tuple of them; with `in_memory`, without those in other memories."""
    total = 0
    for dtype, dimensions, layout in SHAPE.findall(shape):
        bits = 8 * SIZES[dtype] if dtype in SIZES else int((re.search(r"\d+", dtype) or ["0"])[0])
        if not (in_memory and re.search(r"S\(\d+\)", layout or "")):
            total += math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8
    return total


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    shape_end = _balanced(line, start.end()) if line[start.end()] == "(" else line.index(" ", start.end())
    opcode_end = line.index("(", shape_end)
    operands_end = _balanced(line, opcode_end)
    inside = line[opcode_end + 1 : operands_end - 1]
    shape, opcode = line[start.end() : shape_end], line[shape_end:opcode_end].strip()
    operands = (inside,) if opcode in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", inside)
    return Instruction(start[2], shape, opcode, tuple(operands), line[operands_end:], bool(start[1]))


def _balanced(line: str, start: int) -> int:
    """Return where the parenthesis that opens at `start` has been closed."""
    depth = 0
    for i in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"no instruction of a program: {line}")


def _called(x: Instruction) -> Iterator[str]:
    """Yield the computations that an instruction runs. Those of a reduction are no more than a sum."""
    for key, names in re.findall(r"(calls|body|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)", x.attributes):
        if key != "to_apply" or x.opcode == "call":
            yield from re.findall(r"[\w.\-]+", names)


def _trips(computations: dict[str, dict[str, Instruction]], within: str, x: Instruction) -> int:
    """Return how often a loop runs: as XLA says, or where it does not, as on TPUs, until its counter is at a constant.

    Raises ValueError for any other loop, whose work cannot be told.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', x.attributes):
        return int(known[1])
    condition = computations[(re.search(r"condition=%?([\w.\-]+)", x.attributes) or ["", ""])[1]]
    test = next(y for y in condition.values() if y.is_root)
    if test.opcode == "compare" and "direction=LT" in test.attributes:
        counter, limit = (condition[name] for name in test.operands)
        place = re.search(r"index=(\d+)", counter.attributes)
        outside = computations[within]
        start = outside[outside[x.operands[0]].operands[int(place[1])]] if place else counter
        while start.opcode == "copy":
            start = outside[start.operands[0]]
        if limit.opcode == start.opcode == "constant":
            return int(limit.operands[0]) - int(start.operands[0])
    raise ValueError(f"the loop {x.name} runs while {test}")


def _group(attributes: str) -> tuple[int, ...]:
    """Return the first of the groups of devices that take part, in any of the forms that XLA writes."""
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return (int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return _ints(found[1])
    # [groups, size]<=[shape]T(permutation): the devices counted in that shape, its axes permuted, in rows.
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?),? ", attributes + " "):
        return tuple(int(i) for i in _iota(found[3]).reshape(int(found[1]), int(found[2]))[0])
    # mesh['axis'=size, ...], device_ids=(as above) {'axis', ...}: the axes that a group extends over.
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        extended = re.findall(r"'([^']+)'", found[3])
        devices = _iota(found[2]) if found[2] else np.arange(math.prod(sizes.values()))
        first = tuple(slice(None) if name in extended else 0 for name in sizes)
        return tuple(int(i) for i in devices.reshape(tuple(sizes.values()))[first].ravel())
    return ()


def _iota(text: str) -> np.ndarray:
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found, text
    shape = _ints(found[1])
    devices = np.arange(math.prod(shape)).reshape(shape)
    return (devices.transpose(_ints(found[2])) if found[2] else devices).ravel()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _sent(kind: str, operand: int, n: int) -> int:
    """Return how many bytes a device sends for a collective on an operand of so many bytes in a group of n."""
    if kind == "all-gather":
        return (n - 1) * operand
    if kind == "collective-permute":
        return operand
    return (2 if kind == "all-reduce" else 1) * operand * (n - 1) // max(n, 1)


def _moved(program: Program, instructions: dict[str, Instruction], x: Instruction) -> int:
    if x.opcode in NO_TRAFFIC or x.opcode.endswith("-done") or '"AllocateBuffer"' in x.attributes:
        return 0
    shapes = [instructions[name].shape for name in x.operands if name in instructions]
    if x.opcode.endswith("-start") or x.opcode in ("copy", "slice", "dynamic-slice", "gather"):
        result = _result(x)
        return min(sum(n_bytes(shape, True) for shape in shapes), n_bytes(result)) + n_bytes(result, True)
    if x.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * n_bytes(shapes[1 if x.opcode == "dynamic-update-slice" else 2], True)
    if x.opcode != "fusion":
        return sum(n_bytes(shape, True) for shape in shapes) + n_bytes(x.shape, True)
    inside = program.computations[next(_called(x))]
    read = 0
    for number, name in enumerate(x.operands):
        whole = n_bytes(instructions[name].shape, True)
        read += min(whole, _read(program, inside, number)) if whole else 0
    return read + _written(inside, x.shape)


def _result(x: Instruction) -> str:
    """Return the shape of what an instruction makes; that of an asynchronous one has its operands beside it."""
    parts = _elements(x.shape)
    if not x.opcode.endswith("-start") or len(parts) <= len(x.operands):
        return x.shape
    return parts[0 if x.opcode == "copy-start" else len(x.operands)]


def _read(program: Program, inside: dict[str, Instruction], number: int) -> int:
    """Return how many bytes of a fusion's operand are used."""
    parameter = next(x for x in inside.values() if x.opcode == "parameter" and x.operands[0] == str(number))
    total, names = 0, [parameter.name]
    while names:
        name = names.pop()
        for x in inside.values():
            for place in (i for i, operand in enumerate(x.operands) if operand == name and x.opcode != "parameter"):
                if x.opcode == "bitcast":
                    names.append(x.name)
                elif x.opcode in ("slice", "dynamic-slice", "gather") and place == 0:
                    total += n_bytes(x.shape)
                elif x.opcode == "fusion":
                    total += _read(program, program.computations[next(_called(x))], place)
                elif x.opcode != "dynamic-update-slice" or place:
                    return n_bytes(parameter.shape)
    return total


def _written(inside: dict[str, Instruction], shape: str) -> int:
    """Return how many bytes a fusion writes whose result is of a shape."""
    root = next(x for x in inside.values() if x.is_root)
    roots = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for x, part in zip(roots, _elements(shape), strict=False):
        while x.opcode == "bitcast":
            x = inside[x.operands[0]]
        whole = n_bytes(part, True)
        total += min(whole, n_bytes(inside[x.operands[1]].shape)) if x.opcode == "dynamic-update-slice" else whole
    return total


def _elements(shape: str) -> list[str]:
    """Return the shapes of a tuple, or of what is none."""
    return [found[0] for found in SHAPE.finditer(shape)]
