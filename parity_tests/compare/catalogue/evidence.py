"""Causes, and the formulas that give evidence of them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

NEAR = 0.1  # of the difference of both sides: a formula that is as near to one of them explains it
FIRST = ("gate",)  # of the causes that two formulas name; the others of the two follow from it
LAST = ("module skipped", "residual", "another input", "scale", "loss")  # these follow from any other difference
EXACT = 1e-3  # of that difference: so near are formulas that leave nothing open


@dataclasses.dataclass(frozen=True)
class Cause:
    """What may be wrong. `kind` is one of a few, as the table of the page has them; `score` says how likely it is."""

    kind: str
    text: str
    score: float


Rule = Callable[[Any], Iterable[Cause]]  # of a place.Divergence


@dataclasses.dataclass(frozen=True)
class Formula:
    """A way to compute an array: for each cause that it decides, how, the most important first.

    `kind` is the cause where only one side is computed this way; "" if it is the usual one.
    """

    choices: dict[str, str]
    array: np.ndarray
    kind: str = ""
    said: str = ""  # the formula in words; "" if the choices say it

    @property
    def text(self) -> str:
        return self.said or ", ".join(text for text in self.choices.values() if text)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the norm of a difference; infinite where shapes differ, or what is finite."""
    if x.shape != y.shape:
        return math.inf
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)):
        return math.inf
    return float(np.linalg.norm(x[finite] - y[finite]))


def size_of_difference(x: np.ndarray, y: np.ndarray) -> float:
    """Return the norm of a difference, or that of the smaller array where the difference is not finite."""
    apart = distance(x, y)
    return apart if np.isfinite(apart) else min(float(np.linalg.norm(z[np.isfinite(z)])) for z in (x, y)) or 1.0


def explained(
    x: np.ndarray,
    y: np.ndarray,
    formulas: Iterable[Formula],
    where: str,
    of_b: Iterable[Formula] | None = None,
    near: float = NEAR,
) -> Iterator[Cause]:
    """Yield the cause that the best formulas of both sides, or of one, name. `of_b`: B's formulas, where it has others.

    Two formulas name the first choice in which they differ.
    """
    apart = size_of_difference(x, y)
    formulas = list(formulas)
    one = _best(x, formulas, apart, near)
    two = _best(y, formulas if of_b is None else of_b, apart, near)
    if one and two:
        keys = list(dict.fromkeys([*two.choices, *one.choices]))
        keys.sort(key=lambda key: (key not in FIRST, key in LAST))
        differing = [key for key in keys if one.choices.get(key) != two.choices.get(key)]
        if differing:
            texts = [z.said or z.choices.get(differing[0]) or z.text for z in (one, two)]
            yield Cause(differing[0], f"{where}: B {texts[1]}, A {texts[0]}", 1.0)
    elif two:
        yield Cause(two.kind or "another formula", f"{where}: B {two.text}, which A does not", 0.7 if two.kind else 0.3)
    elif one:
        yield Cause(one.kind or "another formula", f"{where}: A {one.text}, which B does not", 0.6 if one.kind else 0.3)


def _best(target: np.ndarray, formulas: Iterable[Formula], apart: float, near: float) -> Formula | None:
    """Return the formula that explains an array: an exact one before others, a usual one before others."""
    distances = [(distance(z.array, target), z) for z in formulas]
    fitting = [(d, z) for d, z in distances if d < near * apart]
    return min(fitting, key=lambda x: (x[0] > EXACT * apart, x[1].kind != "", x[0]), default=(0.0, None))[1]


def ratio_of(x: np.ndarray, y: np.ndarray) -> float:
    """Return the number by which y is x times it, or 0 if y is not."""
    square = float((x * x).sum())
    if not square or not np.isfinite(square):
        return 0.0
    ratio = float((x * y).sum() / square)
    rest = float(np.linalg.norm(ratio * x - y))
    is_one = rest < 1e-3 * float(np.linalg.norm(y)) * min(1.0, 1e3 * abs(ratio - 1))
    return ratio if ratio and is_one else 0.0


def combined(target: np.ndarray, *terms: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the weights with which terms add up to an array, and the norm of what is left."""
    matrix = np.stack([x.ravel() for x in terms], axis=1)
    weights = np.linalg.lstsq(matrix, target.ravel(), rcond=None)[0]
    return weights, float(np.linalg.norm(matrix @ weights - target.ravel()))


def meaning(ratio: float, sizes: Iterable[int], counts: dict[str, float] | None = None) -> str:
    """Return what a factor stands for, as ": the batch size", or ""."""
    numbers = dict(counts or {})
    for n in sizes:
        numbers |= {f"an axis of {n}": float(n), f"the root of an axis of {n}": n**0.5}
    for text, number in numbers.items():
        for sign, value in (("", number), ("1 over ", 1 / number if number else 0.0)):
            if value and value != 1 and abs(ratio / value - 1) < 1e-4:
                return f": {sign}{text}"
    return ""


def listed(names: Iterable[Any], most: int = 4) -> str:
    """Return the first few names in a line."""
    names = [str(x) for x in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
