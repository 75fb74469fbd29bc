"""Gradients, where all outputs and losses agree."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from parity_tests.compare.catalogue.evidence import NEAR, Cause, Rule, combined, distance, listed, meaning
from parity_tests.compare.catalogue.place import Divergence
from parity_tests.compare.pairing import Pair

Gradients = list[tuple[Pair, np.ndarray, np.ndarray]]


@dataclasses.dataclass
class Factors:
    """By which number each gradient of B is A's, and how much of it is left."""

    d: Divergence

    @functools.cached_property
    def large(self) -> Gradients:
        """Return the gradients that are more than rounding."""
        grads = self.d.gradients()
        largest = max((float(np.linalg.norm(x)) for _, x, _ in grads), default=0.0)
        return [(pair, x, y) for pair, x, y in grads if np.linalg.norm(x) > 1e-6 * largest]

    @functools.cached_property
    def values(self) -> np.ndarray:
        return np.array([float((x * y).sum() / (x * x).sum()) for _, x, y in self.large])

    @functools.cached_property
    def is_parallel(self) -> bool:
        """Return whether each gradient of B is A's times a number."""
        rests = [
            np.linalg.norm(ratio * x - y) / (np.linalg.norm(y) or 1)
            for ratio, (_, x, y) in zip(self.values, self.large, strict=True)
        ]
        return bool(rests) and float(max(rests)) < 1e-3

    @property
    def is_one(self) -> bool:
        """Return whether it is the same number for all."""
        spread = float(np.ptp(self.values)) if self.is_parallel else np.inf
        return spread < 1e-3 * float(np.abs(self.values).max())


def _batches(d: Divergence) -> list[np.ndarray]:
    """Return the labels of each accumulated batch of A."""
    return [e.array() for e in d.a.record.all("batch") if e.name == "labels" and e.update == d.update]


def _n_accumulated(d: Divergence) -> int:
    losses = sum(e.update == d.update for e in d.a.record.all("loss") if e.name == "loss")
    return max(1, len(_batches(d)), losses)


def only_in_one(d: Divergence) -> Iterator[Cause]:
    for finding in [f for f in d.of("gradient") if f.note.startswith("only")][:1]:
        text = f"{finding.name}: {finding.note}: it is frozen or detached in the other"
        yield Cause("frozen parameter", text, 0.9)


def one_factor(d: Divergence) -> Iterator[Cause]:
    """All gradients of B are A's times one number."""
    factors = Factors(d)
    if not factors.is_one or abs(factors.values[0] - 1) < 1e-6:
        return
    ratio, counts = float(np.median(factors.values)), {"the number of accumulated batches": float(_n_accumulated(d))}
    labels = _batches(d)
    if labels:
        whole = np.concatenate([z.ravel() for z in labels])
        n = float((whole >= 0).sum())
        counts |= {"the number of labels": n, "all positions": float(whole.size)}
        counts |= {"the batch size": float(len(labels[0])), "the share of labels that count": n / whole.size}
    name = meaning(ratio, (), counts)
    text = f"all gradients of B are {ratio:.6g} times A's{name}"
    if "accumulated" in name:
        yield Cause("accumulation", text, 0.9)
    else:
        yield Cause("sum against mean", text, 0.9 if name else 0.45)
        yield Cause("accumulation", text, 0.35)
    yield from _clipped(d)


def _clipped(d: Divergence) -> Iterator[Cause]:
    """One side's gradients are never above a norm that the other side's are above."""
    norms: list[list[float]] = [[], []]
    for update in range(min(side.n_updates for side in d.sides)):
        grads = d.gradients(update)
        norms[0].append(math.sqrt(sum(float((x**2).sum()) for _, x, _ in grads)))
        norms[1].append(math.sqrt(sum(float((y**2).sum()) for *_, y in grads)))
    for i, (which, other) in enumerate((("A", "B"), ("B", "A"))):
        top, here = max(norms[i]), norms[i][d.update]
        n_at_top = sum(abs(s - top) < 1e-3 * top for s in norms[i])
        is_round = abs(here - round(here, 1)) < 1e-4 and abs(norms[1 - i][d.update] - here) > 1e-4
        if top and n_at_top >= 2 and max(norms[1 - i]) > 1.001 * top:
            text = f"{which} clips gradients to a norm of {top:.4g}, {other} does not, or at another place"
            yield Cause("clipping", text, 0.88)
        elif top and is_round:
            yield Cause(
                "clipping", f"the gradients of {which} have the norm {here:.4g}: not clipped as in {other}", 0.6
            )


def own_factors(d: Divergence) -> Iterator[Cause]:
    factors = Factors(d)
    if factors.is_parallel and not factors.is_one and len(d.failed("gradient")) > 1:
        text = "each gradient of B is A's times a number of its own, as with clipping each alone"
        yield Cause("clipping", text, 0.8)


