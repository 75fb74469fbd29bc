"""Start values that differ, and batches."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from parity_tests.compare.catalogue.evidence import NEAR, Cause, Rule, distance, listed, ratio_of
from parity_tests.compare.catalogue.place import Divergence


def moved_layers(d: Divergence) -> Iterator[Cause]:
    if d.a.names.moved:
        yield Cause("layer order", f"parameters are in another place: {'; '.join(d.a.names.moved[:3])}", 1.0)


def each_parameter(d: Divergence) -> Iterator[Cause]:
    for finding in d.failed("parameter"):
        x, y = (side.tensor("parameter", 0, d.pairs[finding.name]) for side in d.sides)
        assert x is not None and y is not None
        for kind, score, test in PARAMETER:
            if text := test(x, y):
                yield Cause(kind, f"{finding.name}: {text}", score)


def _transposed(x: np.ndarray, y: np.ndarray) -> str:
    is_square = x.ndim == 2 and x.shape == y.shape[::-1]
    return "B's is A's transposed" if is_square and distance(x, y.T) < NEAR * (distance(x, y) or 1.0) else ""


def _few_rows(x: np.ndarray, y: np.ndarray) -> list[int]:
    if x.ndim < 2 or x.shape != y.shape:
        return []
    rows = np.flatnonzero(np.abs(x - y).max(axis=tuple(range(1, x.ndim))) > 0)
    return rows.tolist() if 0 < len(rows) <= 2 < len(x) else []


def _pad_row(x: np.ndarray, y: np.ndarray) -> str:
    rows = _few_rows(x, y)
    is_zero = bool(rows) and not (x[rows].any() and y[rows].any())
    return f"only row {listed(rows)} differs, and is zero in one" if is_zero else ""


def _rows(x: np.ndarray, y: np.ndarray) -> str:
    rows = _few_rows(x, y)
    return f"only row {listed(rows)} differs" if rows else ""


def _distribution(x: np.ndarray, y: np.ndarray) -> str:
    """Return how two samples differ in their distribution, or ""."""
    n, stds = min(x.size, y.size), (float(x.std()), float(y.std()))
    text = f"start values with a standard deviation of {stds[1]:.3g} in B, of {stds[0]:.3g} in A"
    if min(stds) < 1e-12 or n < 8:
        return text if abs(stds[0] - stds[1]) > 1e-12 else ""
    if abs(math.log(stds[1] / stds[0])) > 5 * (1.5 / n) ** 0.5:
        return text
    tails = [float(np.abs(z - z.mean()).max() / z.std()) for z in (x, y)]
    kurtoses = [float(np.mean(((z - z.mean()) / z.std()) ** 4)) for z in (x, y)]
    shapes = [
        "uniform" if k < 2.3 else "truncated" if t < 2.4 else "normal" for k, t in zip(kurtoses, tails, strict=True)
    ]
    return f"start values are {shapes[1]} in B, {shapes[0]} in A" if n > 400 and shapes[0] != shapes[1] else ""


def _scaled(x: np.ndarray, y: np.ndarray) -> str:
    ratio = ratio_of(x, y) if x.shape == y.shape else 0.0
    return f"B's is {ratio:.6g} times A's" if ratio and abs(ratio - 1) > 1e-6 else ""


PARAMETER: tuple[tuple[str, float, Callable[[np.ndarray, np.ndarray], str]], ...] = (
    ("transposed kernel", 0.95, _transposed),
    ("pad row", 0.9, _pad_row),
    ("rows of a parameter", 0.88, _rows),
    ("scaled parameter", 0.85, _scaled),
    ("start values", 0.8, _distribution),
)


def other_weights(d: Divergence) -> Iterator[Cause]:
    if len(d.failed("parameter")) > 0.5 * len(d.of("parameter")):
        yield Cause("other weights", "most start values differ: B has not been given A's weights", 0.4)


# Batches


def batch(d: Divergence) -> Iterator[Cause]:
    x, y = d.arrays(d.first.kind, d.name)
    if x is None or y is None:
        return
    name = d.name or "the input"
    kind = "labels" if "label" in name else "batch"
    if x.shape != y.shape:
        yield Cause(kind, f"{name} has the shape {list(y.shape)} in B, {list(x.shape)} in A", 0.9)
        return
    differ = x != y
    if kind == "labels" and (differ == ((x < 0) != (y < 0))).all():
        n = [int((z >= 0).sum()) for z in (x, y)]
        text = f"B counts {'more' if n[1] > n[0] else 'fewer'} labels ({n[1]}, A {n[0]})"
        yield Cause("labels", f"{name}: {text}: another part of the text is learned", 1.0)
    for shift in (1, -1):
        if x.ndim and (np.roll(x, shift, -1) == y)[..., 1:-1].mean() > 0.9:
            shifted = "label shift" if kind == "labels" else "shifted input"
            yield Cause(shifted, f"{name}: B's are A's shifted by {shift}", 1.0)
    tokens = d.tokens
    if kind == "labels" and tokens is not None and tokens.shape == y.shape and (tokens == y)[y >= 0].mean() > 0.9:
        yield Cause("label shift", f"{name}: B's are the tokens themselves", 1.0)
    if x.ndim > 1 and np.array_equal(np.sort(x, axis=-1), np.sort(y, axis=-1)):
        text = "B's rows are A's in another order, as with padding on the other side"
        yield Cause("padding side", f"{name}: {text}", 0.9)
    yield Cause(kind, f"{name} differs at {int(differ.sum())} of {differ.size} places", 0.5)


RULES: tuple[Rule, ...] = (moved_layers, each_parameter, other_weights)
BATCH_RULES: tuple[Rule, ...] = (batch,)
