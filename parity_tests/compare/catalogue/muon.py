"""Muon: updates of matrices computed again from their gradients, up to the factors of rate, scale and decay."""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from parity_tests.compare.catalogue.evidence import EXACT, Cause, Formula, Rule, combined, explained, listed
from parity_tests.compare.catalogue.place import Divergence
from parity_tests.compare.divergence import Side
from parity_tests.compare.pairing import Pair

MOST = 10**6  # elements of a matrix, beyond which nothing is computed again
MOST_MATRICES = 12
Triples = tuple[tuple[float, float, float], ...]
JORDAN = (3.4445, -4.7750, 2.0315)  # kellerjordan.github.io/posts/muon
POLAR = (  # arXiv 2505.16932, algorithm 1, without its margin
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFE = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR)
POLYNOMIALS: dict[str, tuple[Triples, float]] = {  # coefficients of each iteration, and the margin of the norm
    "Newton-Schulz, 5 iterations": ((JORDAN,) * 5, 1.0),
    "Polar Express, 5 iterations": (SAFE, 1.01),
    "Newton-Schulz, 4 iterations": ((JORDAN,) * 4, 1.0),
    "Newton-Schulz, 6 iterations": ((JORDAN,) * 6, 1.0),
    "Polar Express, 4 iterations": (SAFE[:4], 1.01),
    "Polar Express without a margin of the norm": (SAFE, 1.0),
    "Polar Express without a margin of its coefficients": (POLAR, 1.0),
    "Polar Express, its first polynomial 5 times": (SAFE[:1] * 5, 1.01),
    "Newton-Schulz without the fifth order": (((*JORDAN[:2], 0.0),) * 5, 1.0),
    "Polar Express without the fifth order": (tuple((a, b, 0.0) for a, b, _ in SAFE), 1.01),
}
USUAL = tuple(POLYNOMIALS)[:2]
BETAS = (0.95, 0.9, 0.99, 0.8, 0.98)
MOMENTA = ("Nesterov's look ahead", "no look ahead", "gradients added whole to the momentum", "optax's bias correction")


@dataclasses.dataclass(frozen=True)
class Muon:
    """How an update is made orthogonal."""

    beta: float = 0.95
    momentum: str = MOMENTA[0]
    polynomial: str = USUAL[0]
    stack: str = "each matrix by its own norm"
    decay: float = 0.0  # in the gradient

    def ahead(self, gradients: list[np.ndarray]) -> np.ndarray:
        """Return the mean of the gradients of all updates so far, as it is made orthogonal."""
        mean, n, beta = np.zeros_like(gradients[0]), len(gradients), self.beta
        for gradient in gradients:
            mean = beta * mean + (1 - beta) * gradient
        return {
            MOMENTA[0]: (1 - beta) * gradients[-1] + beta * mean,
            MOMENTA[1]: mean,
            MOMENTA[2]: (1 - beta) * gradients[-1] + beta * mean / (1 - beta),
            MOMENTA[3]: (1 - beta) * gradients[-1] / (1 - beta**n) + beta * mean / (1 - beta ** (n + 1)),
        }[self.momentum]

    def direction(self, x: "Matrix") -> np.ndarray:
        """Return the orthogonal update of a matrix."""
        ahead = self.ahead(x.gradients) + self.decay * x.weight
        whole = [self.ahead(other) for other in x.stack] if "stack" in self.stack else []
        norm = float(np.sqrt(sum((y**2).sum() for y in (ahead, *whole))))
        return orthogonal(ahead, *POLYNOMIALS[self.polynomial], norm)

    def choices(self) -> dict[str, str]:
        is_corrected = self.momentum == MOMENTA[3]
        return {
            "Muon parameters": "is Muon's",
            "bias correction": "corrects the bias of momentum and gradient by other counts" if is_corrected else "",
            "coupled decay": "makes the decay orthogonal with the gradient" if self.decay else "",
            "Muon momentum": f"has {self.momentum}, a momentum of {self.beta:g}",
            "Muon iterations": f"has {self.polynomial}, {self.stack}",
        }


