"""Names the likeliest cause of a first divergence, from the shape of the difference.

Where two arrays part although all that went into them agrees, each side is computed again in NumPy by the formulas that
the place allows: those of a catalogue of what goes wrong in ports. A formula explains a side where it is ten times
nearer to it than the other side is. If both sides have one, the two name the cause; what only fits one is listed after.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from parity_tests.compare.attention import ATTENTION_KINDS, Attention
from parity_tests.compare.divergence import Finding, Side, aligned
from parity_tests.compare.pairing import Pair, shown

NEAR = 0.1  # of the difference of both sides: a formula that is as near to one explains it
MOST_ELEMENTS = 20_000  # of an array, where a formula needs no more


@dataclasses.dataclass(frozen=True)
class Cause:
    """What may be wrong. `kind` is one of a few, as the table of the page has them."""

    kind: str
    text: str
    score: float


@dataclasses.dataclass(frozen=True)
class Formula:
    """A way to compute an array; `kind` is the cause where one side has it and the other has not, "" if it is usual."""

    kind: str
    text: str
    array: np.ndarray


def causes(a: Side, b: Side, found: list[Finding], first: Finding) -> list[Cause]:
    """Return the likeliest causes of the first divergence, the likeliest first, each kind once."""
    by_stage: dict[str, Callable[..., Iterable[Cause]]] = {
        "parameter": _of_start,
        "batch": _of_batch,
        "forward": _of_forward,
        "loss": _of_loss,
        "gradient": _of_gradient,
        "rate": _of_rate,
        "moment": _of_moment,
        "update": _of_update,
    }
    with np.errstate(all="ignore"):
        of_stage = _of_loss if first.kind == "loss" else by_stage[first.stage]
        listed = [*_of_modes(a, b, first), *of_stage(a, b, found, first)]
    best: dict[str, Cause] = {}
    for cause in sorted(listed, key=lambda cause: -cause.score):
        best.setdefault(cause.kind, cause)
    return list(best.values())[:5]


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the norm of a difference where both are finite; infinite where that is not at the same places."""
    if x.shape != y.shape:
        return math.inf
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)):
        return math.inf
    return float(np.linalg.norm(x[finite] - y[finite]))


def explained(a: np.ndarray, b: np.ndarray, formulas: Iterable[Formula], where: str) -> Iterator[Cause]:
    """Yield the causes that formulas of both sides name."""
    apart = distance(a, b)
    if not np.isfinite(apart):  # so that any formula that is finite at the right places is near
        apart = min(float(np.linalg.norm(x[np.isfinite(x)])) for x in (a, b)) or 1.0
    near: list[list[tuple[float, Formula]]] = [[], []]
    for formula in formulas:
        for side, x in zip(near, (a, b), strict=True):
            d = distance(formula.array, x)
            if d < NEAR * apart:
                side.append((d, formula))
    best = [min(side, key=lambda x: (x[0] > 1e-3 * apart, x[1].kind != "", x[0]), default=None) for side in near]
    if best[0] and best[1]:
        one, two = best[0][1], best[1][1]
        kind = two.kind or one.kind or "another formula"
        yield Cause(kind, f"{where}: B {two.text}, A {one.text}", 1.0)
    elif best[1] and best[1][1].kind:
        yield Cause(best[1][1].kind, f"{where}: B {best[1][1].text}, which A does not", 0.7)
    elif best[0] and best[0][1].kind:
        yield Cause(best[0][1].kind, f"{where}: A {best[0][1].text}, which B does not", 0.6)


# What any place may have


def _of_modes(a: Side, b: Side, first: Finding) -> Iterator[Cause]:
    infos = [
        {key[2].partition("#")[0]: e.info for key, e in side.entries.items() if key[1] == "activation" and e.info}
        for side in (a, b)
    ]
    for name in infos[0].keys() & infos[1].keys():
        one, two = (x[name] for x in infos)
        rates = [next((x[k] for k in ("p", "rate") if k in x), None) for x in (one, two)]
        if "ropout" in str(one.get("class")) and rates[0] != rates[1] and None not in rates:
            yield Cause("dropout rate", f"{name}: dropout of {rates[1]} in B, of {rates[0]} in A", 0.5)


# Start, and the batch


def _of_start(a: Side, b: Side, found: list[Finding], first: Finding) -> Iterator[Cause]:
    if a.names.moved:
        yield Cause("layer order", f"parameters are in another place: {'; '.join(a.names.moved[:3])}", 1.0)
    failed = {x.name for x in found if x.stage == "parameter" and not x.passes}
    pairs = [pair for pair in a.names.pairs if str(pair.a) in failed]
    n_all = sum(x.stage == "parameter" for x in found)
    for pair in pairs:
        x, y = a.tensor("parameter", 0, pair), b.tensor("parameter", 0, pair)
        assert x is not None and y is not None
        if x.ndim == 2 and x.shape == y.shape[::-1] and distance(x, y.T) < NEAR * (distance(x, y) or 1.0):
            yield Cause("transposed kernel", f"{pair.a} is {pair.b} transposed", 0.95)
        apart = np.abs(x - y) if x.shape == y.shape else np.zeros(x.shape)
        rows = np.flatnonzero(apart.max(axis=tuple(range(1, x.ndim))) > 0)
        if x.ndim > 1 and 0 < len(rows) <= 2 < len(x):
            kind = "pad row" if not x[rows].any() or not y[rows].any() else "rows of a parameter"
            yield Cause(kind, f"{pair.a}: only row {', '.join(map(str, rows))} differs", 0.9)
        if sizes := _drawn_otherwise(x, y):
            yield Cause("start values", f"{pair.a}: start values of another distribution: {sizes}", 0.8)
        ratio = _ratio(x, y)
        if ratio and abs(ratio - 1) > 1e-6:
            yield Cause("scaled parameter", f"{pair.a}: B's is {ratio:.6g} times A's", 0.85)
    if len(pairs) > 0.5 * n_all:
        yield Cause("other weights", "most start values differ: B has not been given A's weights", 0.4)


def _drawn_otherwise(x: np.ndarray, y: np.ndarray) -> str:
    """Return how two samples differ in their distribution, or "" if they do not."""
    n = min(x.size, y.size)
    stds = float(x.std()), float(y.std())
    if min(stds) < 1e-12 or n < 8:
        if max(stds) < 1e-12 and abs(x.mean() - y.mean()) < 1e-12:
            return ""
        return f"standard deviation {stds[1]:.3g} in B, {stds[0]:.3g} in A" if abs(stds[0] - stds[1]) > 1e-12 else ""
    kurtoses = [float(np.mean(((z - z.mean()) / z.std()) ** 4)) for z in (x, y)]
    if abs(math.log(stds[1] / stds[0])) > 5 * (1.5 / n) ** 0.5:
        return f"standard deviation {stds[1]:.3g} in B, {stds[0]:.3g} in A"
    if abs(kurtoses[0] - kurtoses[1]) > 0.6 and n > 400:
        shapes = ["uniform" if k < 2.3 else "normal" for k in kurtoses]
        return f"{shapes[1]} in B, {shapes[0]} in A"
    return ""


def _of_batch(a: Side, b: Side, found: list[Finding], first: Finding) -> Iterator[Cause]:
    x, y = (side.get(first.update, first.kind, first.name, first.call) for side in (a, b))
    if x is None or y is None:
        return
    name = first.name or "the input"
    if x.shape != y.shape:
        yield Cause("batch", f"{name} has the shape {list(y.shape)} in B, {list(x.shape)} in A", 0.9)
        return
    differ = x != y
    ignored = (x < 0) != (y < 0)
    if "label" in name and (differ == ignored).all():
        n = [int((z >= 0).sum()) for z in (x, y)]
        where = "more" if n[1] > n[0] else "fewer"
        yield Cause(
            "labels", f"{name}: B counts {where} labels ({n[1]}, A {n[0]}): another part of the text is learned", 1.0
        )
    for shift in (1, -1):
        if x.ndim and (np.roll(x, shift, -1) == y)[..., 1:-1].mean() > 0.9:
            yield Cause(
                "label shift" if "label" in name else "shifted input", f"{name}: B's are A's shifted by {shift}", 1.0
            )
    if x.ndim > 1 and np.array_equal(np.sort(x, axis=-1), np.sort(y, axis=-1)):
        yield Cause(
            "padding side", f"{name}: B's rows are A's in another order, as with padding on the other side", 0.9
        )
    kind = "labels" if "label" in name else "batch"
    yield Cause(kind, f"{name} differs at {int(differ.sum())} of {differ.size} places", 0.5)


