"""Compares two records in the order of execution, and finds where they part first.

How far two arrays may be apart comes from rounding. Where records of the same program are given that differ in rounding
alone (float64, another order of summation: another number of threads, weights off by a rounding), it is ROOM times the
largest difference among them, array by array. Otherwise it is estimated: each operation of n terms is off by about the
root of n roundings, and those of all operations before it add up as a random walk.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parity_tests.compare.pairing import Names, Pair, shown
from parity_tests.record.files import Entry, Record

ROOM = 8  # times the rounding that was measured
VISIBLE = 1e-4  # a relative change that each comparison should see
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# The order in which an update computes them, by which the first divergence is chosen.
STAGES = ("parameter", "batch", "forward", "loss", "gradient", "rate", "moment", "update")
FIRST_MOMENTS, SECOND_MOMENTS = ("exp_avg", "mu", "m", "momentum_buffer", "trace"), ("exp_avg_sq", "nu", "v")


@dataclasses.dataclass(frozen=True)
class Finding:
    """How far one array of B is from A's."""

    update: int
    stage: str
    name: str  # A's
    kind: str
    call: int
    difference: float
    tolerance: float
    place: int  # in A's order of execution
    note: str = ""

    @property
    def passes(self) -> bool:
        """Return whether the difference is within its tolerance; NaN is not."""
        return self.difference <= self.tolerance

    @property
    def order(self) -> tuple[int, int, int]:
        return self.update, STAGES.index(self.stage), self.place


class Side:
    """A record, by what its arrays are; B's in A's layout."""

    def __init__(self, record: Record, names: Names, is_b: bool):
        self.record, self.names, self.is_b = record, names, is_b
        self.entries: dict[tuple[int, str, str, int], Entry] = {}
        modules = {b: a for a, b in names.modules.items()} if is_b else {}
        for e in record.entries:
            name, number = e.name, ""
            if e.kind in ("input", "activation"):
                name, mark, number = e.name.partition("#")
                name = (modules.get(name, f"?{name}" if is_b else name)) + mark + number
            self.entries[e.update, e.kind, name, e.call] = e
        self.n_updates = 1 + max((e.update for e in record.all("gradient", "loss", "rate")), default=-1)
        self.rates: dict[str, dict[int, float]] = {}  # of each group of parameters
        for e in record.all("rate"):
            self.rates.setdefault(e.name, {})[e.update] = float(e.array())
        self.group = next(iter(self.rates), "")  # whose rate is compared
        moment = {e.name.partition("/")[0] for e in record.all("moment")}
        self.slots = [
            next((s for s in moment if s.rpartition(".")[2] in known), "") for known in (FIRST_MOMENTS, SECOND_MOMENTS)
        ]

    def get(self, update: int, kind: str, name: str, call: int = 0) -> np.ndarray | None:
        e = self.entries.get((update, kind, name, call))
        return None if e is None else e.array()

    def tensor(self, kind: str, update: int, pair: Pair, slot: str = "") -> np.ndarray | None:
        """Return a parameter, its gradient or its moment, float64, in A's layout."""
        view = pair.b if self.is_b else pair.a
        x = self.get(update, kind, slot + view.name)
        if x is None or x.ndim < (view.index is not None) or (kind == "moment" and x.ndim == 0):
            return None
        try:
            return (pair.laid_out(x) if self.is_b else view.of(x)).astype(np.float64)
        except (ValueError, IndexError):
            return None

    def rate(self, update: int) -> float:
        """Return the learning rate of an update; NaN if there is none."""
        return self.rates.get(self.group, {}).get(update, math.nan)


def choose_groups(a: Side, b: Side) -> None:
    """Compare the rates of those groups that are nearest: one side may list more, as layers with rates of their own.

    What else a group has shows in its updates.
    """

    def difference(pair: tuple[str, str]) -> float:
        one, two = a.rates[pair[0]], b.rates[pair[1]]
        return sum(abs(one[i] - two[i]) for i in one.keys() & two.keys())

    pairs = list(itertools.product(a.rates, b.rates))
    a.group, b.group = min(pairs, key=difference, default=(a.group, b.group))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Return how far two arrays are apart: of the norm and of the largest element, what is more."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if a.shape != b.shape:
        return math.inf
    finite = np.isfinite(b)
    if not (finite == np.isfinite(a)).all() or not (np.isnan(a) == np.isnan(b)).all():
        return math.inf
    a, b = a[finite], b[finite]
    if not a.size or np.array_equal(a, b):
        return 0.0
    scales = float(np.linalg.norm(b)), float(np.abs(b).max())
    differences = float(np.linalg.norm(a - b)), float(np.abs(a - b).max())
    return max(x / y if y else math.inf for x, y in zip(differences, scales, strict=True))


