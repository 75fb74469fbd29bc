"""All that a package computes of a plan, and how far two of these are apart, one row for each tensor and quantity."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.params.names import Arrays
from parity_tests.compare.rows import Row, badness, norm, ratio
from parity_tests.compare.tolerances import Bound, Tolerances
from parity_tests.packages import Package, Precision, Rate
from parity_tests.plan import CYCLE_AMPLITUDE, Batch, Plan


@dataclass(frozen=True)
class First:
    """What a model makes of one batch without dropout: logits, the mean loss, its gradients."""

    logits: np.ndarray
    loss: float
    gradients: Arrays


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    weights: Arrays
    first_moments: Arrays
    second_moments: Arrays
    updates: list[int]  # every counter of updates that there is
    samples: int
    rate: float  # of the last update


@dataclass(frozen=True)
class Trajectory:
    """The numbers of one run. Weights and gradients are under torchlm's names."""

    config: Config
    start: Arrays
    first: First  # of batch 0 at the start
    rates: np.ndarray  # in float64, one an update, as are the four below
    used_rates: np.ndarray  # in the precision of the update
    n_batches: np.ndarray
    losses: np.ndarray
    grad_norms: np.ndarray  # before clipping
    saved: Saved
    final: Arrays
    eval_loss: float
    eval_counts: np.ndarray  # of labels, and of right predictions


def run(package: type[Package], plan: Plan, precision: Precision = "float32") -> Trajectory:
    """Return what a package computes of a plan, with its real update step."""
    train, resume, saved = plan.config.train, plan.resume, None
    state = package(plan.config, plan.start, precision)
    start = first(state, {name: x[0] for name, x in plan.batches[0].items()})
    n_batches = [len(batches["tokens"]) for batches in plan.batches]
    cycle_steps = plan.cycle_steps
    rate = _with_cycle(package, package.schedule.learning_rate(train), cycle_steps)
    state.start(rate, plan.is_mean_of_means, plan.teacher)
    rates: list[float] = []
    metrics = []
    for i, batches in enumerate(plan.batches):
        if resume and i == resume.step:
            saved = _save(state, rates[-1], n_batches[:i])
            rate = package.schedule.learning_rate(resume.train)
            rate = package.schedule.rewarmup(rate, i, resume.n_steps, saved.rate)
            cycle_steps = resume.cycle_steps
            state.set_rate(_with_cycle(package, rate, cycle_steps))
        if cycle_steps:
            n_batches[i] = package.schedule.n_batches(i, cycle_steps)
        rates.append(state.exact_rate(i))
        metrics.append(state.update(batches))
    saved = saved or _save(state, rates[-1], n_batches)
    final = state.weights()
    if plan.evaluated_weights:
        state.set_weights(plan.evaluated_weights)
    evaluated, _, _ = state.forward(plan.evaluated)
    return Trajectory(
        config=plan.config,
        start=plan.start,
        first=start,
        rates=np.array(rates),
        used_rates=np.array([x["rate"] for x in metrics]),
        n_batches=np.array(n_batches),
        losses=np.array([_mean_loss(x) for x in metrics]),
        grad_norms=np.array([x["grad_norm"] for x in metrics]),
        saved=saved,
        final=final,
        eval_loss=_mean_loss(evaluated),
        eval_counts=np.array([int(evaluated["count"]), int(evaluated.get("correct", 0))]),
    )


def first(state: Package, batch: Batch) -> First:
    """Return what a package makes of a batch with its present weights."""
    totals, logits, gradients = state.forward(batch)
    return First(logits, _mean_loss(totals), gradients)


def _with_cycle(package: type[Package], rate: Rate, cycle_steps: int) -> Rate:
    return package.schedule.cycled(rate, cycle_steps, CYCLE_AMPLITUDE) if cycle_steps else rate


def _save(state: Package, rate: float, n_batches: list[int]) -> Saved:
    samples = sum(n_batches) * state.config.train.batch_size
    return Saved(state.weights(), *state.moments(), state.counts(), samples, rate)


def _mean_loss(totals: dict[str, np.ndarray]) -> float:
    return float(totals["loss"]) / float(totals["count"])


def compare_first(
    case: str, package: str, config: Config, got: First, want: First, bounds: Tolerances, where: str = "batch 0"
) -> list[Row]:
    """Return how far apart logits, loss and the gradient of each tensor are."""
    rows = _Rows(case, package, config)
    rows.add(f"logits of {where}", np.abs(got.logits - want.logits).max(), np.abs(want.logits).max(), bounds.logits)
    rows.add(f"loss of {where}", abs(got.loss - want.loss), want.loss, bounds.loss)
    rows.add_tensors(
        f"gradients of {where}", got.gradients, want.gradients, bounds.gradients, bounds.gradients_of_key_biases
    )
    return rows.rows