def orthogonal(x: np.ndarray, polynomials: Triples, margin: float, norm: float) -> np.ndarray:
    """Return a matrix with its singular values brought near 1; it is divided by a norm and the margin."""
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / max(norm * margin, 1e-7)
    for a, b, c in polynomials:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Matrix:
    """A matrix whose update differs: its gradients and values, and what both sides make of it."""

    def __init__(self, d: Divergence, pair: Pair):
        self.name, self.pair = str(pair.a), pair
        gradients = self._gradients(d, pair)
        weight, entry = d.a.tensor("parameter", d.update, pair), d.a.entries.get((0, "parameter", pair.a.name, 0))
        steps = [_step(side, d.update, pair) for side in d.sides]
        known = [x for x in (weight, *gradients, *steps) if x is not None]
        shapes, is_whole = {x.shape for x in known}, entry is not None and not entry.sketch
        self.is_matrix = is_whole and len(known) == d.update + 4 and len(shapes) == 1
        self.is_matrix &= all(len(shape) == 2 and min(shape) > 1 and np.prod(shape) <= MOST for shape in shapes)
        if self.is_matrix:
            self.weight, self.gradients, self.steps = known[0], known[1:-2], known[-2:]
            self.stack, self.adam = list(self._stack(d)), self._adam()

    def _gradients(self, d: Divergence, pair: Pair) -> list[np.ndarray]:
        found = [d.a.tensor("gradient", i, pair) for i in range(d.update + 1)]
        return [x for x in found if x is not None]

    def _stack(self, d: Divergence) -> Iterator[list[np.ndarray]]:
        """Yield the gradients of other matrices that are called alike but for a number."""
        stack = re.sub(r"\d+", "*", self.name)
        for name, pair in d.pairs.items():
            gradients = self._gradients(d, pair)
            if name != self.name and re.sub(r"\d+", "*", name) == stack and len(gradients) == d.update + 1:
                yield gradients

    def _adam(self) -> np.ndarray:
        first, second, betas = np.zeros_like(self.weight), np.zeros_like(self.weight), (0.9, 0.999)
        for g in self.gradients:
            first, second = betas[0] * first + (1 - betas[0]) * g, betas[1] * second + (1 - betas[1]) * g**2
        n = len(self.gradients)
        return first / (1 - betas[0] ** n) / (np.sqrt(second / (1 - betas[1] ** n)) + 1e-8)

    def fit(self, how: Muon, side: int) -> tuple[np.ndarray, float]:
        """Return the factors of the orthogonal update and of the weights in a side's update, and what is left."""
        with np.errstate(all="ignore"):
            direction = how.direction(self)
        if not np.isfinite(direction).all():
            return np.zeros(2), np.inf
        return combined(self.steps[side], direction, self.weight)

    def formulas(self, how: Muon, side: int) -> Iterator[Formula]:
        """Yield what a side's update may be: Muon's as A's or with one thing otherwise, or Adam's."""
        decays = (0.1, 0.01, 0.2, 0.05, 0.3, 1.0)
        changes: list[tuple[str, dict[str, object]]] = [("", {})]
        changes += [("Muon iterations", {"polynomial": x}) for x in POLYNOMIALS]
        changes += [("Muon iterations", {"stack": "all of the stack by one norm"})]
        changes += [("Muon momentum", {"momentum": x}) for x in MOMENTA[:3]]
        changes += [("bias correction", {"momentum": MOMENTA[3]})]
        changes += [("Muon momentum", {"beta": x}) for x in BETAS]
        changes += [("coupled decay", {"decay": x}) for x in decays]
        for kind, change in changes:
            changed = dataclasses.replace(how, **change)  # type: ignore[arg-type]
            weights, _ = self.fit(changed, side)
            if np.isfinite(weights).all() and weights.any():
                with np.errstate(all="ignore"):
                    direction = changed.direction(self)
                yield Formula(changed.choices(), weights[0] * direction + weights[1] * self.weight, kind)
        weights, _ = combined(self.steps[side], self.adam, self.weight)
        yield Formula({"Muon parameters": "is Adam's"}, weights[0] * self.adam + weights[1] * self.weight)


def _step(side: Side, update: int, pair: Pair) -> np.ndarray | None:
    before, after = (side.tensor("parameter", update + i, pair) for i in (0, 1))
    return None if before is None or after is None else after - before


def updates(d: Divergence) -> Iterator[Cause]:
    """Updates of matrices, where one side's are Muon's."""
    failed = [d.pairs[x.name] for x in d.failed("update") if x.name in d.pairs]
    matrices = [x for x in (Matrix(d, pair) for pair in failed[:MOST_MATRICES]) if x.is_matrix and x.steps[0].any()]
    how = next((how for x in matrices for how in _usual() for side in (0, 1) if _is_exact(x, how, side)), None)
    if how is None:
        return
    for x in matrices[:2]:
        where = f"update of {x.name}"
        yield from explained(x.steps[0], x.steps[1], x.formulas(how, 0), where, x.formulas(how, 1), EXACT)
    yield from _factors([x for x in matrices if _is_exact(x, how, 0) and _is_exact(x, how, 1)], how)


def _usual() -> Iterator[Muon]:
    for polynomial in USUAL:
        for beta in BETAS:
            for momentum in MOMENTA:
                yield Muon(beta, momentum, polynomial)


