"""Finds which parameter and which module of one run is which of the other: by value, name, shape and order.

A map is JSON, and can be kept, changed and given back. What it brings into A's layout is B's array:

    {"parameters": [{"a": "fc.weight", "b": "Dense_0.kernel", "axes": [1, 0]},
                    {"a": "layers.1.fc.weight", "b": "blocks.fc.kernel", "b_index": 1, "axes": [1, 0]},
                    {"a": "qkv.weight", "a_part": [0, 0, 8], "b": "query.kernel", "axes": [1, 0]}],
     "modules": {"fc": "Dense_0", "layers.1.fc": "blocks.1.fc"}}

`a_index`, `b_index`: one of the stacked arrays. `a_part`, `b_part`: axis, start and end of what is one of several that
are joined. `axes`: what numpy.transpose gets. `shape`: what B's array is then reshaped to.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from parity_tests.record.files import Record

SYNONYMS = [
    {"weight", "kernel", "scale", "gamma", "embedding", "w", "embeddings"},
    {"bias", "beta", "b"},
    {"norm", "layernorm", "ln", "rmsnorm", "layer_norm"},
    {"query", "q"},
    {"key", "k"},
    {"value", "v"},
    {"out", "output", "o", "proj"},
    {"layer", "layers", "block", "blocks", "h", "encoder", "encoderblock"},
    {"token", "tokens", "wte", "word", "embed", "tok"},
    {"position", "positions", "wpe", "pos"},
    {"linear", "dense", "fc", "proj", "lin"},
    {"attention", "attn", "self", "multihead"},
    {"mlp", "ffn", "feed", "forward"},
]
_CANONICAL = {word: min(group) for group in SYNONYMS for word in group}
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter, one of its stacked layers, or one of several that are joined in it."""

    name: str
    index: int | None = None
    part: tuple[int, int, int] | None = None

    def of(self, x: np.ndarray) -> np.ndarray:
        x = x if self.index is None else x[self.index]
        return x if self.part is None else x[(slice(None),) * self.part[0] + (slice(*self.part[1:]),)]

    def __str__(self) -> str:
        index = "" if self.index is None else f"[{self.index}]"
        part = "" if self.part is None else f"[{self.part[1]}:{self.part[2]}]"
        return self.name + index + part


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is the same parameter in both runs, and how B's is brought into A's layout."""

    a: View
    b: View
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    by: str = "value"

    def laid_out(self, x: np.ndarray) -> np.ndarray:
        """Return B's parameter, gradient or moment as A has it."""
        x = self.b.of(x)
        x = x if self.axes is None else x.transpose(self.axes)
        return x if self.shape is None else x.reshape(self.shape)

    def put(self, x: np.ndarray, into: np.ndarray) -> None:
        """Write A's parameter into B's, in B's layout."""
        x, y = self.a.of(x), self.b.of(into)  # y is a view of `into`
        moved = y if self.axes is None else y.transpose(self.axes)
        moved[...] = x.reshape(moved.shape)


@dataclasses.dataclass
class Names:
    """The map: of parameters, and of modules."""

    pairs: list[Pair]
    modules: dict[str, str]
    notes: list[str] = dataclasses.field(default_factory=list)
    lonely: tuple[list[str], list[str]] = ([], [])  # parameters that only A, only B has
    moved: list[str] = dataclasses.field(default_factory=list)  # whose values are in another place

    def json(self) -> str:
        rows = []
        for pair in self.pairs:
            row: dict[str, Any] = {"a": pair.a.name, "b": pair.b.name}
            for side, view in (("a", pair.a), ("b", pair.b)):
                row |= {} if view.index is None else {f"{side}_index": view.index}
                row |= {} if view.part is None else {f"{side}_part": list(view.part)}
            row |= {key: list(x) for key, x in (("axes", pair.axes), ("shape", pair.shape)) if x is not None}
            rows.append(row)
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        modules = ",\n  ".join(f"{json.dumps(a)}: {json.dumps(b)}" for a, b in self.modules.items())
        return f'{{"parameters": [\n  {lines}],\n "modules": {{\n  {modules}}}}}\n'


