"""Moments of the optimizer, and updates, where all gradients agree: Adam computed again."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from parity_tests.compare.catalogue.evidence import (
    NEAR,
    Cause,
    Formula,
    Rule,
    combined,
    distance,
    explained,
    listed,
    ratio_of,
)
from parity_tests.compare.catalogue.loss import gradient_norm
from parity_tests.compare.catalogue.place import Divergence
from parity_tests.compare.divergence import Finding, Side
from parity_tests.compare.pairing import Pair

BETAS = (0.9, 0.95, 0.98, 0.99, 0.999, 0.8, 0.0)
EPSILONS = (1e-6, 1e-7, 1e-5, 1e-8, 1e-12, 1e-16, 1e-3)
MOST = 6  # parameters whose update is computed again

# Moments


def moments(d: Divergence) -> Iterator[Cause]:
    pair = d.pairs[d.name]
    is_second = d.first.note != d.a.slots[0]
    which, power = ("second", 2) if is_second else ("first", 1)
    x, y = (_moment(side, d.update, pair, is_second) for side in d.sides)
    other = _moment(d.a, d.update, pair, not is_second)
    gradients = [d.a.tensor("gradient", i, pair) for i in range(d.update + 1)]
    where = f"{which} moment of {d.name}"
    if x is None or y is None:
        return
    if other is not None and distance(other, y) < NEAR * distance(x, y):
        yield Cause("moments swapped", f"{where}: B's is A's other moment", 1.0)
    g = gradients[0]
    if d.update == 0 and g is not None:
        betas = [1 - float((z * g**power).sum() / (g ** (2 * power)).sum()) for z in (x, y)]
        if ratio_of(x, y):
            yield Cause("betas", f"{where}: beta is {betas[1]:.5g} in B, {betas[0]:.5g} in A", 0.9)
        p = d.a.tensor("parameter", 0, pair)
        weights, rest = combined(y, x, p) if p is not None else ((0, 0), math.inf)
        if abs(weights[1]) > 1e-9 and rest < NEAR * distance(x, y):
            text = f"{where}: B's has the weight decay in it: Adam with L2, not AdamW"
            yield Cause("coupled decay", text, 0.95)
    elif d.update:
        yield from explained(x, y, _averages(gradients, power, x), where)
    yield Cause("moments", f"{where}: its gradients agree, and it does not", 0.3)


def _moment(side: Side, update: int, pair: Pair, is_second: bool) -> np.ndarray | None:
    return side.tensor("moment", update, pair, f"{side.slots[is_second]}/")


def _averages(gradients: list[np.ndarray | None], power: int, like: np.ndarray) -> Iterator[Formula]:
    for beta in BETAS:
        value = np.zeros_like(like)
        for gradient in gradients:
            value = value if gradient is None else beta * value + (1 - beta) * gradient**power
        yield Formula({"betas": f"has a beta of {beta}"}, value, "betas")


# Updates


def movement(side: Side, update: int, pair: Pair) -> np.ndarray | None:
    """Return by how much a parameter changes."""
    before, after = (side.tensor("parameter", update + i, pair) for i in (0, 1))
    return None if before is None or after is None else after - before


def _compared(d: Divergence) -> list[Finding]:
    """Return the updates of parameters; the norm of all gradients is compared at the same stage."""
    return [x for x in d.of("update") if x.name in d.pairs]


def _failed(d: Divergence) -> list[Finding]:
    return [x for x in _compared(d) if not x.passes]


def _movements(d: Divergence) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return the changes of parameters that differ, in A and in B."""
    found = []
    for finding in _failed(d):
        x, y = (movement(side, d.update, d.pairs[finding.name]) for side in d.sides)
        if x is not None and y is not None:
            found.append((finding.name, x, y))
    return found


def frozen(d: Divergence) -> Iterator[Cause]:
    for name, x, y in _movements(d):
        if not (x.any() and y.any()):
            yield Cause("frozen parameter", f"{name}: {'A' if y.any() else 'B'} does not update it", 0.8)


def one_rate(d: Divergence) -> Iterator[Cause]:
    """All updates of B are A's times one number, or each layer has its own."""
    ratios = [ratio_of(x, y) for _, x, y in _movements(d)]
    if not ratios or not all(ratios):
        return
    ratio, rates, i = float(np.median(ratios)), d.rates[0], d.update
    if np.ptp(ratios) < 1e-2 * abs(ratio) and len(ratios) > 0.5 * len(_compared(d)):
        yield Cause("rate scale", f"all updates of B are {ratio:.5g} times A's", 0.6)
        for j in (i + 1, i - 1):
            if 0 <= j < len(rates) and rates[i] and abs(rates[j] / rates[i] / ratio - 1) < 1e-3:
                yield Cause("schedule offset", f"all updates of B have the rate of update {j}, not of {i}", 0.98)
    elif len(set(np.round(ratios, 3))) > 1:
        text = "B's updates are A's times a number of each layer: other rates of layers"
        yield Cause("layer rates", text, 0.85)


def moved_at_rate_zero(d: Divergence) -> Iterator[Cause]:
    rates = d.rates[0]
    if d.update == 0 and len(rates) and rates[0] == 0 and any(y.any() for _, _, y in _movements(d)):
        yield Cause("schedule offset", "B updates although the rate is 0: it has the rate of another update", 0.98)


def part_of_parameters(d: Divergence) -> Iterator[Cause]:
    failed, n_all = _failed(d), len(_compared(d))
    if 0 < len(failed) < n_all:
        arrays = [d.a.tensor("parameter", 0, d.pairs[f.name]) for f in failed]
        is_vectors = all(x is not None and x.ndim < 2 for x in arrays)
        text = "biases and norms" if is_vectors else listed(f.name for f in failed)
        text = f"only {text} are updated otherwise ({len(failed)} of {n_all}): another group, as of weight decay"
        yield Cause("decay group", text, 0.55)