def _is_exact(x: Matrix, how: Muon, side: int) -> bool:
    return x.fit(how, side)[1] < 1e-4 * float(np.linalg.norm(x.steps[side]))


def _factors(matrices: list[Matrix], how: Muon) -> Iterator[Cause]:
    """Both sides are the same but for the factor of the update, or of the decay."""
    rows = []
    for x in matrices:
        one, two = (x.fit(how, side)[0] for side in (0, 1))
        if one[0]:
            decay = two[1] / one[1] if abs(one[1]) > 1e-9 else float(abs(two[1]) <= 1e-9) or np.inf
            rows.append((x, two[0] / one[0], decay, abs(one[1]) > 1e-9))
    changed = [row for row in rows if abs(row[1] - 1) > 1e-4]
    names = listed((row[0].name for row in changed or rows), 3)
    if changed:
        ratios, decays = (np.array([row[i] for row in changed]) for i in (1, 2))
        by_shape: dict[tuple[int, ...], set[float]] = {}
        for x, ratio, *_ in rows:
            by_shape.setdefault(x.weight.shape, set()).add(round(float(ratio), 4))
        text = f"updates of matrices are {listed((f'{x:.4g}' for x in dict.fromkeys(ratios.round(4))), 3)} times A's"
        with_decay = any(row[3] for row in changed) and bool(
            np.abs(decays - ratios).max() < 1e-3 * np.abs(ratios).max()
        )
        if any(len(x) > 1 for x in by_shape.values()):
            yield Cause("layer rates", f"{names}: {text}, also of one shape: other rates of layers", 0.97)
        elif with_decay or not any(row[3] for row in changed):
            is_one = np.ptp(ratios) < 1e-3 * np.abs(ratios).max() and len(changed) == len(rows)
            first, second = ("rate scale", "Muon scale") if is_one else ("Muon scale", "rate scale")
            yield Cause(first, f"{names}: {text}, and so is their decay", 0.97)
            yield Cause(second, f"{names}: {text}", 0.6)
        else:
            yield Cause("Muon scale", f"{names}: {text}, and their decay is not", 0.97)
    elif any(abs(row[2] - 1) > 1e-3 for row in rows):
        ratios = np.array([row[2] for row in rows])
        text = f"the decay of matrices is {listed((f'{x:.4g}' for x in dict.fromkeys(ratios.round(4))), 3)} times A's"
        is_scale = all(np.abs(row[2] / _scales(row[0].weight.shape) - 1).min() < 1e-3 for row in rows)
        first, second = ("Muon scale", "decay group") if is_scale else ("decay group", "Muon scale")
        yield Cause(first, f"{names}: {text}{', the scale of the update' * is_scale}; updates agree", 0.97)
        yield Cause(second, f"{names}: {text}", 0.6)


def _scales(shape: tuple[int, ...]) -> np.ndarray:
    """Return the usual factors of an orthogonal update, and one over them."""
    one, two = max(1.0, shape[0] / shape[1]) ** 0.5, max(1.0, shape[1] / shape[0]) ** 0.5
    scales = np.array([x for x in (0.2 * max(shape) ** 0.5, one, two) if abs(x - 1) > 1e-6])
    return np.concatenate([scales, 1 / scales])


def diverging(d: Divergence) -> Iterator[Cause]:
    """One side's update of a matrix is not finite, and no Adam's."""
    pair = d.pairs.get(d.name)
    steps = [_step(side, d.update, pair) for side in d.sides] if pair else []
    if len(steps) == 2 and not any(x is None for x in steps) and all(side.slots[1] for side in d.sides):
        is_finite = [bool(np.isfinite(x).all()) for x in steps if x is not None]
        if is_finite[0] != is_finite[1] and not any(_has_second_moment(d)):
            text = f"update of {d.name}: {'A' if is_finite[1] else 'B'}'s is not finite: iterations that diverge"
            yield Cause("Muon iterations", text, 0.9)


def _has_second_moment(d: Divergence) -> list[bool]:
    return [side.tensor("moment", d.update, d.pairs[d.name], f"{side.slots[1]}/") is not None for side in d.sides]


def updated_by_adam(d: Divergence) -> Iterator[Cause]:
    """A parameter has a second moment in one side alone."""
    has = _has_second_moment(d)
    if has[0] != has[1] and all(side.slots[1] for side in d.sides):
        which, other = ("A", "B") if has[0] else ("B", "A")
        text = f"{d.name}: {which} has a second moment and {other} has none: Adam's there, here another optimizer's"
        yield Cause("Muon parameters", text, 0.96)


MOMENT_RULES: tuple[Rule, ...] = (updated_by_adam,)
RULES: tuple[Rule, ...] = (updates, diverging)