# Forward


class _Place:
    """The first array that differs, and what was computed before it, which agrees."""

    def __init__(self, a: Side, b: Side, first: Finding):
        self.a, self.b, self.first = a, b, first
        self.module = first.name.partition("#")[0]
        self.x, self.y = aligned(*(self._array(side, first.kind, first.name) for side in (a, b)))
        self.tokens = self._tokens()
        self.where = f"{'input of ' if first.kind == 'input' else ''}{self.module or 'the model'}"

    def _array(self, side: Side, kind: str, name: str) -> np.ndarray:
        x = side.get(self.first.update, kind, name, self.first.call)
        assert x is not None
        return x.astype(np.float64) if x.dtype.kind == "f" else x

    def _tokens(self) -> np.ndarray | None:
        keys = [("input", ""), ("batch", "tokens"), ("batch", "input_ids"), ("batch", "ids")]
        for kind, name in keys:
            x = self.a.get(self.first.update, kind, name, self.first.call)
            if x is not None and x.dtype.kind in "iu" and x.ndim == 2:
                return x.astype(np.int64)
        return None

    def input(self) -> np.ndarray | None:
        """Return what A's module got."""
        x = self.a.get(self.first.update, "input", self.module, self.first.call)
        return None if x is None else x.astype(np.float64)

    def source(self, side: Side) -> Any:
        """Return the entry that the array comes from."""
        return side.entries[self.first.update, self.first.kind, self.first.name, self.first.call].source

    def earlier(self, n: int) -> list[tuple[str, np.ndarray]]:
        """Return the last n arrays of A before this one, the latest first, each once."""
        me = self.a.entries[self.first.update, self.first.kind, self.first.name, self.first.call].number
        result: list[tuple[str, np.ndarray]] = []
        for e in reversed(self.a.record.entries[:me]):
            if e.update == self.first.update and e.kind in ("input", "activation") and e.is_number and e.source is e:
                if self.b.entries.get((e.update, e.kind, e.name, e.call)) is not None:
                    label = f"the {'input' if e.kind == 'input' else 'output'} of {e.name or 'the model'}"
                    result.append((label, e.array().astype(np.float64)))
                    if len(result) == n:
                        break
        return result

    def parameters(self, module: str) -> dict[str, np.ndarray]:
        """Return A's parameters of a module, by the last part of their names."""
        modules = [name for _, kind, name, _ in self.a.entries if kind == "activation"]
        found = {}
        for pair in self.a.names.pairs:
            if shown(pair.a, modules) == module:
                x = self.a.tensor("parameter", self.first.update, pair)
                if x is not None:
                    found[pair.a.name.rpartition(".")[2]] = x
        return found


def _of_forward(a: Side, b: Side, found: list[Finding], first: Finding) -> Iterator[Cause]:
    place = _Place(a, b, first)
    x, y = place.x, place.y
    if x.shape != y.shape:
        yield Cause("shape", f"{place.where}: shape {list(y.shape)} in B, {list(x.shape)} in A", 0.8)
        yield from _of_other_positions(place)
        return
    yield from _of_numbers(place)
    yield from _of_sources(place)
    if first.kind == "activation" and not first.name.count("#"):
        yield from explained(x, y, _module_formulas(place), place.where)
    yield from explained(x, y, _composed(place), place.where)
    yield from _of_attention(place)
    yield from _of_embedding(place)
    yield from _of_skipped(place)
    yield from _of_dropout(place)
    yield from _of_shape(place)


def _of_numbers(place: _Place) -> Iterator[Cause]:
    x, y = place.x, place.y
    bad = [~np.isfinite(z) for z in (x, y)]
    if bad[1].any() != bad[0].any():
        which, z, other = ("B", y, x) if bad[1].any() else ("A", x, y)
        finite = np.abs(other[np.isfinite(other)]).max(initial=0)
        if finite > 6e4:
            yield Cause("overflow", f"{place.where}: {which} overflows, where the other has {finite:.3g}", 1.0)
        rows = np.unique(np.nonzero(bad[1] if which == "B" else bad[0])[0])
        tokens = place.tokens
        all_pad = tokens is not None and len(tokens) == len(x) and all(len(set(tokens[r])) == 1 for r in rows)
        note = "in rows of pads alone, as a softmax of masks of -inf is" if all_pad else "as a mask of -inf may make it"
        yield Cause("mask value", f"{place.where}: {which} is not finite {note}", 0.95 if all_pad else 0.8)


def _of_sources(place: _Place) -> Iterator[Cause]:
    """Where a module gets another module's output than in A."""
    if place.first.kind != "input":
        return
    sources = [place.source(side) for side in (place.a, place.b)]
    labels = []
    for side, source in zip((place.a, place.b), sources, strict=True):
        is_output = source.kind == "activation" or source.name != place.module
        name = source.name.partition("#")[0]
        if side.is_b:
            name = {y: x for x, y in side.names.modules.items()}.get(name, f"?{name}")
        labels.append(
            (name, str(source.info.get("class", ""))) if is_output and source.kind == "activation" else ("", "")
        )
    (one, class_a), (two, class_b) = labels
    if one == two or not (one or two):
        return
    is_norm = ["orm" in x or "orm" in y for x, y in ((class_a, one), (class_b, two))]
    called = [{key[2] for key in side.entries if key[1] == "activation"} for side in (place.b, place.a)]
    texts = [f"the output of {name}" if name else "what it computes itself" for name in (one, two)]
    text = f"{place.where}: B gives it {texts[1]}, A {texts[0]}"
    if is_norm[0] != is_norm[1]:
        norm, others = (one, called[0]) if is_norm[0] else (two, called[1])
        yield Cause("norm placement" if norm in others else "norm missing", text, 0.95)
        yield Cause("norm missing" if norm in others else "norm placement", text, 0.5)
    elif one and two:
        yield Cause("another input", text, 0.97)
    elif "orm" in place.module:
        yield Cause("norm placement", text, 0.9)
    else:
        missing = one if one and one not in called[0] else ""
        yield Cause("module skipped" if missing else "another input", text, 0.75)


ELEMENTWISE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "GELU by erf": lambda x: 0.5 * x * (1 + _erf(x / 2**0.5)),
    "GELU by tanh": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "GELU by sigmoid(1.702 x)": lambda x: x / (1 + np.exp(-1.702 * x)),
    "ReLU": lambda x: np.maximum(x, 0),
    "SiLU": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "leaky ReLU": lambda x: np.where(x > 0, x, 0.01 * x),
    "ELU": lambda x: np.where(x > 0, x, np.expm1(x)),
    "squared ReLU": lambda x: np.maximum(x, 0) ** 2,
}


def _erf(x: np.ndarray) -> np.ndarray:
    return (
        np.vectorize(math.erf, otypes=[float])(x)
        if x.size <= MOST_ELEMENTS
        else np.frompyfunc(math.erf, 1, 1)(x).astype(float)
    )