def compare(case: str, package: str, got: Trajectory, want: Trajectory, bounds: Tolerances) -> list[Row]:
    """Return how far `got` is from `want`: a row for each tensor, and for the worst update of what each update has."""
    rows = _Rows(case, package, want.config)
    rows.rows += compare_first(case, package, want.config, got.first, want.first, bounds)
    peak = np.abs(want.rates).max()
    rows.add_updates("batches accumulated", got.n_batches, want.n_batches, 1, 0)
    rows.add_updates("rates", got.rates, want.rates, want.rates, bounds.rates)
    rows.add_updates("rates as used", got.used_rates, want.rates, peak, bounds.used_rates)
    rows.add_updates("losses", got.losses, want.losses, want.losses, bounds.losses)
    rows.add_updates("norms of gradients", got.grad_norms, want.grad_norms, want.grad_norms, bounds.grad_norms)
    saved, expected = got.saved, want.saved
    way = np.abs(want.rates).sum()
    rows.add_weights("saved weights", saved.weights, expected.weights, want.start, way, bounds)
    first, second = (_roots(x.second_moments) for x in (saved, expected))
    rows.add_tensors(
        "first moments", saved.first_moments, expected.first_moments, bounds.moments, bounds.moments_of_key_biases
    )
    rows.add_tensors("roots of second moments", first, second, bounds.moments, bounds.moments_of_key_biases)
    updates = max(abs(a - b) for a in saved.updates for b in expected.updates)
    rows.add("saved counters of updates", updates, 1, 0)
    rows.add("saved counter of samples", abs(saved.samples - expected.samples), 1, 0)
    rows.add("saved rate", abs(saved.rate - expected.rate), expected.rate, bounds.rates)
    rows.add_weights("final weights", got.final, want.final, want.start, way, bounds)
    rows.add("loss of the evaluation", abs(got.eval_loss - want.eval_loss), want.eval_loss, bounds.eval_loss)
    if len(want.eval_counts):
        rows.add("counts of the evaluation", np.abs(got.eval_counts - want.eval_counts).max(), 1, 0)
    return rows.rows


class _Rows:
    """Rows of one comparison."""

    def __init__(self, case: str, package: str, config: Config):
        self.case, self.package, self.config = case, package, config
        self.rows: list[Row] = []

    def add(self, quantity: str, difference: float, scale: float, bound: float, where: str = "") -> None:
        self.rows.append(Row(self.case, self.package, quantity, ratio(difference, scale), bound, where))

    def add_updates(self, quantity: str, got: np.ndarray, want: np.ndarray, scale: Any, bound: Bound) -> None:
        """Add the update at which two are nearest to the bound, or farthest beyond it."""
        scale, bounds = np.broadcast_to(scale, want.shape), np.broadcast_to(bound, want.shape)
        rows = [
            Row(self.case, self.package, quantity, ratio(*pair), float(bounds[i]), f"update {i}")
            for i, pair in enumerate(zip(np.abs(got - want), scale, strict=True))
        ]
        self.rows.append(max(rows, key=badness))

    def add_tensors(self, quantity: str, got: Arrays, want: Arrays, bound: float, key_bound: float) -> None:
        """Add each tensor, relative to its norm; where only rounding is left of it, to the norm of all."""
        whole = norm(want)
        for name, array in want.items():
            difference = norm({name: np.float64(got[name]) - array}) if name in got else math.inf
            if is_rounding(self.config, name):
                self.add(f"{quantity} (key biases)", difference, whole, key_bound, name)
            else:
                self.add(quantity, difference, norm({name: array}), bound, name)

    def add_weights(
        self, quantity: str, got: Arrays, want: Arrays, start: Arrays, way: float, bounds: Tolerances
    ) -> None:
        """Add each tensor, relative to how far it has moved; where only rounding moves it, to how far it may have."""
        for name, array in want.items():
            difference = np.float64(got[name]) - array
            if is_rounding(self.config, name):
                self.add(f"{quantity} (key biases)", np.abs(difference).max(), way, bounds.key_biases, name)
            else:
                moved = norm({name: np.float64(array) - start[name]})
                self.add(quantity, norm({name: difference}), moved, bounds.weights, name)


def is_rounding(config: Config, name: str) -> bool:
    """Return whether nothing but rounding is left of the gradient of a parameter.

    The bias of the keys shifts all scores of a query alike, which a softmax does not see; rotary positions turn it by
    another angle at each position, and a norm of the keys is not linear.
    """
    model = config.model
    return name.endswith(".attention.key.bias") and model.positions != "rotary" and not model.qk_norm


def _roots(arrays: Arrays) -> Arrays:
    """Return the roots of second moments: they have the scale of gradients."""
    with np.errstate(invalid="ignore"):  # what is no second moment may be negative: its root is NaN, which never passes
        return {name: np.sqrt(np.float64(array)) for name, array in arrays.items()}
