"""Both packages over many updates: in float64, with dropout of the same masks, and in bfloat16."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.ops.dropout import keeps
from jaxlm.tasks import parameters
from parity_tests import trajectory
from parity_tests.compare.rows import Row, norm
from parity_tests.compare.tolerances import BFLOAT16_FACTOR, DEVIATIONS, FLOAT32, FLOAT64
from parity_tests.packages import PACKAGES, Jaxlm, Precision, Torchlm
from parity_tests.plan import Plan, random_plan
from parity_tests.trajectory import Trajectory

CLIP_NORM = 1.5  # amid the norms that gradients have here: some updates are clipped and some are not
SEEDS = {"mlm": 1, "gpt": 2, "sst2": 3, "cola": 4, "pairs": 5, "tag": 6, "embed": 7}
N_DRIFTS = 6
DRIFT_UPDATES = 10  # after 200 the ratio of two packages is chance: 0.46 to 4.6 in six starts of sst2


def config_of(task: str, **changes: Any) -> Config:
    """Return settings of a tiny run with all that an update can have; `changes` are by dotted names.

    All dimensions differ, so that two that are swapped do not fit.
    """
    return configs.build(
        {
            "task": task,
            "model.vocab_size": 17,
            "model.d_model": 12,
            "model.n_layers": 2,
            "model.n_heads": 3,
            "model.seq_len": 7,
            "model.dropout": 0.0,
            "train.max_steps": 200,
            "train.batch_size": 4,
            "train.accumulate": 2,
            "train.learning_rate": 3e-3,
            "train.min_learning_rate": 3e-4,
            "train.warmup_steps": 20,
            "train.decay_steps": 180,
            "train.weight_decay": 0.1,
            "train.clip_norm": CLIP_NORM,
            **changes,
        }
    )


def float64(task: str, n_updates: int = 200, **changes: Any) -> list[Row]:
    """Return how far the packages are apart in float64, where differences are those of the mathematics."""
    config = config_of(task, **changes | {"train.max_steps": n_updates})
    plan = random_plan(f"{task} in float64", config, SEEDS[task])
    jaxlm, torchlm = (trajectory.run(package, plan, "float64") for package in PACKAGES)
    rows = trajectory.compare(plan.name, "jaxlm, torchlm", jaxlm, torchlm, FLOAT64)
    return [*rows, clipping(plan, torchlm)]


def clipping(plan: Plan, run: Trajectory) -> Row:
    """Return a row that passes if some updates of a run were clipped and some were not."""
    n_clipped = int(np.sum(run.grad_norms > plan.config.train.clip_norm))
    is_one_sided = n_clipped in (0, len(run.grad_norms))
    return Row(plan.name, "jaxlm, torchlm", "clipping on and off", float(is_one_sided), 0, f"{n_clipped} updates on")


def dropout(task: str, n_updates: int = 50, precision: Precision = "float32") -> list[Row]:
    """Return how far the packages are apart in training mode, when torchlm drops what jaxlm drops."""
    changes = {"train.max_steps": n_updates, "train.warmup_steps": 5, "model.dropout": 0.2}
    plan = random_plan(f"{task} with dropout", config_of(task, **changes), SEEDS[task])
    jaxlm = trajectory.run(Jaxlm, plan, precision)
    masks = jaxlm_masks(plan, precision)
    with injected(masks) as misfits:
        torchlm = trajectory.run(Torchlm, plan, precision)
    bounds = FLOAT64 if precision == "float64" else FLOAT32
    n_misfits = len(misfits) + sum(1 for _ in masks)  # those that are left over
    fit = Row(plan.name, "torchlm", "masks of another number or shape", n_misfits, 0, "".join(map(str, misfits[:1])))
    return [*trajectory.compare(plan.name, "jaxlm, torchlm", jaxlm, torchlm, bounds), fit]


def jaxlm_masks(plan: Plan, precision: Precision) -> Iterator[np.ndarray]:
    """Yield what jaxlm keeps in each dropout of a plan, in the order in which a model without a scan comes to them.

    The keys are derived anew from what step.py and model.py say of them: one for an update, for an accumulated batch,
    for the embedding, and for each block's attention weights, its attention's output and its feed-forward.
    """
    model = plan.config.model
    T, D, H = model.seq_len, model.d_model, model.n_heads
    B, A = plan.config.train.batch_size, plan.config.train.accumulate

    def keep(key: Any, shape: tuple[int, ...]) -> Any:
        return keeps(key, model.dropout, shape)

    @jax.jit
    def masks_of(step: Any) -> list[Any]:
        masks: list[Any] = []
        for batch_key in jax.random.split(jax.random.fold_in(jax.random.key(0), step), A):
            shapes = [(B, T, D), *[(B, H, T, T), (B, T, D), (B, T, 4 * D)] * model.n_layers]
            masks += map(keep, jax.random.split(batch_key, len(shapes)), shapes)
        return masks

    for step in range(plan.config.train.max_steps):
        with jax.enable_x64(precision == "float64"):
            masks = jax.device_get(masks_of(step))
        yield from masks


@contextlib.contextmanager
def injected(masks: Iterator[np.ndarray]) -> Iterator[list[tuple[int, ...]]]:
    """Let PyTorch's dropout in training mode keep what the masks say, one a call.

    Yields a list of the shapes for which the next mask is none, or one of another shape; there nothing is dropped.
    """
    misfits: list[tuple[int, ...]] = []

    def drop(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training:
            return x
        mask = next(masks, None)
        if mask is None or mask.shape != x.shape:
            misfits.append(tuple(x.shape))
            return x
        return torch.where(torch.tensor(mask), x / (1 - p), 0)

    with mock.patch.object(torch.nn.functional, "dropout", drop):
        yield misfits


def dropout_statistics() -> list[Row]:
    """Return how far the shares that each package's own dropout keeps are from those of independent draws.

    With weights of zero but for a position table of 4 and output biases of 1 in two blocks, a hidden state tells which
    of its three masks kept it.
    """
    rate, n = 0.3, 4000
    config = config_of("gpt", **{"model.positions": "learned", "model.pad_id": -1, "model.dropout": rate})
    weights = {name: np.zeros(shape, np.float32) for name, shape in parameters.shapes(config).items()}
    weights["base.embedding.position"] += 4
    for block in range(config.model.n_layers):
        weights[f"base.blocks.{block}.attention.output.bias"] += 1
    tokens = np.zeros((n, config.model.seq_len), np.int32)
    keep = 1 - rate
    shares = {0: rate**2, 1: 2 * keep * rate, 2: keep**2}
    shares = {4 * first + rest: (keep if first else rate) * share for first in (0, 1) for rest, share in shares.items()}
    rows = []
    for package in PACKAGES:
        state = package(config, weights, "float32")
        hidden = state.dropped(tokens, seed=3) * keep
        for value, share in shares.items():
            found = np.isclose(hidden, value, atol=1e-5).mean()
            deviation = (share * (1 - share) / hidden.size) ** 0.5
            rows.append(
                Row("dropout", package.name, f"share of {value} kept", abs(found - share) / deviation, DEVIATIONS)
            )
        again, other = (state.dropped(tokens, seed=seed) * keep for seed in (3, 4))
        rows.append(Row("dropout", package.name, "same seed, same masks", float(np.abs(hidden - again).max()), 0))
        same = np.mean((hidden >= 3.5) == (other >= 3.5))
        deviation = (keep * rate * 2 / hidden.size) ** 0.5
        wanted = keep**2 + rate**2
        rows.append(Row("dropout", package.name, "masks of another seed", abs(same - wanted) / deviation, DEVIATIONS))
    return rows


@dataclass(frozen=True)
class Drift:
    """Losses of all updates in both precisions, by package, and how far the weights have gone apart."""

    float32: dict[str, np.ndarray]  # [runs, updates]
    bfloat16: dict[str, np.ndarray]
    weights: dict[str, float]  # norm of the difference of the final weights over that of the movement in float32

    def losses(self, package: str) -> np.ndarray:
        """Return the drift of the loss at each update, the mean over runs."""
        return np.abs(self.bfloat16[package] - self.float32[package]).mean(axis=0)


def bfloat16(task: str, n_updates: int = DRIFT_UPDATES) -> Drift:
    """Return the drift of both packages' bfloat16 from their float32; torchlm's is that of torch.autocast.

    The mean over N_DRIFTS starts: how far one run drifts is by chance twice as much, or half.
    """
    sizes = {"model.d_model": 48, "model.n_heads": 4, "model.vocab_size": 61, "model.seq_len": 16}
    config = config_of(task, **sizes, **{"train.max_steps": n_updates, "train.accumulate": 1})
    plans = [random_plan(f"{task} in bfloat16", config, SEEDS[task] + 100 * i) for i in range(N_DRIFTS)]
    exact, rounded = {}, {}
    weights = {}
    for package in PACKAGES:
        shares, singles, halves = [], [], []
        for plan in plans:
            single, half = trajectory.run(package, plan, "float32"), trajectory.run(package, plan, "bfloat16")
            apart, moved = (
                norm({name: np.asarray(x, np.float64) - other[name] for name, x in single.final.items()})
                for other in (half.final, plan.start)
            )
            shares.append(apart / moved)
            singles.append(single.losses)
            halves.append(half.losses)
        exact[package.name], rounded[package.name] = np.array(singles), np.array(halves)
        weights[package.name] = float(np.mean(shares))
    return Drift(exact, rounded, weights)


def bfloat16_rows(task: str, drift: Drift) -> list[Row]:
    """Return jaxlm's drift over that of PyTorch's autocast, for losses as the mean over all updates and for weights."""
    jaxlm, torchlm = (drift.losses(package.name).mean() for package in PACKAGES)
    ratios = {"drift of losses": jaxlm / torchlm, "drift of weights": drift.weights["jaxlm"] / drift.weights["torchlm"]}
    name = f"{task} in bfloat16"
    return [Row(name, "jaxlm", quantity, ratio, BFLOAT16_FACTOR) for quantity, ratio in ratios.items()]