def read_names(path: Path | str) -> Names:
    """Return the map in a file. Raises UserError if it has none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = [
            Pair(_view(row, "a"), _view(row, "b"), _tuple(row.get("axes")), _tuple(row.get("shape")), "map")
            for row in value["parameters"]
        ]
        return Names(pairs, dict(value.get("modules", {})))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no map of names ({error}); parity_tests/compare/pairing.py describes one") from error


def _view(row: dict[str, Any], side: str) -> View:
    return View(row[side], row.get(f"{side}_index"), _tuple(row.get(f"{side}_part")))


def _tuple(x: Any) -> Any:
    return None if x is None else tuple(x)


def find(a: Record, b: Record) -> Names:
    """Return the map of two runs. Raises UserError where two ways are possible."""
    starts = [{e.name: e.array() for e in record.all("parameter") if e.update == 0} for record in (a, b)]
    for i, record in enumerate((a, b)):  # a parameter without a start value is known by its first gradient
        for e in record.all("gradient"):
            if e.update == 0 and e.name not in starts[i]:
                starts[i][e.name] = e.array()
    orders = [_order(record, start) for record, start in zip((a, b), starts, strict=True)]
    pairs, notes = _parameters(starts[0], starts[1], orders[0], orders[1])
    used = {pair.a.name for pair in pairs}, {pair.b.name for pair in pairs}
    lonely = tuple([name for name in start if name not in known] for start, known in zip(starts, used, strict=True))
    names = Names(pairs, {}, notes, (lonely[0], lonely[1]))
    _straighten(names)
    names.modules = _modules(a, b, names.pairs)
    return names


def by_name(a: Arrays, b: Arrays) -> list[Pair]:
    """Pair parameters whose values differ, by names and shapes. Raises UserError where two ways are possible."""
    pairs, _ = _parameters(a, b, {}, {}, ("name",))
    sizes = [pair.a.of(a[pair.a.name]).size for pair in pairs]
    for pair, size in zip(pairs, sizes, strict=True):
        one, two = ([w for w in _words(view) if w.isdecimal()] for view in (pair.a, pair.b))
        if one and two and one != two and sizes.count(size) > 1:
            raise UserError(f"names: {pair.a} may be {pair.b}, but its number is another; give names=FILE with a map")
    return pairs


def _parameters(
    a: Arrays,
    b: Arrays,
    order_a: dict[str, int],
    order_b: dict[str, int],
    ways: tuple[str, ...] = ("value", "name"),
) -> tuple[list[Pair], list[str]]:
    """Pair whole arrays, then layers of stacks, then parts of joined ones: by value first, and then by name."""
    pairs: list[Pair] = []
    notes: list[str] = []
    taken: tuple[set[View], set[View]] = (set(), set())
    kinds = [("whole", "whole"), ("whole", "layer"), ("layer", "whole"), ("whole", "part"), ("part", "whole")]
    kinds += [("part", "layer"), ("layer", "part"), ("whole", "layer part"), ("layer part", "whole")]
    has_values = "value" not in ways  # of parts, names do not tell which is which
    for by in ways:
        for kind_a, kind_b in kinds:
            if by == "name" and "part" in kind_a + kind_b and has_values:
                continue
            groups: dict[Any, tuple[list[View], list[View]]] = {}
            for side, (arrays, kind, others) in enumerate(((a, kind_a, b), (b, kind_b, a))):
                for view, x in _views(arrays, kind, taken[side], _numbers_of_layers(others)):
                    shape = tuple(sorted(n for n in x.shape if n > 1)) if "value" in ways else ()  # or axes are joined
                    key = _fingerprint(x) if by == "value" else (x.size, shape)
                    groups.setdefault(key, ([], []))[side].append(view)
            for left, right in sorted((g for g in groups.values() if all(g)), key=lambda g: len(g[0]) * len(g[1])):
                left = [v for v in left if not _overlaps(v, taken[0])]
                right = [v for v in right if not _overlaps(v, taken[1])]
                for view_a, view_b, how in _matched(left, right, pairs, order_a, order_b, by, notes):
                    has_values |= by == "value"
                    taken[0].add(view_a)
                    taken[1].add(view_b)
                    x, y = view_a.of(a[view_a.name]), view_b.of(b[view_b.name])
                    layout = _layout(view_a, view_b, x, y) if "value" in ways else _named_layout(view_a, view_b, x, y)
                    pairs.append(Pair(view_a, view_b, *layout, by=how))
    places = {name: i for i, name in enumerate(a)}
    pairs.sort(key=lambda pair: (places[pair.a.name], pair.a.index or 0, pair.a.part or ()))
    return pairs, notes


def _views(arrays: Arrays, kind: str, taken: set[View], n_layers: set[int]) -> Iterable[tuple[View, np.ndarray]]:
    for name, x in arrays.items():
        views = [View(name)]
        if "layer" in kind:
            views = [View(name, i) for i in range(len(x))] if x.ndim > 1 and len(x) in n_layers else []
        if "part" in kind:
            views = [
                View(view.name, view.index, (axis, i * n, (i + 1) * n))
                for view in views
                for axis, length in enumerate(view.of(x).shape)
                for n_parts in (3, 2)  # queries, keys and values; a gate and what it gates
                if length % n_parts == 0 and length > n_parts
                for n in [length // n_parts]
                for i in range(n_parts)
            ]
        for view in views:
            if not _overlaps(view, taken):
                yield view, view.of(x)


def _numbers_of_layers(arrays: Arrays) -> set[int]:
    """Return how many layers the names of the other run number."""
    groups: dict[str, set[str]] = {}
    for name in arrays:
        for match in re.finditer(r"\d+", name):
            groups.setdefault(f"{name[: match.start()]}*{name[match.end() :]}", set()).add(match[0])
    return {len(x) for x in groups.values()}


def _overlaps(view: View, taken: set[View]) -> bool:
    for other in taken:
        if other.name == view.name and (None in (view.index, other.index) or view.index == other.index):
            if view.part is None or other.part is None or view.part == other.part or view.part[0] != other.part[0]:
                return True
    return False


def _fingerprint(x: np.ndarray) -> Any:
    """Return what any order of the elements leaves as it is, in few digits."""
    x = x.astype(np.float64)
    scale = float(np.abs(x).max(initial=0))
    if not np.isfinite(scale) or scale == 0:
        return x.size, scale
    y = x.ravel() / scale
    sums = [np.sum(y) / np.sqrt(y.size), np.sum(y * y) / y.size, np.sum(y**3) / np.sqrt(y.size), np.abs(y).mean()]
    return x.size, f"{scale:.4e}", *(round(float(s), 4) + 0.0 for s in sums)


def _matched(
    left: list[View],
    right: list[View],
    pairs: list[Pair],
    order_a: dict[str, int],
    order_b: dict[str, int],
    by: str,
    notes: list[str],
) -> list[tuple[View, View, str]]:
    """Return which of two groups of equal value, or of equal shape, belong together."""
    if len(left) == len(right) == 1:
        is_alike = by == "value" or _likeness(left[0], right[0], pairs) > 0
        return [(left[0], right[0], by)] if is_alike else []
    score = np.array([[_likeness(x, y, pairs) for y in right] for x in left], float)
    if not score.size:
        return []
    result, open_a, open_b = [], list(range(len(left))), list(range(len(right)))
    while open_a and open_b:
        part = score[np.ix_(open_a, open_b)]
        best = part.max()
        if best <= 0 and by == "name":
            break
        rows, columns = np.nonzero(part >= best - 1e-9)
        sole = [(i, j) for i, j in zip(rows, columns, strict=True) if (rows == i).sum() == (columns == j).sum() == 1]
        if not sole:
            tied_a, tied_b = ([opened[i] for i in sorted(set(x))] for opened, x in ((open_a, rows), (open_b, columns)))
            in_order = [
                sorted(tied, key=lambda i, v=views, o=order: (o.get(v[i].name, 0), v[i].index or 0, v[i].part or ()))  # type: ignore[misc]
                for tied, views, order in ((tied_a, left, order_a), (tied_b, right, order_b))
            ]
            places = [
                {order.get(views[i].name) for i in tied}
                for tied, views, order in ((tied_a, left, order_a), (tied_b, right, order_b))
            ]
            if len(tied_a) != len(tied_b) or any(None in x for x in places):
                both = [", ".join(str(views[i]) for i in tied[:4]) for tied, views in ((tied_a, left), (tied_b, right))]
                raise UserError(
                    f"names: two ways are possible: {both[0]} of A may be {both[1]} of B, which have the same "
                    f"{'values' if by == 'value' else 'shape'} and no name that tells; give names=FILE with a map, or "
                    "start from values that differ"
                )
            result += [(left[i], right[j], "order") for i, j in zip(*in_order, strict=True)]
            notes.append(f"paired by order alone: {', '.join(str(left[i]) for i in in_order[0][:4])}")
            open_a, open_b = ([i for i in x if i not in tied] for x, tied in ((open_a, tied_a), (open_b, tied_b)))
            continue
        for i, j in sole:
            result.append((left[open_a[i]], right[open_b[j]], by if by == "name" else "value and name"))
        open_a, open_b = (
            [x for n, x in enumerate(opened) if n not in {pair[side] for pair in sole}]
            for side, opened in enumerate((open_a, open_b))
        )
    return result


def _likeness(a: View, b: View, pairs: Sequence[Pair]) -> float:
    """Return how alike two names are; whose modules belong together already are alike."""
    x, y = _words(a), _words(b)
    common = len(set(x) & set(y)) / max(1, len(set(x) | set(y)))
    numbers = [[w for w in words if w.isdecimal()] for words in (x, y)]
    parents = {(_parent(p.a), _parent(p.b)) for p in pairs}
    mine = _parent(a), _parent(b)
    known = 10.0 * (mine in parents) - 10.0 * (
        mine not in parents and any(mine[0] == p[0] or mine[1] == p[1] for p in parents)
    )
    last = x[-1:] == y[-1:]
    bias = ("beta" in x[-1:] or "b" in x[-1:]) == ("beta" in y[-1:] or "b" in y[-1:])
    return common + 0.5 * last + 1.0 * (numbers[0] == numbers[1]) + 2.0 * bias - 1.5 + known


def _words(view: View) -> list[str]:
    text = re.sub(r"([a-z])([A-Z])", r"\1.\2", view.name)
    text = re.sub(r"([A-Za-z])(\d)", r"\1.\2", text)
    words = [w.lower() for w in re.split(r"[./_\s]+", text) if w]
    if view.index is not None:
        words.insert(max(1, len(words) - 2), str(view.index))
    return [_CANONICAL.get(w, w) for w in words]


def _parent(view: View) -> tuple[str, int | None]:
    return view.name.rpartition(".")[0], view.index


def _layout(view_a: View, view_b: View, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
    """Return the axes and the shape that bring y into the layout of x."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    options = []
    for axes in itertools.permutations(range(y.ndim)) if y.ndim <= 4 else [tuple(range(y.ndim))]:
        moved = y.transpose(axes)
        if moved.shape == x.shape or (moved.size == x.size and x.ndim != y.ndim):
            apart = float(np.linalg.norm(moved.reshape(x.shape) - x))
            plain = axes == tuple(range(y.ndim))
            options.append((apart, not plain, axes))
    if not options:
        return None, x.shape if y.size == x.size else None
    nearest = min(apart for apart, _, _ in options)
    near = [option for option in options if option[0] <= nearest + 1e-6 * np.linalg.norm(x)]
    if nearest > 1e-3 * np.linalg.norm(x) and x.ndim == 2 and _is_turned(view_a, view_b):
        near = [option for option in options if option[2] == (1, 0)] or near
    elif len(near) > 1 and x.ndim == 2 and _is_turned(view_a, view_b):
        near = [option for option in near if option[2] == (1, 0)] or near
    _, is_moved, axes = min(near, key=lambda option: option[1])
    return axes if is_moved else None, x.shape if x.ndim != y.ndim or y.transpose(axes).shape != x.shape else None