def clipped_update(d: Divergence) -> Iterator[Cause]:
    steps = _movements(d)
    sizes = [
        math.sqrt(sum(float((z**2).sum()) for z in side)) for side in ([x for _, x, _ in steps], [y for *_, y in steps])
    ]
    is_scaled = bool(steps) and all(ratio_of(x, y) for _, x, y in steps)
    if is_scaled and all(sizes) and len(steps) == len(_compared(d)):
        text = f"all updates of B together have the norm {sizes[1]:.4g} (A {sizes[0]:.4g})"
        yield Cause("clipping", f"{text}: clipped after the optimizer?", 0.5)


def adam(d: Divergence) -> Iterator[Cause]:
    for name, x, y in _movements(d)[:MOST]:
        yield from explained(x, y, _steps_of_adam(d, d.pairs[name]), f"update of {name}")


@dataclasses.dataclass(frozen=True)
class Adam:
    """Settings of Adam, and where its parts stand."""

    beta1: float
    beta2: float
    epsilon: float
    decay: float
    rate: float
    is_coupled: bool = False
    corrects: bool = True
    epsilon_is: str = "outside the root"

    def step(self, gradients: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
        """Return the change of a parameter by its gradients and values so far."""
        m, v, n = np.zeros_like(weights[0]), np.zeros_like(weights[0]), len(gradients)
        for gradient, weight in zip(gradients, weights, strict=True):
            g = gradient + self.decay * weight if self.is_coupled else gradient
            m, v = self.beta1 * m + (1 - self.beta1) * g, self.beta2 * v + (1 - self.beta2) * g**2
        corrections = (1 - self.beta1**n, 1 - self.beta2**n) if self.corrects else (1.0, 1.0)
        m, v = m / corrections[0], v / corrections[1]
        before_correction = self.epsilon / corrections[1] ** 0.5
        root = {
            "outside the root": np.sqrt(v) + self.epsilon,
            "inside the root": np.sqrt(v + self.epsilon),
            "added before the bias correction": np.sqrt(v) + before_correction,
        }[self.epsilon_is]
        return -self.rate * (m / root + (0 if self.is_coupled else self.decay) * weights[-1])


def _steps_of_adam(d: Divergence, pair: Pair) -> Iterator[Formula]:
    """Yield A's update as its settings say, and with each thing otherwise."""
    gradients, weights = ([d.a.tensor(k, i, pair) for i in range(d.update + 1)] for k in ("gradient", "parameter"))
    known, rate = d.settings(d.a, pair.a.name), float(d.rates[0][d.update])
    if any(x is None for x in (*gradients, *weights)) or not math.isfinite(rate):
        return
    if known and not {"betas", "b1"} & set(known):  # another optimizer than Adam
        return
    betas = known.get("betas", (known.get("b1", 0.9), known.get("b2", 0.999)))
    usual = Adam(betas[0], betas[1], known.get("eps", 1e-8), known.get("weight_decay") or 0.0, rate)
    decays = [e.info.get("weight_decay") for side in d.sides for e in side.record.all("setting")]
    for decay in dict.fromkeys([usual.decay, 0.0, *(float(x) for x in decays if x), 0.01, 1e-4, 0.1]):
        own = dataclasses.replace(usual, decay=decay)
        text = {"decay group": f"decays it by {decay:g}"}
        yield _formula(own, gradients, weights, text, "" if decay == usual.decay else "decay group")
        for kind, change, said in _changes(d, usual):
            changed = dataclasses.replace(own, **change)
            yield _formula(changed, gradients, weights, {kind: said} | text, kind)


def _formula(how: Adam, gradients: list[Any], weights: list[Any], choices: dict[str, str], kind: str) -> Formula:
    return Formula(choices, how.step(gradients, weights), kind)


def _changes(d: Divergence, usual: Adam) -> list[tuple[str, dict[str, Any], str]]:
    """Return what may be otherwise than in A: the cause, the settings, and what they say."""
    rates, i = d.rates[0], d.update
    found: list[tuple[str, dict[str, Any], str]] = [
        ("coupled decay", {"is_coupled": True}, "adds the decay to the gradient"),
        ("bias correction", {"corrects": False}, "does not correct the bias of moments"),
        ("epsilon", {"epsilon_is": "inside the root"}, "has epsilon inside the root"),
        ("epsilon", {"epsilon_is": "added before the bias correction"}, "adds epsilon before the bias correction"),
    ]
    found += [("epsilon", {"epsilon": x}, f"has epsilon {x:g}") for x in EPSILONS if x != usual.epsilon]
    if i:  # the first update is the same for all betas, by the bias correction
        found += [("betas", {"beta2": x}, f"has a beta2 of {x}") for x in BETAS if x not in (usual.beta2, 0.0)]
        found += [("betas", {"beta1": x}, f"has a beta1 of {x}") for x in BETAS if x != usual.beta1]
    near = [j for j in (i + 1, i - 1) if 0 <= j < len(rates) and rates[j] != rates[i]]
    return found + [("schedule offset", {"rate": float(rates[j])}, f"has the rate of update {j}") for j in near]


def unknown(d: Divergence) -> Iterator[Cause]:
    if d.name in d.pairs:
        yield Cause("optimizer", f"update of {d.name}: gradients and rates agree, and it does not", 0.2)


MOMENT_RULES: tuple[Rule, ...] = (moments,)
RULES: tuple[Rule, ...] = (
    frozen,
    one_rate,
    moved_at_rate_zero,
    adam,
    part_of_parameters,
    clipped_update,
    gradient_norm,
    unknown,
)