def _elementwise(x: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    for text, function in ELEMENTWISE.items():
        yield "gelu" if "GELU" in text else "activation function", f"computes {text}", function(x)


def _norms(x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None) -> Iterator[Formula]:
    """Yield what norms of x over its last axis may be."""
    scale = 1.0 if weight is None else weight
    shift = 0.0 if bias is None else bias
    mean = x.mean(-1, keepdims=True)
    for epsilon in (1e-5, 1e-6, 1e-12, 1e-3, 1e-8, 1e-7, 1e-4, 0.0):
        for ddof, is_rms in ((0, False), (1, False), (0, True)):
            square = (x**2).mean(-1, keepdims=True) if is_rms else x.var(-1, ddof=ddof, keepdims=True)
            y = (x if is_rms else x - mean) / np.sqrt(square + epsilon) * scale + shift
            kind = "biased variance" if ddof else "RMS norm" if is_rms else "epsilon"
            text = f"has epsilon {epsilon:g}"
            text += ", a variance over n - 1" if ddof else ", no mean taken off" if is_rms else ""
            yield Formula(kind, text, y)
        if epsilon == 1e-5:
            yield Formula(
                "epsilon",
                "adds epsilon to the deviation",
                (x - mean) / (x.std(-1, keepdims=True) + epsilon) * scale + shift,
            )
    std = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    yield Formula("norm scale", "has no scale", (x - mean) / std + shift)
    yield Formula("norm scale", "has no shift", (x - mean) / std * scale)
    yield Formula("norm missing", "does not normalize", x)
    if weight is not None:
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        yield Formula("norm scale", "scales by 1 + weight", x / rms * (1 + scale) + shift)


def _module_formulas(place: _Place) -> Iterator[Formula]:
    """Yield what the module may make of its input, by its parameters."""
    x, own = place.input(), place.parameters(place.module)
    entry = place.a.entries[place.first.update, "activation", place.first.name, place.first.call]
    weights = [w for name, w in own.items() if w.ndim == 2 and not name.startswith("lora")]
    vectors = [w for w in own.values() if w.ndim == 1]
    bias = next((w for name, w in own.items() if w.ndim == 1 and ("bias" in name or name in ("b", "beta"))), None)
    if x is None:
        return
    if not own:
        for kind, text, z in _elementwise(x) if x.shape == place.x.shape else ():
            yield Formula(kind, text, z)
        return
    if weights and x.shape[-1] in weights[0].shape:
        for w, is_turned in ((weights[0], False), (weights[0].T, True)):
            if w.shape[1] != x.shape[-1] or w.shape[0] != place.x.shape[-1]:
                continue
            product = x @ w.T
            with_bias = product if bias is None else product + bias
            square = w.shape[0] == w.shape[1]
            usual = _is_stored(place, entry.info, is_turned)
            kind = "" if usual or not square else "transposed kernel"
            text = "multiplies with its weight" if usual else "multiplies with its weight transposed"
            yield Formula(kind, text, with_bias)
            if bias is not None:
                yield Formula("bias", f"{text} and adds no bias", product)
                yield Formula("bias", f"{text} and adds its bias twice", product + 2 * bias)
            yield from _adapted(place, own, x, with_bias)
    elif vectors and x.shape == place.x.shape and "onv" not in str(entry.info.get("class")):
        scale = next((w for w in vectors if w is not bias), None)
        yield from _norms(x, scale, bias)


def _is_stored(place: _Place, info: dict[str, Any], is_turned: bool) -> bool:
    """Return whether a linear weight of A is applied as its framework stores it: [out, in] in PyTorch and Equinox."""
    is_flax = not place.a.record.framework.startswith("torch") and "kernel" in place.parameters(place.module)
    return is_turned == is_flax


def _adapted(place: _Place, own: dict[str, np.ndarray], x: np.ndarray, plain: np.ndarray) -> Iterator[Formula]:
    low = [w for name, w in own.items() if "lora_a" in name.lower()]
    high = [w for name, w in own.items() if "lora_b" in name.lower()]
    if low and high:
        a = low[0] if low[0].shape[-1] == x.shape[-1] else low[0].T
        b = high[0] if high[0].shape[0] == plain.shape[-1] else high[0].T
        yield Formula("LoRA scale", "adds no adapter", plain)
        for scale in (1, 2, 3, 4, 8, 16, 32, 0.5, 1.5, 3 / 2**0.5, 0.25, 1 / 3, 2**0.5):
            yield Formula("LoRA scale", f"scales its adapter by {scale:.4g}", plain + scale * x @ a.T @ b.T)


def _composed(place: _Place) -> Iterator[Formula]:
    """Yield what the array may be of those before it: functions of one, sums of several, some of its positions."""
    before = place.earlier(9)
    shape = place.x.shape
    for label, z in before[:4]:
        if z.shape == shape:
            yield Formula("module skipped", f"takes {label} as it is", z)
            for kind, text, w in _elementwise(z):
                yield Formula(kind, f"{text} of {label}", w)
        if z.shape[:-1] == shape[:-1] and z.shape[-1] == 2 * shape[-1]:
            one, two = np.split(z, 2, axis=-1)
            for _, text, w in _elementwise(one):
                yield Formula("gate", f"{text} of the first half times the second", w * two)
            for _, text, w in _elementwise(two):
                yield Formula("gate", f"{text} of the second half times the first", w * one)
    same = [(label, z) for label, z in before if z.shape == shape]
    for (l1, z1), (l2, z2) in itertools.permutations(same[:4], 2):
        for _, text, w in _elementwise(z1):
            yield Formula("gate", f"{text} of {l1} times {l2}", w * z2)
    yield from _sums(place, same)
    yield from _taken(place, before)


def _sums(place: _Place, same: list[tuple[str, np.ndarray]]) -> Iterator[Formula]:
    """Yield sums of a few earlier arrays that make one of both sides."""
    if not same:
        return
    few = slice(None, None, max(1, place.x.size // 2000))
    columns = [z.ravel()[few] for _, z in same[:7]]
    apart = np.linalg.norm((place.x - place.y).ravel()[few])
    for side in (place.x, place.y):
        target = side.ravel()[few]
        if not np.isfinite(target).all():
            continue
        done = False
        for n in (1, 2, 3):
            for chosen in itertools.combinations(range(len(columns)), n):
                matrix = np.stack([columns[i] for i in chosen], axis=1)
                weights = np.linalg.lstsq(matrix, target, rcond=None)[0]
                if np.linalg.norm(matrix @ weights - target) < NEAR * 0.1 * apart and (np.abs(weights) > 1e-6).all():
                    terms = [
                        f"{'' if abs(w - 1) < 1e-4 else f'{w:.4g} times '}{same[i][0]}"
                        for w, i in zip(weights, chosen, strict=True)
                    ]
                    whole = sum(w * same[i][1] for w, i in zip(weights, chosen, strict=True))
                    kind = "residual" if np.allclose(weights, 1, atol=1e-4) else "scale"
                    yield Formula(kind, f"is {' plus '.join(terms)}", np.asarray(whole))
                    done = True
                    break
            if done:
                break


def _taken(place: _Place, before: list[tuple[str, np.ndarray]]) -> Iterator[Formula]:
    """Yield what some positions of a sequence are."""
    shape = place.x.shape
    for label, z in before:
        if z.ndim != len(shape) + 1 or z.shape[0] != shape[0] or z.shape[-1] != shape[-1]:
            if (
                z.ndim == 3
                and len(shape) == 3
                and z.shape[0] == shape[0]
                and z.shape[2] == shape[2]
                and z.shape[1] >= shape[1]
            ):
                yield from _positions(place, label, z)
            continue
        yield Formula("pooling", f"takes the first position of {label}", z[:, 0])
        yield Formula("pooling", f"takes the last position of {label}", z[:, -1])
        yield Formula("pooling", f"takes the mean over positions of {label}", z.mean(1))
        last = place.a.get(place.first.update, "batch", "last", place.first.call)
        tokens = place.tokens
        lasts = [last] if last is not None else []
        if tokens is not None and len(tokens) == len(z):
            lasts += [np.where(tokens != pad, np.arange(tokens.shape[1]), 0).max(1) for pad in _pads(tokens)]
        for end in lasts:
            for shift, text in (
                (0, "the last token"),
                (-1, "the token before the last"),
                (1, "the one behind the last token"),
            ):
                index = np.clip(np.asarray(end).astype(int) + shift, 0, z.shape[1] - 1)
                yield Formula("pooling", f"takes {text} of {label}", z[np.arange(len(z)), index])


def _positions(place: _Place, label: str, z: np.ndarray) -> Iterator[Formula]:
    positions = place.a.get(place.first.update, "batch", "positions", place.first.call)
    if positions is None or positions.shape != place.x.shape[:2]:
        return
    for shift in (0, 1, -1):
        index = (positions.astype(int) + shift) % z.shape[1]
        text = f"takes the positions {'' if not shift else f'{shift:+d} '}of {label}"
        yield Formula("positions taken" if shift else "", text, np.take_along_axis(z, index[:, :, None], 1))


def _of_other_positions(place: _Place) -> Iterator[Cause]:
    if place.x.ndim != place.y.ndim:
        yield Cause("pooling", f"{place.where}: the one takes a position, the other has all", 0.5)


def _pads(tokens: np.ndarray) -> list[int]:
    """Return which ids may be the pad: what rows end or begin with most, and 0."""
    ends = np.concatenate([tokens[:, -1], tokens[:, 0]])
    values, counts = np.unique(ends, return_counts=True)
    return list(dict.fromkeys([0, *(int(v) for v in values[np.argsort(-counts)][:3])]))


# Attention


def _of_attention(place: _Place) -> Iterator[Cause]:
    """Yield what is wrong between queries, keys and values and what is taken from them."""
    if place.x.ndim != 3:
        return
    qkv = _queries_keys_values(place)
    if not qkv:
        return
    rows = slice(0, 3)
    q, k, v = (x[rows] for x in qkv)
    x, y = place.x[rows], place.y[rows]
    if distance(x, y) == 0:
        rows = slice(None)
        (q, k, v), x, y = qkv, place.x, place.y
    tokens = None if place.tokens is None or len(place.tokens) != len(place.x) else place.tokens[rows]
    limit = NEAR * (distance(x, y) if np.isfinite(distance(x, y)) else float(np.linalg.norm(x[np.isfinite(x)])))

    def fits(how: Attention, target: np.ndarray) -> bool:
        z = how.compute(q, k, v, tokens)
        return z is not None and distance(z, target) < limit

    D = q.shape[-1]
    pads: list[int | None] = [None, *([] if tokens is None else _pads(tokens))]
    usual = [
        Attention(heads, rotary=rotary, future=future, pad=pad, base=base)
        for heads in range(1, D + 1)
        if D % heads == 0 and D // heads <= 512
        for rotary, base in (("none", 1e4), ("halves", 1e4), ("interleaved", 1e4), ("halves", 5e5))
        for future in (None, 0)
        for pad in pads
    ]
    for one, two, which, other in ((x, y, "B", "A"), (y, x, "A", "B")):
        hows = [how for how in usual if fits(how, one)]
        if not hows:
            continue
        how = hows[0]
        changes: list[dict[str, Any]] = [
            *({"scale": s} for s in ("1", "root of the width", "the head size", "root of the head size")),
            *({"future": f} for f in (None, 0, 1, -1)),
            *({"pad": p} for p in pads),
            *({"pad": p, "masks": "queries"} for p in pads if p is not None),
            {"axis": -2},
            {"merged": False},
            {"is_swapped": True},
            {"layout": "interleaved"},
            *(
                {"rotary": r}
                for r in (
                    "none",
                    "halves",
                    "interleaved",
                    "interleaved, apart",
                    "halves, half the exponent",
                    "halves, from 1",
                    "halves, opposite",
                )
            ),
            *({"base": b} for b in (1e3, 1e5, 5e5, 1e6)),
            *({"heads": h} for h in range(1, D + 1) if D % h == 0 and h != how.heads and h <= 64),
        ]
        for size in (1, 2):
            for chosen in itertools.combinations(changes, size):
                change = {key: value for part in chosen for key, value in part.items()}
                if size == 2 and len(change) < 2:
                    continue
                changed = dataclasses.replace(how, **change)
                if changed != how and fits(changed, two):
                    key = next(iter(change))
                    kind = ATTENTION_KINDS[key]
                    if "exponent" in str(change.get("rotary")) or "from 1" in str(change.get("rotary")):
                        kind = "rotary frequencies"
                    yield Cause(kind, f"{place.where}: {which} {changed.text()}; {other} {how.text()}", 0.99)
                    return
            if size == 1 and D > 256:
                break
        yield Cause("attention", f"{place.where}: {other} {how.text()}; {which} does not", 0.45)
        return


def _queries_keys_values(place: _Place) -> list[np.ndarray] | None:
    """Return the queries, keys and values of the block that an array is in: by name, or else the last three alike."""
    before = place.earlier(14)
    named: dict[str, np.ndarray] = {}
    for label, z in before:
        last = label.rpartition(" ")[2].rpartition(".")[2].lower()
        for key, names in (
            ("q", ("query", "q", "q_proj", "q_lin", "wq")),
            ("k", ("key", "k", "k_proj", "k_lin", "wk")),
            ("v", ("value", "v", "v_proj", "v_lin", "wv")),
        ):
            if last in names and "output" in label:
                named.setdefault(key, z.reshape(*z.shape[:2], -1) if z.ndim == 4 else z)
    if len(named) == 3:
        found = [named[key] for key in "qkv"]
    else:
        fused = [
            z
            for _, z in before[:3]
            if z.ndim == 3 and z.shape[:2] == place.x.shape[:2] and z.shape[-1] == 3 * place.x.shape[-1]
        ]
        if not fused:
            return None
        found = list(np.split(fused[0], 3, axis=-1))
    return found if all(z.ndim == 3 and z.shape[:2] == place.x.shape[:2] for z in found) else None


# Embedding, and what any two arrays may have between them


def _of_embedding(place: _Place) -> Iterator[Cause]:
    """Yield what differs in the sum of token and position embeddings."""
    tokens, x, y = place.tokens, place.x, place.y
    if tokens is None or x.ndim != 3 or x.shape[:2] != tokens.shape:
        return
    tables = []
    for pair in place.a.names.pairs:
        table = place.a.tensor("parameter", place.first.update, pair)
        if table is not None and table.ndim == 2 and x.shape[-1] in table.shape:
            table = table if table.shape[1] == x.shape[-1] else table.T
            if len(table) > tokens.max() and re.search("token|embed|wte|word", pair.a.name):
                tables.append(table)
    for table in tables[:2]:
        parts = x - table[tokens], y - table[tokens]
        constant = [float(np.abs(z - z[:1]).max()) < 1e-5 * (np.abs(z).max() + 1e-9) for z in parts]
        if not constant[0] and not constant[1]:
            continue
        base = parts[0 if constant[0] else 1][0]
        for which, side in (("B", y), ("A", x)):
            embedded = table[tokens]
            rest = side - base
            weight = float((embedded * rest).sum() / (embedded**2).sum())
            if abs(weight - 1) > 1e-3 and distance(weight * embedded, rest) < NEAR * distance(x, y):
                D = x.shape[-1]
                note = " = sqrt(d)" if abs(weight - D**0.5) < 1e-3 else ""
                yield Cause(
                    "embedding scale", f"{place.where}: {which} scales token embeddings by {weight:.5g}{note}", 1.0
                )
        if all(constant):
            yield from _of_positions(place.where, parts[0][0], parts[1][0])


def _of_positions(where: str, p: np.ndarray, q: np.ndarray) -> Iterator[Cause]:
    """Yield how two position tables [T, D] differ."""
    near = NEAR * float(np.linalg.norm(p - q))
    for shift in (1, 2, -1, -2):
        one, two = (p[shift:], q[:-shift]) if shift > 0 else (p[:shift], q[-shift:])
        if len(one) > 1 and np.linalg.norm(one - two) < near:
            yield Cause("position offset", f"{where}: B's positions begin at {shift:+d}", 1.0)
    if np.linalg.norm(p[::-1] - q) < near:
        yield Cause("position order", f"{where}: B counts positions from the other end", 1.0)
    swapped = q.copy()
    n = p.shape[1] // 2 * 2
    swapped[:, 0:n:2], swapped[:, 1:n:2] = q[:, 1:n:2], q[:, 0:n:2]
    halves = np.concatenate([q[:, ::2], q[:, 1::2]], axis=1)
    if np.linalg.norm(p - swapped) < near or _is_sine_for_cosine(p, q):
        yield Cause("sine and cosine", f"{where}: sine and cosine are in each other's place", 1.0)
    if np.linalg.norm(p - halves) < near or np.linalg.norm(np.concatenate([p[:, ::2], p[:, 1::2]], axis=1) - q) < near:
        yield Cause(
            "sine and cosine",
            f"{where}: sines and cosines are interleaved in the one, and two halves in the other",
            1.0,
        )
    waves = [bool(np.abs(z).max() <= 1 + 1e-6) for z in (p, q)]
    if all(waves) and np.allclose(np.abs(p[:1]), np.abs(q[:1]), atol=1e-6):
        yield Cause(
            "position frequencies", f"{where}: B's position table has other frequencies: another base or exponent", 0.9
        )
    if not q.any() or not p.any():
        yield Cause("positions missing", f"{where}: {'B' if not q.any() else 'A'} adds no positions", 1.0)
    yield Cause("positions", f"{where}: positions differ, and tokens do not", 0.6)


def _is_sine_for_cosine(p: np.ndarray, q: np.ndarray) -> bool:
    """Return whether each column is a sine in the one and a cosine in the other."""
    if max(np.abs(p).max(), np.abs(q).max()) > 1 + 1e-6:
        return False
    return bool(np.allclose(p**2 + q**2, 1, atol=1e-5))


def _of_skipped(place: _Place) -> Iterator[Cause]:
    """Yield the norms that turn the array of one side into that of the other."""
    x, y = place.x, place.y
    modules = list(dict.fromkeys(key[2] for key in place.a.entries if key[1] == "activation"))
    names = {
        shown(pair.a, modules)
        for pair in place.a.names.pairs
        if "norm" in pair.a.name.lower() or "ln" in pair.a.name.lower()
    }
    for name in sorted(names):
        own = place.parameters(name)
        vectors = [w for w in own.values() if w.shape == x.shape[-1:]]
        if not vectors:
            continue
        bias = next((w for key, w in own.items() if "bias" in key or key == "beta"), None)
        weight = next((w for key, w in own.items() if w is not bias), None)
        for which, one, two in (("B", x, y), ("A", y, x)):
            for formula in _norms(two, weight, bias):
                if formula.kind == "epsilon" and distance(formula.array, one) < NEAR * distance(x, y):
                    yield Cause("norm missing", f"{place.where}: {which} does not apply {name}", 0.9)
                    return


def _of_dropout(place: _Place) -> Iterator[Cause]:
    x, y = place.x, place.y
    zeros = [float((z == 0).mean()) for z in (x, y)]
    is_kept = (x != 0) & (y != 0)
    if max(zeros) > 0.02 and max(zeros) < 0.98 and abs(zeros[0] - zeros[1]) > 5 * (0.25 / x.size) ** 0.5:
        if min(zeros) < 0.01:
            which = "B" if zeros[1] > zeros[0] else "A"
            yield Cause(
                "dropout",
                f"{place.where}: {which} has {max(zeros):.0%} zeros, the other none: dropout is on in the one",
                0.9,
            )
        else:
            yield Cause(
                "dropout rate", f"{place.where}: {zeros[1]:.0%} zeros in B, {zeros[0]:.0%} in A: another rate", 0.9
            )
    elif min(zeros) > 0.02 and is_kept.any():
        ratio = _ratio(x[is_kept], y[is_kept])
        if np.array_equal(x == 0, y == 0) and ratio:
            yield Cause("dropout scale", f"{place.where}: what is kept of dropout is {ratio:.4g} times A's in B", 0.95)
        elif not np.array_equal(x == 0, y == 0):
            yield Cause(
                "dropout masks", f"{place.where}: both have {zeros[0]:.0%} zeros, at other places: other masks", 0.6
            )
            ratio = float(np.median(y[is_kept] / x[is_kept]))
            if abs(ratio - 1) > 0.02:
                yield Cause("dropout scale", f"{place.where}: what is kept is {ratio:.4g} times A's in B", 0.65)


def _of_shape(place: _Place) -> Iterator[Cause]:
    """Yield what any two arrays tell."""
    x, y = place.x, place.y
    ratio = _ratio(x, y)
    if ratio:
        yield Cause("scale", f"{place.where}: B's is {ratio:.6g} times A's{_named(ratio, x.shape)}", 0.7)
    flat = [np.sort(z.ravel()) for z in (x, y)]
    if np.allclose(flat[0], flat[1], rtol=1e-4, atol=1e-6 * float(np.abs(flat[0]).max(initial=0))):
        kind = "layout"
        for axis in range(x.ndim):
            if distance(np.flip(x, axis), y) < NEAR * distance(x, y):
                kind = "position order" if axis == 1 and x.ndim == 3 else "layout"
        yield Cause(kind, f"{place.where}: B has A's numbers in another order", 0.8)
    difference = y - x
    if (
        x.ndim >= 2
        and np.abs(difference - difference.reshape(-1, x.shape[-1])[0]).max() < 1e-4 * np.abs(difference).max()
    ):
        own = [z for z in place.parameters(place.module).values() if z.shape == x.shape[-1:]]
        text = "a bias" if not own else "its bias"
        yield Cause("bias", f"{place.where}: B differs by the same vector everywhere: {text} is missing or added", 0.9)
    if x.ndim >= 3:
        per = np.abs(difference).reshape(len(x), x.shape[1], -1).max(-1)
        tokens = place.tokens
        if tokens is not None and tokens.shape == per.shape:
            for pad in _pads(tokens):
                is_pad = tokens == pad
                if is_pad.any() and per[is_pad].max() > 0 and per[~is_pad].max(initial=0) < 1e-3 * per.max():
                    yield Cause("pad handling", f"{place.where}: only positions of pads (id {pad}) differ", 0.75)
        rows = per.max(1)
        if (rows < 1e-3 * rows.max()).any():
            few = np.flatnonzero(rows >= 1e-3 * rows.max())
            yield Cause(
                "some samples",
                f"{place.where}: only samples {', '.join(map(str, few[:5]))} differ, as with another mask",
                0.35,
            )
    if place.first.difference < 1e-3:
        yield Cause(
            "precision",
            f"{place.where}: a difference of {place.first.difference:.1e}: a lower precision, or another epsilon",
            0.2,
        )
    if place.first.kind == "activation":
        yield Cause("another formula", f"{place.where}: its input agrees and its output does not", 0.1)
    else:
        yield Cause(
            "between modules", f"{place.where}: all modules before it agree: what is computed between them differs", 0.1
        )


def _ratio(x: np.ndarray, y: np.ndarray) -> float:
    """Return by what y is x times a number, or 0 if it is not."""
    square = float((x * x).sum())
    if not square or not np.isfinite(square):
        return 0.0
    weight = float((x * y).sum() / square)
    rest = float(np.linalg.norm(weight * x - y))
    return weight if weight and rest < 1e-3 * float(np.linalg.norm(y)) * min(1.0, 1e3 * abs(weight - 1)) else 0.0


def _named(ratio: float, sizes: Iterable[int], counts: dict[str, float] | None = None) -> str:
    """Return what a factor may stand for."""
    numbers = dict(counts or {})
    for n in sizes:
        numbers |= {f"an axis of {n}": float(n), f"the root of an axis of {n}": n**0.5}
    for text, number in numbers.items():
        for sign, value in (("", number), ("1 over ", 1 / number if number else 0.0)):
            if value and value != 1 and abs(ratio / value - 1) < 1e-4:
                return f": {sign}{text}"
    return ""


# Loss and gradients


def _logits(side: Side, update: int, call: int, shape: tuple[int, ...]) -> np.ndarray | None:
    found = None
    for (u, kind, name, c), e in side.entries.items():
        if u == update and kind == "activation" and c == call and e.is_number and e.shape[:-1] == shape:
            if name == "" or "head" in name or found is None or e.shape[-1] >= found.shape[-1]:
                found = e.array().astype(np.float64)
    return found


def _of_loss(a: Side, b: Side, found: list[Finding], first: Finding) -> Iterator[Cause]:
    where = first.name
    losses = [
        [float(e.array()) for e in side.record.all("loss") if e.name == first.name and e.update == first.update]
        for side in (a, b)
    ]
    x, y = (np.array(side.get(first.update, "loss", first.name, first.call), float) for side in (a, b))
    if first.name in ("grad_norm", "norm"):
        norms = [
            np.array([float(e.array()) for e in side.record.all("loss") if e.name == first.name]) for side in (a, b)
        ]
        yield Cause("norm of gradients", f"{where}: B says {float(y):.5g}, A {float(x):.5g}", 0.5)
        n = min(map(len, norms))
        if n and (norms[1][:n] <= norms[0][:n] * (1 + 1e-6)).all() and norms[1][:n].max() < 0.999 * norms[0][:n].max():
            yield Cause("clipping", f"{where}: B's is never above {norms[1].max():.4g}: taken after clipping", 0.8)
        return
    labels = a.get(first.update, "batch", "labels", first.call)
    tokens = a.get(first.update, "batch", "tokens", first.call)
    if tokens is None:
        tokens = a.get(first.update, "input", "", first.call)
    if labels is not None:
        logits = _logits(a, first.update, first.call, labels.shape)
        if logits is not None and first.name == "loss":
            yield from explained(x, y, _losses(logits, labels, tokens), where)
        n_counted, n_all = int((labels >= 0).sum()), labels.size
        counts = {
            "the number of labels": n_counted,
            "the share of counted labels": n_counted / n_all,
            "the batch size": float(len(labels)),
            "all positions": float(n_all),
        }
    else:
        counts = {}
    ratio = float(y / x) if x else 0.0
    all_ratios = [q / p for p, q in zip(*losses, strict=False) if p]
    if ratio > 0:
        sizes = {s for e in a.record.all("activation") for s in e.shape[-1:]}
        name = _named(ratio, sizes, counts) or _power(ratio)
        score = 0.85 if name else 0.3
        kind = "sum against mean" if not name.startswith(": the square") else "temperature"
        if name and "axis" in name:
            kind = "sum against mean"
        yield Cause(kind, f"{where}: B's is {ratio:.6g} times A's{name}", score)
        if not name and len(all_ratios) > 1 and np.ptp(all_ratios) < 1e-4 * abs(np.mean(all_ratios)):
            yield Cause("loss scale", f"{where}: B's is {ratio:.6g} times A's in each batch", 0.5)
    yield Cause("loss", f"{where}: outputs agree and the loss does not: labels, weights or another formula", 0.4)
    if first.name == "correct":
        yield Cause("metric", f"{where}: right predictions are counted otherwise", 0.9)


def _power(ratio: float) -> str:
    for t in (2.0, 3.0, 4.0, 5.0, 8.0, 10.0, 20.0):
        for value in (t * t, 1 / (t * t)):
            if abs(ratio / value - 1) < 1e-4:
                return f": the square of a temperature of {t:g}"
    return ""


def _losses(logits: np.ndarray, labels: np.ndarray, tokens: Any) -> Iterator[Formula]:
    """Yield what a cross-entropy may be."""
    largest = logits.max(-1, keepdims=True)
    log_p = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    V = logits.shape[-1]

    def of(y: np.ndarray) -> np.ndarray:
        return -np.take_along_axis(log_p, np.clip(y, 0, V - 1).astype(int)[..., None], -1)[..., 0]

    is_counted = labels >= 0
    each, n = of(labels), max(1, int(is_counted.sum()))
    total = float((each * is_counted).sum())

    def formula(kind: str, text: str, value: float) -> Formula:
        return Formula(kind, text, np.array(value))

    yield formula("", "is the mean over labels that count", total / n)
    yield formula("sum against mean", "is the sum over labels", total)
    yield formula("sum against mean", "is divided by all positions, ignored ones too", total / labels.size)
    yield formula("sum against mean", "is divided by the batch size", total / len(labels))
    yield formula("ignored labels", "counts ignored labels as class 0", float(of(np.maximum(labels, 0)).sum()) / n)
    yield formula(
        "ignored labels", "counts ignored labels as class 0, over all", float(of(np.maximum(labels, 0)).mean())
    )
    if labels.ndim > 1:
        yield formula(
            "mean of means",
            "is the mean of each sample's mean",
            float(np.mean((each * is_counted).sum(-1) / np.maximum(is_counted.sum(-1), 1))),
        )
    for s in (0.1, 0.05, 0.2):
        smooth = (1 - s) * each - s * log_p.mean(-1)
        yield formula("label smoothing", f"smooths labels by {s}", float((smooth * is_counted).sum()) / n)
    for value, text in ((labels + 1, "labels plus 1"), (labels - 1, "labels minus 1")):
        yield formula("label shift", f"takes {text}", float((of(value) * is_counted).sum()) / n)
    if tokens is not None and tokens.shape == labels.shape:
        for y, text in (
            (tokens, "tokens themselves"),
            (np.roll(tokens, -1, -1), "the next tokens"),
            (np.roll(labels, 1, -1), "labels one to the right"),
            (np.roll(labels, -1, -1), "labels one to the left"),
        ):
            counted = y >= 0
            for weights, how in ((counted, ""), (is_counted, "")):
                yield formula(
                    "label shift",
                    f"takes {text} as labels{how}",
                    float((of(y) * weights).sum()) / max(1, int(weights.sum())),
                )


def _gradients(a: Side, b: Side, update: int) -> list[tuple[Pair, np.ndarray, np.ndarray]]:
    result = []
    for pair in a.names.pairs:
        x, y = a.tensor("gradient", update, pair), b.tensor("gradient", update, pair)
        if x is not None and y is not None and x.shape == y.shape and np.isfinite(x).all() and np.isfinite(y).all():
            result.append((pair, x, y))
    return result


def _norms_of(grads: list[tuple[Pair, np.ndarray, np.ndarray]]) -> list[float]:
    """Return the norm of all gradients of A, and of B."""
    return [
        math.sqrt(sum(float((x**2).sum()) for x in side)) for side in ([g[1] for g in grads], [g[2] for g in grads])
    ]


def _of_gradient(a: Side, b: Side, found: list[Finding], first: Finding) -> Iterator[Cause]:
    grads = _gradients(a, b, first.update)
    failed = {f.name for f in found if f.stage == "gradient" and f.update == first.update and not f.passes}
    alone = [f for f in found if f.stage == "gradient" and f.update == first.update and f.note.startswith("only")]
    for finding in alone[:1]:
        yield Cause("frozen parameter", f"{finding.name}: {finding.note}: it is frozen or detached in the other", 0.9)
    big = [
        (pair, x, y) for pair, x, y in grads if np.linalg.norm(x) > 1e-6 * max(np.linalg.norm(z) for _, z, _ in grads)
    ]
    if not big:
        return
    norms = _norms_of(big)
    ratios = {str(pair.a): float((x * y).sum() / (x * x).sum()) for pair, x, y in big}
    rests = [float(np.linalg.norm(ratios[str(pair.a)] * x - y) / (np.linalg.norm(y) or 1)) for pair, x, y in big]
    all_batches = [
        [e.array() for e in side.record.all("batch") if e.name == "labels" and e.update == first.update]
        for side in (a, b)
    ]
    n_micro = max(
        1, len(all_batches[0]), sum(e.update == first.update for e in a.record.all("loss") if e.name == "loss")
    )
    counts = {"the number of accumulated batches": float(n_micro)}
    for labels in all_batches[0][:1]:
        whole = np.concatenate([z.ravel() for z in all_batches[0]])
        n = float((whole >= 0).sum())
        counts |= {
            "the number of labels": n,
            "all positions": float(whole.size),
            "the batch size": float(len(labels)),
            "the share of labels that count": n / whole.size,
        }
    values = np.array(list(ratios.values()))
    is_parallel = max(rests) < 1e-3
    is_same = float(np.ptp(values)) < 1e-3 * float(np.abs(values).max())
    if is_parallel and is_same and abs(values[0] - 1) > 1e-6:
        ratio = float(np.median(values))
        name = _named(ratio, (), counts)
        kind = "accumulation" if "accumulated" in name else "sum against mean"
        yield Cause(kind, f"all gradients of B are {ratio:.6g} times A's{name}", 0.9 if name else 0.45)
        yield from _of_clipping(a, b, norms, first)
        if not name:
            yield Cause("accumulation", f"all gradients of B are {ratio:.6g} times A's", 0.35)
    elif is_parallel and len(failed) > 1:
        yield Cause(
            "clipping per tensor",
            "each gradient of B is A's times a number of its own, as with clipping each alone",
            0.8,
        )
    levels = [float(np.abs(y).max()) for _, _, y in big]
    n_at = sum(int((np.abs(y) > 0.9999 * max(levels)).sum()) for _, _, y in big)
    if n_at > 3 and not is_parallel:
        yield Cause(
            "clipping by value",
            f"{n_at} elements of B's gradients are at {max(levels):.4g}: each is clipped alone",
            0.85,
        )
    for pair, x, y in grads:
        if str(pair.a) not in failed:
            continue
        if not y.any() or not x.any():
            which = "B" if not y.any() else "A"
            yield Cause(
                "gradient stopped", f"{pair.a}: {which} has no gradient: it is detached, frozen or not used", 0.8
            )
        if x.ndim == 2:
            rows = np.flatnonzero(np.abs(x - y).max(1) > 1e-6 * np.abs(x).max())
            if 0 < len(rows) <= 2 < len(x):
                sides = [bool(np.abs(z[rows]).max() > 0) for z in (x, y)]
                if sides[0] != sides[1]:
                    yield Cause(
                        "pad row",
                        f"{pair.a}: only row {', '.join(map(str, rows))} differs, and has a gradient in one alone",
                        0.95,
                    )
            yield from _of_rows(a, pair, x, y, first)
    if len(failed) <= 2 and len(grads) > 4:
        names = ", ".join(sorted(failed))
        yield Cause(
            "gradient stopped",
            f"only {names} differs: a gradient is stopped on one of its uses, as of a tied weight",
            0.7,
        )
    if first.update:
        yield from _of_kept(a, b, first)
    if n_micro > 1 and not is_parallel:
        sizes = [int((z >= 0).sum()) for z in all_batches[0]]
        note = f" ({', '.join(map(str, sizes))} labels)" if len(set(sizes)) > 1 else ""
        yield Cause("accumulation", f"{n_micro} batches are accumulated{note}, and weigh otherwise in B", 0.6)
    yield Cause("backward", f"{first.name}: forward and loss agree, and this gradient is the first that does not", 0.2)


def _of_clipping(a: Side, b: Side, norms: list[float], first: Finding) -> Iterator[Cause]:
    sizes: list[list[float]] = [[], []]
    for update in range(min(a.n_updates, b.n_updates)):
        grads = _gradients(a, b, update)
        for i in (0, 1):
            sizes[i].append(_norms_of(grads)[i])
    for i, (which, other) in enumerate((("A", "B"), ("B", "A"))):
        top = max(sizes[i])
        at = sum(abs(s - top) < 1e-3 * top for s in sizes[i])
        if top and at >= 2 and max(sizes[1 - i]) > 1.001 * top:
            yield Cause(
                "clipping",
                f"{which} clips gradients to a norm of {top:.4g}, {other} does not, or at another place",
                0.88,
            )
        elif (
            top
            and abs(sizes[i][first.update] - round(sizes[i][first.update], 1)) < 1e-4
            and sizes[1 - i][first.update] != sizes[i][first.update]
        ):
            yield Cause(
                "clipping",
                f"the gradients of {which} have the norm {sizes[i][first.update]:.4g}: not clipped as in {other}",
                0.6,
            )


def _of_rows(a: Side, pair: Pair, x: np.ndarray, y: np.ndarray, first: Finding) -> Iterator[Cause]:
    """Yield which of several accumulated batches have no part in the gradient of an embedding."""
    batches = [
        e.array()
        for e in a.record.all("input", "batch")
        if e.update == first.update and e.name in ("", "tokens") and not e.is_number
    ]
    if len(batches) < 2 or not re.search("token|embed|wte|word", pair.a.name):
        return
    used = [set(np.unique(z).tolist()) for z in batches]
    for keep, text in ((-1, "the last"), (0, "the first")):
        others = set().union(*(used[:-1] if keep else used[1:])) - used[keep]
        rows = [i for i in others if i < len(x) and np.abs(x[i]).max() > 0]
        if rows and not np.abs(y[rows]).max() > 0:
            yield Cause(
                "accumulation", f"{pair.a}: only {text} of {len(batches)} accumulated batches is in B's gradient", 0.95
            )


def _of_kept(a: Side, b: Side, first: Finding) -> Iterator[Cause]:
    for pair, x, y in _gradients(a, b, first.update):
        before = b.tensor("gradient", first.update - 1, pair)
        if before is not None and before.shape == x.shape and distance(x + before, y) < NEAR * distance(x, y):
            yield Cause(
                "gradients kept", f"{pair.a}: B's gradient is A's plus that of the update before: not reset", 0.97
            )
            return
        if before is not None and before.shape == x.shape and x.size > 8:
            matrix = np.stack([x.ravel(), before.ravel()], axis=1)
            weights = np.linalg.lstsq(matrix, y.ravel(), rcond=None)[0]
            if np.linalg.norm(matrix @ weights - y.ravel()) < NEAR * distance(x, y) and abs(weights[1]) > 1e-3:
                yield Cause(
                    "gradients kept",
                    f"{pair.a}: B's gradient has {weights[1]:.3g} times that of the update before",
                    0.95,
                )
                return


# Rates, moments and updates


def _rates(side: Side) -> np.ndarray:
    return np.array([side.rate(i) for i in range(side.n_updates)])


def _of_rate(a: Side, b: Side, found: list[Finding], first: Finding) -> Iterator[Cause]:
    x, y = _rates(a), _rates(b)
    n = min(len(x), len(y))
    x, y = x[:n], y[:n]
    apart = float(np.linalg.norm(x - y))
    rising = int(np.argmax(x)) if n else 0
    differ = np.flatnonzero(np.abs(x - y) > 1e-6 * np.abs(x).max())
    from_, to = (int(differ[0]), int(differ[-1])) if len(differ) else (0, 0)
    for shift in (1, -1):
        one, two = (x[1:], y[:-1]) if shift > 0 else (x[:-1], y[1:])
        if len(one) > 1 and np.linalg.norm(one - two) < 0.02 * apart:
            yield Cause("schedule offset", f"B's rate of update i is A's of update i {shift:+d}", 1.0)
        w = slice(max(0, from_), rising)
        if (
            rising > 2
            and to <= rising
            and np.linalg.norm(x[1:rising] - y[: rising - 1]) < 0.02 * np.linalg.norm(x[:rising] - y[:rising]) + 1e-12
            and w
        ):
            yield Cause("warmup", "B's warmup is a step ahead of A's: it does not begin at 0", 0.97)
            yield Cause("schedule offset", "B's warmup is a step ahead of A's", 0.6)
            break
    ratio = _ratio(x, y)
    if ratio:
        yield Cause("rate scale", f"B's rate is {ratio:.6g} times A's throughout", 0.9)
    if x[0] < 0.5 * x.max() and y[0] > 0.99 * y.max():
        yield Cause("warmup", f"B has no warmup: its first rate is {y[0]:.3g}, A's {x[0]:.3g}", 0.95)
    elif to < rising:
        yield Cause("warmup", f"rates differ in updates {from_} to {to}, while A's rise: another warmup", 0.7)
    sudden = np.abs(np.diff(x)) > 4 * np.median(np.abs(np.diff(x)) + 1e-30)
    if from_ > 1 and (sudden[: from_ + 1].any() or from_ > rising) and from_ >= rising:
        tail = x[rising:], y[rising:]
        ends = float(x[-1]), float(y[-1])
        if ends[1] < 0.2 * max(ends[0], 1e-30):
            yield Cause("minimum rate", f"B's rate ends at {ends[1]:.3g}, A's at {ends[0]:.3g}: another minimum", 0.9)
        bends = [
            float(np.abs(np.diff(z, 2)).max(initial=0)) / float(np.abs(np.diff(z)).max(initial=1))
            for z in tail
            if len(z) > 3
        ]
        if len(bends) == 2 and bends[1] < 0.02 < bends[0] or len(bends) == 2 and bends[0] < 0.02 < bends[1]:
            yield Cause(
                "decay shape",
                f"the decay of {'B' if bends[1] < bends[0] else 'A'} is a line, that of the other a curve",
                0.92,
            )
        yield Cause(
            "decay length",
            f"from update {from_} on, B's rate decays to {ends[1]:.4g}, A's to {ends[0]:.4g}: another length or shape",
            0.65,
        )
        if sudden.any():
            yield Cause("resumed rate", f"from update {from_} on, where A's rate jumps, as after a resume", 0.75)
    mean = (x + y) / 2
    if len(differ) > 1 and not ratio:
        mirrored = np.abs((x - np.median(x)) + (y - np.median(y))).max() < 0.3 * np.abs(x - y).max()
        if (
            mirrored
            or np.allclose(np.sign(y - mean)[differ], -np.sign(x - mean)[differ])
            and np.ptp(np.sign(x - y)[differ]) > 0
        ):
            yield Cause(
                "cycle",
                "B's rate is above A's in some updates and below in others: a cycle of another phase, sign or shape",
                0.68,
            )
    if np.abs(x - y).max() < 0.1 * np.abs(x).max() and from_ <= 2:
        yield Cause(
            "cycle", "rates differ by a few per cent from the start on: a cycle or a factor on the schedule", 0.66
        )
    yield Cause("schedule", f"rates differ from update {from_} to {to} of {n}", 0.3)


def _settings(side: Side, name: str) -> dict[str, Any]:
    infos = [e.info for e in side.record.all("setting") if e.name.startswith("group")]
    own = [x for x in infos if name in x.get("parameters", [])]
    info = own[0] if own else infos[0] if infos else {}
    betas = info.get("betas", (info.get("b1", 0.9), info.get("b2", 0.999)))
    return {"beta1": betas[0], "beta2": betas[1], "epsilon": info.get("eps", 1e-8), "decay": info.get("weight_decay")}


def _of_moment(a: Side, b: Side, found: list[Finding], first: Finding) -> Iterator[Cause]:
    pairs = {str(pair.a): pair for pair in a.names.pairs}
    pair = pairs[first.name]
    steps = {side.is_b: [side.tensor("gradient", i, pair) for i in range(first.update + 1)] for side in (a, b)}
    which = "first" if first.note == a.slots[0] else "second"
    moments = [side.tensor("moment", first.update, pair, f"{side.slots[which == 'second']}/") for side in (a, b)]
    others = [side.tensor("moment", first.update, pair, f"{side.slots[which != 'second']}/") for side in (a, b)]
    if None in [None if x is None else 1 for x in (*moments, *others)]:
        return
    x, y = moments
    assert x is not None and y is not None and others[0] is not None
    if distance(others[0], y) < NEAR * distance(x, y):
        yield Cause("moments swapped", f"{first.name}: B's {which} moment is A's other one", 1.0)
    ratio = _ratio(x, y)
    power = 1 if which == "first" else 2
    g = steps[False][0]
    if first.update == 0 and g is not None:
        rates = [float((z * g**power).sum() / (g ** (2 * power)).sum()) for z in (x, y)]
        if ratio:
            yield Cause(
                "betas",
                f"{first.name}: beta of the {which} moment is {1 - rates[1]:.5g} in B, {1 - rates[0]:.5g} in A",
                0.9,
            )
        p = a.tensor("parameter", 0, pair)
        if p is not None:
            matrix = np.stack([x.ravel(), p.ravel()], axis=1)
            weights = np.linalg.lstsq(matrix, y.ravel(), rcond=None)[0]
            if abs(weights[1]) > 1e-9 and np.linalg.norm(matrix @ weights - y.ravel()) < NEAR * distance(x, y):
                yield Cause(
                    "coupled decay",
                    f"{first.name}: B's moments have the weight decay in them: Adam with L2, not AdamW",
                    0.95,
                )
    elif ratio or first.update:
        fits = []
        for beta in (0.9, 0.95, 0.98, 0.99, 0.999, 0.8, 0.0):
            value = np.zeros_like(x)
            for gradient in steps[False]:
                value = value if gradient is None else beta * value + (1 - beta) * gradient**power
            fits.append(Formula("betas", f"has a beta of {beta}", value))
        yield from explained(x, y, fits, f"{which} moment of {first.name}")
    yield Cause("moments", f"{which} moment of {first.name}: its gradients agree and it does not", 0.3)


def _of_update(a: Side, b: Side, found: list[Finding], first: Finding) -> Iterator[Cause]:
    failed = [x for x in found if x.stage == "update" and x.update == first.update and not x.passes]
    pairs = {str(pair.a): pair for pair in a.names.pairs}
    ratios = []
    for finding in failed:
        pair = pairs[finding.name]
        steps = [_movement(side, first.update, pair) for side in (a, b)]
        if steps[0] is None or steps[1] is None:
            continue
        if not steps[1].any() or not steps[0].any():
            yield Cause(
                "frozen parameter", f"{finding.name}: {'B' if not steps[1].any() else 'A'} does not update it", 0.8
            )
        ratios.append(_ratio(steps[0], steps[1]))
    n_all = sum(x.stage == "update" and x.update == first.update for x in found)
    rates = _rates(a)
    if ratios and all(ratios) and np.ptp(ratios) < 1e-2 * abs(np.mean(ratios)) and len(failed) > 0.5 * n_all:
        ratio, i = float(np.median(ratios)), first.update
        yield Cause("rate scale", f"all updates of B are {ratio:.5g} times A's", 0.6)
        for shift in (1, -1):
            if 0 <= i + shift < len(rates) and rates[i] and abs(rates[i + shift] / rates[i] / ratio - 1) < 1e-3:
                yield Cause(
                    "schedule offset", f"all updates of B have the rate of update {i + shift:d}, not of {i}", 0.98
                )
    elif ratios and all(ratios) and len(set(np.round(ratios, 3))) > 1:
        yield Cause("layer rates", "B's updates are A's times a number of each layer: other rates of layers", 0.85)
    if first.update == 0 and len(rates) and rates[0] == 0:
        moved = [_movement(b, 0, pair) for pair in a.names.pairs[:3]]
        if any(z is not None and z.any() for z in moved):
            yield Cause("schedule offset", "B updates although the rate is 0: it has the rate of another update", 0.98)
    for finding in failed[:6]:
        pair = pairs[finding.name]
        steps = [_movement(side, first.update, pair) for side in (a, b)]
        if steps[0] is not None and steps[1] is not None:
            yield from explained(steps[0], steps[1], _adam(a, b, pair, first.update), f"update of {finding.name}")
    if 0 < len(failed) < n_all:
        only = all(_rank(a, pairs[x.name]) < 2 for x in failed)
        text = "biases and norms" if only else ", ".join(x.name for x in failed[:3])
        yield Cause(
            "decay group",
            f"only {text} are updated otherwise ({len(failed)} of {n_all}): another group, as of weight decay",
            0.55,
        )
    size = [
        math.sqrt(
            sum(float((m**2).sum()) for pair in a.names.pairs if (m := _movement(side, first.update, pair)) is not None)
        )
        for side in (a, b)
    ]
    if ratios and all(ratios) and size[0] and size[1] and len(failed) == n_all:
        yield Cause(
            "clipping",
            f"all updates of B together have the norm {size[1]:.4g} (A {size[0]:.4g}): clipped after the optimizer?",
            0.5,
        )
    yield Cause("optimizer", f"update of {first.name}: gradients and rates agree and it does not", 0.2)


def _rank(side: Side, pair: Pair) -> int:
    x = side.tensor("parameter", 0, pair)
    return 0 if x is None else x.ndim


def _movement(side: Side, update: int, pair: Pair) -> np.ndarray | None:
    before, after = (side.tensor("parameter", update + i, pair) for i in (0, 1))
    return None if before is None or after is None else after - before


def _adam(a: Side, b: Side, pair: Pair, update: int) -> Iterator[Formula]:
    """Yield what Adam's update of a parameter may be, by what is recorded of A."""
    known = _settings(a, pair.a.name)
    other = _settings(b, pair.b.name)
    rates = _rates(a)
    grads = [a.tensor("gradient", i, pair) for i in range(update + 1)]
    p = a.tensor("parameter", update, pair)
    before = [a.tensor("parameter", i, pair) for i in range(update + 1)]
    if any(g is None for g in grads) or p is None or not np.isfinite(rates[update]):
        return
    settings = [e.info.get("weight_decay") for side in (a, b) for e in side.record.all("setting")]
    decays = list(
        dict.fromkeys([0.0, *(float(d) for d in (known["decay"], other["decay"], *settings, 0.01, 0.1) if d)])
    )

    def step(beta1: float, beta2: float, epsilon: float, decay: float, rate: float, how: str = "") -> np.ndarray:
        m, v = np.zeros_like(p), np.zeros_like(p)
        for gradient, weight in zip(grads, before, strict=True):
            assert gradient is not None and weight is not None
            g = gradient + decay * weight if how == "coupled" else gradient
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        n = len(grads)
        if how != "uncorrected":
            m = m / (1 - beta1**n)
            v = v / (1 - beta2**n)
        root = np.sqrt(v + epsilon) if how == "inside" else np.sqrt(v) + epsilon
        if how == "outside":
            root = np.sqrt(v * (1 - beta2**n)) / (1 - beta2**n) ** 0.5 + epsilon / (1 - beta2**n) ** 0.5
        d = m / root
        if how == "swapped":
            d = v / (np.sqrt(np.abs(m)) + epsilon)
        return -rate * (d + (0 if how == "coupled" else decay) * p)

    base = known["beta1"], known["beta2"], known["epsilon"]
    own = known["decay"] if known["decay"] is not None else 0.0
    rate = float(rates[update])
    for decay in decays:
        kind = "" if decay == own else "decay group"
        yield Formula(kind, f"decays it by {decay:g}", step(*base, decay, rate))
    for decay in decays:
        yield Formula(
            "coupled decay", f"adds a decay of {decay:g} to the gradient", step(*base, decay, rate, "coupled")
        )
        yield Formula(
            "bias correction", "does not correct the bias of moments", step(*base, decay, rate, "uncorrected")
        )
        yield Formula("epsilon", "has epsilon inside the root", step(*base, decay, rate, "inside"))
        yield Formula("epsilon", "adds epsilon before the bias correction", step(*base, decay, rate, "outside"))
        for epsilon in (1e-6, 1e-7, 1e-5, 1e-8, 1e-12, 1e-16, 1e-3):
            if epsilon != base[2]:
                yield Formula("epsilon", f"has epsilon {epsilon:g}", step(base[0], base[1], epsilon, decay, rate))
        for beta2 in (0.99, 0.95, 0.98, 0.999):
            if beta2 != base[1]:
                yield Formula("betas", f"has a beta2 of {beta2}", step(base[0], beta2, base[2], decay, rate))
        for beta1 in (0.0, 0.8, 0.95, 0.9):
            if beta1 != base[0]:
                yield Formula("betas", f"has a beta1 of {beta1}", step(beta1, base[1], base[2], decay, rate))
        for shift in (1, -1):
            if 0 <= update + shift < len(rates):
                yield Formula(
                    "schedule offset",
                    f"has the rate of update {update + shift}",
                    step(*base, decay, float(rates[update + shift])),
                )