def _named_layout(view_a: View, view_b: View, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
    """Return the axes and the shape that bring y into the layout of x, by their names and shapes.

    A kernel has its output last, as [in, out], [in, heads, size], [heads, size, out] or [height, width, in, out]; a
    weight has it first. Raises UserError where more than one layout is possible.
    """
    n, ends = y.ndim, [view.name.rpartition(".")[2] for view in (view_a, view_b)]
    plain = tuple(range(n))
    turns = [(*range(i, n), *range(i)) for i in range(1, n)]
    if n == x.ndim > 1:
        turns = [(n - 1, n - 2, *range(n - 2)) if ends[1] == "kernel" else (*range(2, n), 1, 0)]
    fitting = [axes for axes in dict.fromkeys([plain, *turns]) if _is_merged(y.transpose(axes).shape, x.shape)]
    if len(fitting) > 1 and _is_turned(view_a, view_b):
        fitting.remove(plain)
    elif len(fitting) > 1 and (ends[0] == ends[1] or "embedding" in ends):
        fitting = [plain]
    if len(fitting) != 1:
        raise UserError(
            f"names: how {view_b} {list(y.shape)} is laid out as {view_a} {list(x.shape)} is not told by name and "
            "shape; give names=FILE with a map"
        )
    return None if fitting[0] == plain else fitting[0], None if x.ndim == y.ndim else x.shape


def _is_merged(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether neighbouring axes of the longer shape, multiplied, are the axes of the shorter one."""
    longer, shorter = sorted((shape, other), key=len, reverse=True)
    ends = [set(itertools.accumulate(x, lambda n, m: n * m)) for x in (longer, shorter)]
    return ends[1] <= ends[0] and math.prod(longer) == math.prod(shorter)


def _is_turned(a: View, b: View) -> bool:
    """Return whether the one is called as PyTorch's linear weights are, and the other as Flax's kernels."""
    ends = [view.name.rpartition(".")[2] for view in (a, b)]
    return "kernel" in ends and "weight" in ends


def _straighten(names: Names) -> None:
    """Where the values of numbered layers are in another order, pair by number, and say so."""
    stacks: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for i, pair in enumerate(names.pairs):
        views = (pair.a, pair.b)
        numbers = [re.findall(_NUMBER, v.name) if v.index is None else [v.index] for v in views]
        words = [{w for w in _words(v) if not w.isdecimal()} for v in views]
        is_alike = pair.b.index is not None or words[0] == words[1]  # or they number something else
        if pair.by in ("value", "value and name") and len(numbers[0]) == len(numbers[1]) == 1 and is_alike:
            key = re.sub(_NUMBER, "*", pair.a.name), re.sub(_NUMBER, "*", pair.b.name)
            stacks.setdefault(key, []).append((int(numbers[0][0]), int(numbers[1][0]), i))
    for stack in stacks.values():
        in_order = [names.pairs[i].b for _, _, i in sorted(stack, key=lambda row: row[1])]
        for (_, _, i), view in zip(sorted(stack), in_order, strict=True):
            pair = names.pairs[i]
            if pair.b != view:
                names.moved.append(f"{pair.a} has the values of {pair.b}")
                names.pairs[i] = dataclasses.replace(pair, b=view)


_NUMBER = r"(?<![^.])\d+(?![^.])"  # a whole part of a dotted name


def _order(record: Record, start: Arrays) -> dict[str, int]:
    """Return where the module of each parameter stands in the order of execution."""
    first: dict[str, int] = {}
    for e in record.all("activation"):
        first.setdefault(e.name, e.number)
    result = {}
    for i, name in enumerate(start):
        parent = name.rpartition(".")[0]
        found = [n for module, n in first.items() if module == parent or re.sub(r"\.\d+", "", module) == parent]
        if found or not first:
            result[name] = min(found) if found else i
    return result


def shown(view: View, modules: Collection[str]) -> str:
    """Return the module of a parameter, as its activations are called: a layer of a stack has its number in it.

    A stack may have no parameters of some layers: then the n-th is that of the n-th layer that has such a module.
    """
    parts = view.name.split(".")[:-1]
    if view.index is None:
        return ".".join(parts)
    for i in range(len(parts), 0, -1):
        start, end = ".".join(parts[:i]) + ".", "".join(f".{part}" for part in parts[i:])
        inside = [x[len(start) : len(x) - len(end)] for x in modules if x.startswith(start) and x.endswith(end)]
        numbers = sorted(int(x) for x in inside if x.isdecimal())
        if view.index < len(numbers):
            return f"{start}{numbers[view.index]}{end}"
    return ".".join([*parts[:1], str(view.index), *parts[1:]])


def _modules(a: Record, b: Record, pairs: list[Pair]) -> dict[str, str]:
    """Return which module of A is which of B: whose parameters are the same, and of the others by name and value."""
    listed = [list(dict.fromkeys(e.name for e in record.all("activation"))) for record in (a, b)]
    known = [set(x) for x in listed]
    result: dict[str, str] = {}
    inside: list[dict[str, set[int]]] = [{}, {}]
    for i, pair in enumerate(pairs):
        places = [shown(view, modules) for view, modules in zip((pair.a, pair.b), listed, strict=True)]
        if all(place in modules for place, modules in zip(places, known, strict=True)) and pair.a.part is None:
            result.setdefault(places[0], places[1])
        for side, place in enumerate(places):
            parts = place.split(".")
            for n in range(len(parts) + 1):
                inside[side].setdefault(".".join(parts[:n]), set()).add(i)
    # A module whose own parameter is another module's in B may do less than that one, as a table of positions.
    result = {x: y for x, y in result.items() if inside[0].get(x) == inside[1].get(y)}
    for name in listed[0]:
        if name not in result and name in known[1] and inside[0].get(name, 0) == inside[1].get(name, 1):
            result[name] = name
    for name in sorted(listed[0], key=lambda name: name.count(".")):
        mine = inside[0].get(name)
        alike = [x for x in listed[1] if mine and inside[1].get(x) == mine and x not in result.values()]
        if name not in result and alike:
            result[name] = min(alike, key=lambda x: x.count("."))
    sizes = [{e.name: np.prod(e.shape) for e in record.all("activation")} for record in (a, b)]
    for name in listed[0]:
        if name not in result and name not in result.values() and sizes[0][name] == sizes[1].get(name):
            result[name] = name
    values: list[dict[Any, list[str]]] = [{}, {}]
    for side, record in enumerate((a, b)):
        taken = set(result) if side == 0 else set(result.values())
        inputs = {e.name: _fingerprint(e.array()) for e in record.all("input") if e.update == e.call == 0}
        for e in record.all("activation"):
            if e.name not in taken and e.update == e.call == 0 and e.source is e:
                values[side].setdefault((_fingerprint(e.array()), inputs.get(e.name)), []).append(e.name)
    for key, names in values[0].items():
        if len(names) == 1 and len(values[1].get(key, [])) == 1:
            result[names[0]] = values[1][key][0]
    return {name: result[name] for name in listed[0] if name in result}
