"""The functions of the loop: evaluation of every sample once and without dropout, and updates that begin where told."""

import types
from typing import Any

import numpy as np
import pytest
import torch

from jaxlm import config as configs
from jaxlm.data import loader
from jaxlm.training.log import RunLog
from torchlm import loop, parallel, step
from torchlm.tasks import TASKS

T, V = 5, 11


class Sentences:
    """Samples of a classification, each with its number as a token."""

    constants = {"bytes": 7}

    def __len__(self) -> int:
        return 10

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        tokens = np.ones((len(indices), T), np.int32)
        tokens[:, 1] = indices + 1
        return {"tokens": tokens, "labels": (indices % 2).astype(np.int32)}


@pytest.fixture
def built() -> tuple[configs.Config, Any, step.TrainState, loop.Compiled]:
    sizes = {"vocab_size": V, "d_model": 12, "n_layers": 1, "n_heads": 3, "seq_len": T, "dropout": 0.5}
    settings = {f"model.{name}": x for name, x in sizes.items()} | {"train.batch_size": 4, "train.seed": 3}
    config = configs.build({"task": "sst2", **settings})
    task = TASKS["sst2"](config)
    mesh = parallel.Mesh(0, 1, torch.device("cpu"))
    fresh, compiled = loop.build(config, task, mesh)
    return config, task, fresh(), compiled


def run_of(config: configs.Config) -> Any:
    data = types.SimpleNamespace(samples={"validation": Sentences()})
    chosen = {"validation": {"": loader.Chosen("validation", np.arange(10), 0, 1.0)}}
    return types.SimpleNamespace(config=config, data=data, chosen=chosen, log=RunLog())


def test_evaluation_covers_every_sample_once_without_dropout(built: tuple) -> None:
    config, task, state, compiled = built
    (totals,) = loop.evaluate(run_of(config), compiled, state.model.train(), "validation", lambda: False).values()
    batch = {name: torch.from_numpy(x).long() for name, x in Sentences().batch(np.arange(10), None).items()}
    with torch.no_grad():
        expected = task.loss(state.model.eval(), batch, None)
    assert totals["count"] == 10
    assert totals["bytes"] == 7
    assert totals["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
    np.testing.assert_array_equal(totals["confusion"], expected["confusion"])
    assert all(value.dtype == np.float64 for name, value in totals.items() if name != "bytes")


def test_evaluation_scores_the_chosen_samples(built: tuple) -> None:
    config, task, state, compiled = built
    run, chosen = run_of(config), np.array([1, 2, 4, 7, 9])
    run.chosen["validation"] = {"": loader.Chosen("validation", chosen, 0, 0.5)}
    (totals,) = loop.evaluate(run, compiled, state.model, "validation", lambda: False).values()
    batch = {name: torch.from_numpy(x).long() for name, x in Sentences().batch(chosen, None).items()}
    with torch.no_grad():
        expected = task.loss(state.model.eval(), batch, None)
    assert (totals["count"], totals["bytes"]) == (5, 3.5)
    assert totals["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)


def test_evaluation_ends_when_interrupted(built: tuple) -> None:
    config, _, state, compiled = built
    calls = iter([False, True])
    assert loop.evaluate(run_of(config), compiled, state.model, "validation", lambda: next(calls)) is None
    assert next(calls, None) is None


def test_prediction_is_without_dropout_and_gradients(built: tuple) -> None:
    _, task, state, compiled = built
    batch = {"tokens": torch.arange(1, V).repeat(2).reshape(4, T)}
    predictions = compiled.predict(state.model.train(), batch)
    assert not predictions.requires_grad
    assert torch.equal(predictions, task.predict(state.model.eval(), batch))


def test_start_values_follow_the_seed(built: tuple) -> None:
    config, task, state, compiled = built
    again, _ = loop.build(config, task, compiled.mesh)
    other, _ = loop.build(configs.replace(config, "train.seed", 4), task, compiled.mesh)
    states = (state, again(), other())
    weight, weight_2, weight_3 = (x.model.base.blocks[0].feed_forward.fc1.weight for x in states)
    assert torch.equal(weight, weight_2)
    assert not torch.equal(weight, weight_3)