def aligned(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two activations in one layout: of chunks [1, rows, D], those rows that both have; else as `like`."""
    if a.ndim == b.ndim == 3 and a.shape[-1] == b.shape[-1] and a.size != b.size and 1 in (len(a), len(b)):
        n = min(x.size // x.shape[-1] for x in (a, b))
        return a.reshape(-1, a.shape[-1])[:n], b.reshape(-1, b.shape[-1])[:n]
    return a, like(a, b)


def like(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return B's activation in A's layout: without axes of length 1, or with axes in another order."""
    if a.shape == b.shape or a.size != b.size:
        return b
    sides = [[n for n in x.shape if n > 1] for x in (a, b)]
    if sides[0] == sides[1]:
        return b.reshape(a.shape)
    squeezed = b.reshape(sides[1])
    if sorted(sides[0]) != sorted(sides[1]):
        return b.reshape(a.shape) if a.shape[-1:] == b.shape[-1:] else b
    fits = [axes for axes in itertools.permutations(range(len(sides[1]))) if [sides[1][i] for i in axes] == sides[0]]
    moved = [squeezed.transpose(axes).reshape(a.shape) for axes in fits]
    return min(moved, key=lambda x: np.linalg.norm(x.astype(np.float64) - a))


@dataclasses.dataclass
class Bounds:
    """How far arrays may be apart; `measured` is from records that differ in rounding alone."""

    epsilon: float
    width: int
    floors: dict[tuple[int, str], float]
    measured: dict[tuple[int, str, str, int], float] | None = None
    n_forward: int = 1

    def of(self, update: int, stage: str, kind: str, name: str, call: int, place: int) -> float:
        if stage in ("parameter", "batch"):
            return 4 * self.epsilon if stage == "parameter" else 0.0
        if stage == "rate":
            return 8 * max(self.epsilon, EPSILON["float32"])
        if self.measured is not None:
            known = self.measured.get((update, kind, name, call))
            if known is not None:
                return ROOM * max(known, self.epsilon)
        depth = place if stage == "forward" else self.n_forward * (1 if stage == "loss" else 2)
        bound = 2 * self.epsilon * math.sqrt(max(1, depth) * self.width)
        if stage == "loss":
            bound = 4 * self.epsilon * math.sqrt(max(1, depth))
        if stage == "update":
            bound *= 20  # Adam divides by the size of a gradient, so that small elements have its rounding in full
        return bound * (1 + 4 * update)


def measured(records: Sequence[Record]) -> dict[tuple[int, str, str, int], float]:
    """Return by how much rounding moves each array of records of one program; the first is the one compared."""
    first, *others = records
    empty = Names([], {})
    sides = [Side(record, empty, False) for record in (first, *others)]
    result = {}
    for key, e in sides[0].entries.items():
        if e.is_number and e.kind != "parameter":
            x = e.array()
            same = [side.entries[key].array() for side in sides[1:] if key in side.entries]
            result[key] = max([apart(x, y) for y in same if x.shape == y.shape], default=0.0)
    for pair_name in {e.name for e in first.all("parameter")}:
        for update in range(sides[0].n_updates):
            steps = [
                _step(side.get(update, "parameter", pair_name), side.get(update + 1, "parameter", pair_name))
                for side in sides
            ]
            if steps[0] is not None:
                result[update, "update", pair_name, 0] = max(
                    [apart(steps[0], x) for x in steps[1:] if x is not None], default=0.0
                )
    return result


def _step(before: Any, after: Any) -> np.ndarray | None:
    return None if before is None or after is None else after.astype(np.float64) - before.astype(np.float64)


def bounds_of(a: Side, b: Side, rounding: Sequence[Record]) -> Bounds:
    """Return the bounds of a comparison."""
    types = {e.dtype for side in (a, b) for e in side.record.all("activation", "gradient", "parameter")}
    epsilon = max((EPSILON.get(t, 0.0) for t in types), default=0.0) or EPSILON["float32"]
    widths = [max(e.shape) for e in a.record.all("parameter") if e.update == 0 and len(e.shape) > 1]
    floors: dict[tuple[int, str], float] = {}
    for e in a.record.all("gradient", "moment"):
        key = e.update, e.kind if e.kind == "gradient" else e.name.partition("/")[0]
        floors[key] = math.hypot(floors.get(key, 0.0), float(np.linalg.norm(e.array().astype(np.float64))))
    n_forward = sum(e.update == 0 for e in a.record.all("activation", "input"))
    width = int(np.median(widths)) if widths else 64
    return Bounds(epsilon, width, floors, measured([a.record, *rounding]) if rounding else None, max(1, n_forward))


def findings(a: Side, b: Side, bounds: Bounds) -> Iterator[Finding]:
    """Yield all comparisons."""
    yield from _parameters(a, b, bounds)
    place, last = 0, -1
    noise = _noise(a, b, bounds)
    for e in a.record.all("input", "activation", "batch", "loss"):
        place = place + 1 if e.update == last else 0
        last = e.update
        other = b.entries.get((e.update, e.kind, e.name, e.call))
        if other is None:
            continue
        stage = {"batch": "batch", "loss": "loss"}.get(e.kind, "forward")
        if not e.is_number and e.kind != "batch":
            stage = "batch"
        if e.name == "grad_norm":  # what it is of comes first
            stage = "update"
        finding = _compared(e, other, stage, bounds, place)
        if shift := noise.get((e.update, e.name)) if e.kind == "activation" else 0.0:
            extra = 2 * shift / max(float(np.abs(e.array()).max(initial=0)), 1e-300)
            finding = dataclasses.replace(finding, tolerance=finding.tolerance + extra)
        yield finding
    yield from _updates(a, b, bounds)


def _noise(a: Side, b: Side, bounds: Bounds) -> dict[tuple[int, str], float]:
    """Return how far apart parameters of a module are whose gradient is nothing but rounding.

    The bias of keys is one: it shifts all scores of a query alike. What such a parameter does to its module's output is
    no divergence.
    """
    modules = [e.name for e in a.record.all("activation")]
    result: dict[tuple[int, str], float] = {}
    for update in range(1, min(a.n_updates, b.n_updates) + 1):
        floor = bounds.floors.get((update - 1, "gradient"), 0.0)
        for pair in a.names.pairs:
            x, y = (side.tensor("parameter", update, pair) for side in (a, b))
            g = a.tensor("gradient", update - 1, pair)
            if g is not None and x is not None and y is not None and x.shape == y.shape:
                if np.linalg.norm(g) < 100 * bounds.epsilon * floor:
                    key = update, shown(pair.a, modules)
                    result[key] = max(result.get(key, 0.0), float(np.abs(x - y).max(initial=0)))
    return result


def _compared(e: Entry, other: Entry, stage: str, bounds: Bounds, place: int) -> Finding:
    x, y = aligned(e.array(), other.array())
    difference = apart(x, y) if x.shape == y.shape else math.inf
    note = "" if x.shape == y.shape else f"shapes {list(e.shape)} and {list(other.shape)}"
    if e.sketch and other.sketch and math.isfinite(difference):
        sums = [np.array([z.sketch["norm"], *z.sketch["projections"]]) for z in (e, other) if z.sketch]
        difference = max(difference, float(np.abs(sums[0] - sums[1]).max() / max(sums[1][0], 1e-300)))
    tolerance = bounds.of(e.update, stage, e.kind, e.name, e.call, place)
    return Finding(e.update, stage, e.name, e.kind, e.call, difference, tolerance, place, note)


def _parameters(a: Side, b: Side, bounds: Bounds) -> Iterator[Finding]:
    for i, pair in enumerate(a.names.pairs):
        x, y = a.tensor("parameter", 0, pair), b.tensor("parameter", 0, pair)
        if x is not None and y is not None:
            difference = apart(x, y)
            bound = bounds.of(0, "parameter", "parameter", pair.a.name, 0, i)
            yield Finding(0, "parameter", str(pair.a), "parameter", 0, difference, bound, i)


def _updates(a: Side, b: Side, bounds: Bounds) -> Iterator[Finding]:
    pairs = a.names.pairs
    n = len(pairs)
    for update in range(min(a.n_updates, b.n_updates)):
        rates = [side.rate(update) for side in (a, b)]
        has_gradients = all(any(e.update == update for e in side.record.all("gradient")) for side in (a, b))
        if not math.isnan(rates[0] + rates[1]):
            difference = _relative(*rates)
            tolerance = bounds.of(update, "rate", "rate", "group 0", 0, 0)
            yield Finding(update, "rate", "learning rate", "rate", 0, difference, tolerance, 0)
        for i, pair in enumerate(pairs):
            grads = [side.tensor("gradient", update, pair) for side in (a, b)]
            if has_gradients and (grads[0] is not None or grads[1] is not None):
                # Backward: what is last in the model comes first.
                yield _tensor(
                    update, "gradient", pair, grads, bounds, n - i, bounds.floors.get((update, "gradient"), 0.0)
                )
            for kind, (slot_a, slot_b) in enumerate(zip(a.slots, b.slots, strict=True)):
                if slot_a and slot_b:
                    moments = [side.tensor("moment", update, pair, f"{s}/") for side, s in ((a, slot_a), (b, slot_b))]
                    if moments[0] is not None and moments[1] is not None:
                        floor = bounds.floors.get((update, slot_a), 0.0)
                        yield _tensor(update, "moment", pair, moments, bounds, i + n * kind, floor, slot_a)
            steps, values = [], []
            for side in (a, b):
                before, after = (side.tensor("parameter", update + k, pair) for k in (0, 1))
                steps.append(_step(before, after))
                values.append(0 if before is None or after is None else np.maximum(np.abs(before), np.abs(after)))
            if steps[0] is not None and steps[1] is not None:
                yield _movement(update, pair, steps, values, grads, bounds, i)


def _tensor(
    update: int, stage: str, pair: Pair, x: Sequence[Any], bounds: Bounds, place: int, floor: float, slot: str = ""
) -> Finding:
    name = str(pair.a)
    key = f"{slot}/{pair.a.name}" if slot else pair.a.name
    tolerance = bounds.of(update, stage, stage, key, 0, place)
    if x[0] is None or x[1] is None:
        which = "B" if x[0] is None else "A"
        other = x[1] if x[0] is None else x[0]
        difference = math.inf if np.any(other) else 0.0
        note = f"only {which} has a {stage}"
    else:
        difference, note = apart(x[0], x[1]), slot
        norm = float(np.linalg.norm(x[1]))
        # What is nothing but the rounding of a sum, as of the bias of keys, is as far apart as others are rounded.
        if norm and floor and math.isfinite(difference):
            tolerance = max(tolerance, 4 * bounds.epsilon * floor / norm)
    return Finding(
        update, stage, name, "gradient" if stage == "gradient" else stage, 0, difference, tolerance, place, note
    )


def _movement(
    update: int,
    pair: Pair,
    steps: Sequence[Any],
    values: Sequence[Any],
    grads: Sequence[Any],
    bounds: Bounds,
    place: int,
) -> Finding:
    """Compare how a parameter has moved, where its gradient is more than rounding."""
    x, y = steps
    if x.shape != y.shape:
        return Finding(update, "update", str(pair.a), "update", 0, math.inf, 0.0, place, "shapes")
    is_firm = np.ones(x.shape, bool)
    if grads[0] is not None and grads[0].shape == x.shape:
        size = np.abs(grads[0])
        is_firm = size >= 0.1 * np.sqrt(np.mean(size**2))
        floor = bounds.floors.get((update, "gradient"), 0.0)
        is_firm &= size >= 1e3 * bounds.epsilon * floor / math.sqrt(size.size)
    stored = 2 * bounds.epsilon * np.maximum(*values)  # a parameter is rounded when it is stored
    difference = np.maximum(np.abs(x - y) - stored, 0)[is_firm]
    scale = float(np.linalg.norm(y[is_firm])), float(np.abs(y[is_firm]).max(initial=0))
    measured = float(np.linalg.norm(difference)), float(difference.max(initial=0))
    ratio = max(p / q if q else (math.inf if p else 0.0) for p, q in zip(measured, scale, strict=True))
    ratio = math.inf if not np.isfinite(x - y).all() and np.isfinite(x).all() != np.isfinite(y).all() else ratio
    tolerance = bounds.of(update, "update", "update", pair.a.name, 0, place)
    return Finding(update, "update", str(pair.a), "update", 0, ratio, tolerance, place)


def _relative(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b) / abs(b) if b else math.inf


def unseen(a: Side, b: Side, found: Sequence[Finding]) -> list[str]:
    """Return what this comparison cannot see."""
    notes = []
    names = a.names
    for which, lonely in (("A", names.lonely[0]), ("B", names.lonely[1])):
        if lonely:
            notes.append(f"only {which} has the parameters {', '.join(lonely[:4])}" + (", ..." if lonely[4:] else ""))
    modules = {e.name.partition("#")[0] for e in a.record.all("activation")}
    if lost := [x for x in modules if x not in names.modules]:
        notes.append(f"no module of B is known to be {', '.join(sorted(lost)[:4])}" + (", ..." if lost[4:] else ""))
    for side, which in ((a, "A"), (b, "B")):
        if not any(side.record.all("activation")):
            notes.append(f"{which} has no activation; nothing tells which module goes wrong")
        for kind in ("gradient", "loss"):
            if not any(side.record.all(kind)):
                notes.append(f"{which} has no {kind}" + ("; hand it to step" if which == "B" else ""))
    dead = [
        e.name for e in a.record.all("input", "activation") if e.is_number and e.update == 0 and not np.any(e.array())
    ]
    if dead:
        notes.append(f"all zero: {', '.join(sorted(set(dead))[:4])}; what comes after is not tested")
    ids = [e for e in a.record.all("input", "batch") if not e.is_number and e.update == 0 and len(e.shape) > 1]
    if ids and all(e.array().min() == e.array().max() for e in ids[:1]):
        notes.append("all inputs are the same number; the embedding and positions are hardly tested")
    zero = []
    for pair in names.pairs:
        x = a.tensor("gradient", 0, pair)
        if x is not None and not x.any():
            zero.append(str(pair.a))
    if zero:
        notes.append(
            f"zero gradients: {', '.join(zero[:4])}" + (", ..." if zero[4:] else "") + "; their use is not tested"
        )
    droppers = [
        f"{which}'s {e.name}"
        for side, which in ((a, "A"), (b, "B"))
        for e in side.record.all("activation")
        if e.update == 0 and "ropout" in str(e.info.get("class")) and _drops(e.info)
    ]
    if droppers:
        notes.append(f"dropout is active: {', '.join(droppers[:3])}; give both the same masks, or a rate of 0")
    n = min(a.n_updates, b.n_updates)
    if 0 < n < 3:
        notes.append(f"{n} update{'s' * (n > 1)}: the schedule, bias correction and decay show after three or more")
    rates = [float(e.array()) for e in a.record.all("rate")]
    if rates and not any(rates):
        notes.append("the learning rate is 0 throughout; nothing is updated")
    elif n and not any(a.record.all("rate")):
        notes.append("no learning rate is recorded")
    lengths = [e.shape[1] for e in ids if len(e.shape) == 2]
    if lengths and max(lengths) < 32:
        notes.append(
            f"inputs of at most {max(lengths)} positions: a wrong base of positions may show on longer ones only"
        )
    blind = [x for x in found if x.tolerance >= VISIBLE and x.stage not in ("batch", "parameter")]
    if blind:
        names_of = ", ".join(dict.fromkeys(f"{x.stage} {x.name}" for x in blind[:3]))
        notes.append(
            f"{len(blind)} of {len(found)} numbers may differ by 1e-4 and more, so that a factor of 1.0001 is not seen "
            f"({names_of}); record in float64, or give rounding="
        )
    return notes


def _drops(info: dict[str, Any]) -> bool:
    rate = next((info[k] for k in ("p", "rate") if isinstance(info.get(k), float | int)), 0)
    is_off = info.get("training") is False or info.get("deterministic") is True or info.get("inference") is True
    return bool(rate) and not is_off


__all__ = ["Bounds", "Finding", "Side", "apart", "bounds_of", "findings", "aligned", "measured", "shown", "unseen"]