def clipped_by_value(d: Divergence) -> Iterator[Cause]:
    factors = Factors(d)
    largest = max((float(np.abs(y).max()) for _, _, y in factors.large), default=0.0)
    n = sum(int((np.abs(y) > 0.9999 * largest).sum()) for _, _, y in factors.large)
    if n > 3 and not factors.is_parallel:
        text = f"{n} elements of B's gradients are at {largest:.4g}: each is clipped alone"
        yield Cause("clipping", text, 0.85)


def zero_in_one(d: Divergence) -> Iterator[Cause]:
    failed = {f.name for f in d.failed("gradient")}
    for pair, x, y in d.gradients():
        if str(pair.a) in failed and not (x.any() and y.any()):
            which = "A" if y.any() else "B"
            text = f"{pair.a}: {which} has no gradient: it is detached, frozen or not used"
            yield Cause("gradient stopped", text, 0.8)


def few_rows(d: Divergence) -> Iterator[Cause]:
    """One or two rows of a table have a gradient in one only, by which clipping scales all gradients otherwise."""
    values = Factors(d).values
    factor = float(np.median(values)) if len(values) else 1.0
    for pair, x, y in d.gradients():
        if x.ndim != 2:
            continue
        rows = np.flatnonzero(np.abs(factor * x - y).max(1) > 1e-6 * np.abs(x).max())
        if 0 < len(rows) <= 2 < len(x) and (np.abs(x[rows]).max() > 0) != (np.abs(y[rows]).max() > 0):
            yield Cause("pad row", f"{pair.a}: only row {listed(rows)} differs, and has a gradient in one only", 0.95)


def few_parameters(d: Divergence) -> Iterator[Cause]:
    factors = Factors(d)
    factor = float(np.median(factors.values)) if len(factors.values) else 1.0  # by clipping
    near = {str(g.a): np.linalg.norm(factor * x - y) < 1e-6 * np.linalg.norm(y) for g, x, y in factors.large}
    names = sorted(name for name, is_near in near.items() if not is_near)
    if 0 < len(names) <= 2 and len(near) > 4:
        text = f"only {listed(names)} differs: a gradient is stopped on one of its uses, as of a tied weight"
        yield Cause("gradient stopped", text, 0.7)


def batch_left_out(d: Divergence) -> Iterator[Cause]:
    """The gradient of an embedding has no rows of the tokens that only some accumulated batches have."""
    inputs = [e for e in d.a.record.all("input", "batch") if e.update == d.update and e.name in ("", "tokens")]
    used = [set(np.unique(e.array()).tolist()) for e in inputs if not e.is_number]
    tables = [g for g in d.gradients() if re.search("token|embed|wte|word", str(g[0].a))]
    for pair, x, y in tables if len(used) > 1 else ():
        for kept, others, text in ((used[-1], used[:-1], "the last"), (used[0], used[1:], "the first")):
            rows = [i for i in set().union(*others) - kept if i < len(x) and np.abs(x[i]).max() > 0]
            if rows and not np.abs(y[rows]).max() > 0:
                text = f"{pair.a}: only {text} of {len(used)} accumulated batches is in B's gradient"
                yield Cause("accumulation", text, 0.95)


def gradients_kept(d: Divergence) -> Iterator[Cause]:
    """B's gradient has that of the update before in it."""
    for pair, x, y in d.gradients() if d.update else ():
        before = d.b.tensor("gradient", d.update - 1, pair)
        if before is not None and before.shape == x.shape and x.size > 8 and distance(x, y):
            weights, rest = combined(y, x, before)
            if rest < NEAR * distance(x, y) and abs(weights[1]) > 1e-3:
                text = f"{pair.a}: B's gradient has {weights[1]:.3g} times that of the update before: not reset"
                yield Cause("gradients kept", text, 0.97)
                return


def weights_of_batches(d: Divergence) -> Iterator[Cause]:
    n = _n_accumulated(d)
    if n > 1 and not Factors(d).is_parallel:
        sizes = [int((z >= 0).sum()) for z in _batches(d)]
        note = f" ({listed(sizes)} labels)" if len(set(sizes)) > 1 else ""
        yield Cause("accumulation", f"{n} batches are accumulated{note}, and weigh otherwise in B", 0.6)


def unknown(d: Divergence) -> Iterator[Cause]:
    yield Cause("backward", f"{d.name}: forward and loss agree, and this gradient is the first that does not", 0.2)


RULES: tuple[Rule, ...] = (
    *(only_in_one, one_factor, own_factors, clipped_by_value, zero_in_one, few_rows, few_parameters),
    *(batch_left_out, gradients_kept, weights_of_batches, unknown),
)
