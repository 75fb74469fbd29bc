"""Start values and the seeds of dropout: two packages draw different numbers, so each is held to the distribution."""

from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.params import names
from jaxlm.params.names import Arrays
from jaxlm.tasks import parameters
from parity_tests.compare.rows import Row
from parity_tests.drift import config_of
from parity_tests.packages import PACKAGES, Jaxlm, Package
from parity_tests.plan import random_plan

DEVIATIONS = 5  # of a statistic from its expectation, in standard errors: one in two million is farther off


def start_values(task: str, departure: str = "", initialization: str = "original") -> list[Row]:
    """Return how far start values of both packages are from the original's distributions, or those of a departure."""
    sizes = {"model.d_model": 48, "model.n_heads": 4, "model.vocab_size": 101}
    changes = {f"model.{departure}": True, "model.positions": "learned"} if departure else {}
    config = config_of(task, **sizes, **changes)
    config = configs.replace(config, "model.initialization", initialization)
    name = ", ".join(x for x in (task, departure, initialization) if x not in ("", "original"))
    return [row for package in PACKAGES for row in _rows(name, package, config)]


def _rows(name: str, package: type[Package], config: Config) -> list[Row]:
    rows = []
    start = _start(package, config)
    for tensor, x in start.items():
        if tensor == "base.embedding.token.weight":
            pad = float(np.abs(x[config.model.pad_id]).max())
            rows.append(Row(name, package.name, "start of the pad row", pad, 0, tensor))
            x = np.delete(x, config.model.pad_id, axis=0)
        rows += [Row(name, package.name, *values, tensor) for values in _deviations(tensor, x, start, config)]
    first, second = (start[f"base.blocks.{i}.attention.query.weight"].ravel() for i in (0, 1))
    alike = abs(np.corrcoef(first, second)[0, 1]) * len(first) ** 0.5
    rows.append(Row(name, package.name, "two blocks start alike", alike, DEVIATIONS))
    return rows


def _start(package: type[Package], config: Config) -> Arrays:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in parameters.shapes(config).items()}
    task: Any = package(config, zeros, "float32").task
    if package is Jaxlm:
        return names.to_torch(jax.device_get(nnx.to_pure_dict(nnx.state(task.build_model(nnx.Rngs(3))))))
    model = task.build_model(torch.Generator().manual_seed(3))
    return {name: x.detach().numpy() for name, x in model.named_parameters()}


def _deviations(tensor: str, x: np.ndarray, start: Arrays, config: Config) -> list[tuple[str, float, float]]:
    """Return quantity, difference and tolerance of each property that the start values of a tensor have."""
    is_weight, part = tensor.endswith("weight"), tensor.split(".")[-2]
    if "norm" in part or tensor in ("head.bias", "head.linear.bias"):
        return [("start of norms and of the head's bias", float(np.abs(x - is_weight * ("norm" in part)).max()), 0)]
    is_modernbert, scaled = config.model.initialization == "modernbert", 0.02 / (2 * config.model.n_layers) ** 0.5
    is_truncated = is_modernbert and tensor != "base.embedding.position"
    if config.model.initialization != "original":
        if not is_weight and tensor != "base.embedding.position":
            return [("start of biases", float(np.abs(x).max()), 0)]
        is_scaled = part in ("output", "fc2") and config.model.initialization != "llama"
        deviation = scaled if is_scaled or (is_modernbert and part in ("linear", "dense")) else 0.02
        if is_modernbert and part == "linear" and parameters.model_kind(config.task) == "classifier":
            deviation = config.model.d_model**-0.5
        bound = 2 * deviation
        # Of a normal distribution without what is beyond two deviations.
        deviation, kurtosis = (deviation * 0.7737**0.5, 2.366) if is_truncated else (deviation, 3.0)
    elif tensor.startswith("base.embedding") or part == "linear":  # the latter only in heads
        has_scale = not (config.model.tied_embedding or config.model.embedding_norm)
        is_wide = tensor == "base.embedding.token.weight" and has_scale
        deviation, kurtosis = 1.0 if is_wide else 0.02, 3.0
    else:
        n_out, n_in = start[tensor.removesuffix("bias").removesuffix("weight") + "weight"].shape
        bound = (6 / (n_in + n_out)) ** 0.5 if is_weight else n_in**-0.5
        deviation, kurtosis = bound / 3**0.5, 1.8
    mean = abs(x.mean()) / deviation * x.size**0.5
    spread = abs((x**2).mean() / deviation**2 - 1) * (x.size / (kurtosis - 1)) ** 0.5
    rows: list[tuple[str, float, float]] = [
        ("mean of start values", mean, DEVIATIONS),
        ("spread of start values", spread, DEVIATIONS),
    ]
    if kurtosis < 3:
        # The largest of many uniform numbers is just below the bound; that of normal ones is far above.
        rows.append(("largest start value over its bound", float(np.abs(x).max() / bound), 1 + 1e-6))
    return rows


def masks_of_updates() -> list[Row]:
    """Return a row that fails where two updates on one batch drop the same, or where one update is not repeatable."""
    changes = {"train.max_steps": 2, "train.accumulate": 1, "train.learning_rate": 0.0, "train.min_learning_rate": 0.0}
    config = config_of("gpt", **changes, **{"model.dropout": 0.5})
    plan = random_plan("masks of updates", config, seed=13)
    rows = []
    for package in PACKAGES:
        losses = []
        for _ in range(2):
            state = package(config, plan.start, "float32")
            state.start(package.schedule.learning_rate(config.train))
            losses.append([float(state.update(plan.batches[0])["loss"]) for _ in range(2)])
        rows.append(Row(plan.name, package.name, "same masks in two updates", float(losses[0][0] == losses[0][1]), 0))
        rows.append(Row(plan.name, package.name, "masks of a run anew", abs(losses[0][0] - losses[1][0]), 0))
    return rows
