"""The order of several sources against their settings: shares, the update of a change, resumes, and the loss of each.

All of it is code that both packages share, so that a plain count is the reference.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, TrainConfig
from jaxlm.data import loader
from jaxlm.data.mixture import Mix
from jaxlm.data.position import Position
from jaxlm.tasks import TASKS
from jaxlm.training.run import Run
from parity_tests.compare.rows import Row
from parity_tests.drift import config_of
from parity_tests.packages import PACKAGES, Package

TRAIN = TrainConfig(max_steps=60, batch_size=16, seed=3)
CHANGE = 20  # updates
SIZES, LENGTHS = {"a": 500, "b": 20, "c": 300}, {"a": 2, "b": 4, "c": 8}  # samples, and tokens of each
WEIGHTS, AFTER = {"a": 3.0, "b": 1.0, "c": 0.5}, {"a": 1.0, "b": 0.0, "c": 4.0}
RESUMED = (7, CHANGE, 33)  # updates, after which a run resumes


class _Numbers:
    """Samples whose tokens tell their source, their number and their epoch."""

    reads, seq_len = "text", 8

    def __init__(self, name: str):
        self.name, self.constants = name, dict[str, float]()

    def __len__(self) -> int:
        return SIZES[self.name]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), LENGTHS[self.name])

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        source = np.full(len(indices), list(SIZES).index(self.name))
        return {"tokens": np.stack([source, indices, epochs], axis=1)}

    def cut(self, batch: Any, length: int) -> Any:
        return batch

    def n_tokens(self, batch: Any) -> int:
        return int(batch["tokens"].size)


def mixture() -> list[Row]:
    """Return how far the order of three sources, and their losses, are from what their settings say."""
    return [row for package in PACKAGES for row in (*_order(package), *_losses(package))]


def _order(package: type[Package]) -> list[Row]:
    sources = tuple({"name": x, "weight": WEIGHTS[x], "weight_after": AFTER[x]} for x in SIZES)
    parts: dict[str, Any] = {name: _Numbers(name) for name in SIZES}
    samples = Mix(parts, DataConfig(sources=sources, weights_after=CHANGE), {name: f"of {name}" for name in SIZES})
    whole = _taken(samples, Position())
    rows = []

    def add(quantity: str, difference: float, tolerance: float = 0.0) -> None:
        rows.append(Row("mixture", package.name, quantity, float(difference), tolerance))

    for when, updates, weights in (("before", whole[:CHANGE], WEIGHTS), ("after", whole[CHANGE:], AFTER)):
        tokens = np.bincount(updates[..., 0].ravel(), minlength=3) * list(LENGTHS.values())
        expected = np.array([*weights.values()]) / sum(weights.values())
        # One sample more or less of a source, of at most 8 tokens.
        add(f"shares of tokens {when} the change", np.abs(tokens / tokens.sum() - expected).max(), 16 / tokens.sum())
    add("samples of b from the update of the change on", np.sum(whole[CHANGE:, :, 0] == 1))
    for i, name in enumerate(SIZES):
        alone: Any = _Numbers(name)
        of_source = whole.reshape(-1, 3)[whole[..., 0].ravel() == i]
        expected = _taken(alone, Position()).reshape(-1, 3)[: len(of_source), 1:]
        add(f"samples of {name} unlike those of it alone", np.sum(of_source[:, 1:] != expected))
    position = Position()
    for step in RESUMED:
        mix = samples.state(TRAIN, position, TRAIN.batch_size * step)
        position = dataclasses.replace(position, step=step, sample=TRAIN.batch_size * step, mix=mix)
        add(f"samples that differ after a resume at update {step}", np.sum(_taken(samples, position) != whole[step:]))
    return rows


def _taken(samples: Any, position: Position) -> np.ndarray:
    """Return source, number and epoch of the samples of all updates from a position on, [n, B, 3]."""
    at = loader.order_of(samples, TRAIN, position)
    places = position.sample + np.arange((TRAIN.max_steps - position.step) * TRAIN.batch_size)
    return samples.batch(*at(places))["tokens"].reshape(-1, TRAIN.batch_size, 3)


def _losses(package: type[Package]) -> list[Row]:
    """Return how far the scores of two sources are from the sums of their losses over the sums of their tokens."""
    totals: Any = {
        "a": {"loss": 30.0, "count": 10.0, "correct": 1.0, "bytes": 40.0},
        "b": {"loss": 200.0, "count": 100.0, "correct": 2.0, "bytes": 400.0},
    }
    run: Any = SimpleNamespace(task=TASKS["gpt"](config_of("gpt")))
    scores = Run.scores(run, totals)
    expected = {"loss": 230 / 110, "loss_a": 3.0, "loss_b": 2.0}
    return [Row("mixture", package.name, f"{x} of a validation", abs(scores[x] - expected[x]), 1e-12) for x in expected]
