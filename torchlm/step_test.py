"""One update against NumPy in float64, and what must hold of loss, accumulation, padding and dropout."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from jaxlm import config as configs
from torchlm import optim, schedule, step
from torchlm.loss import Totals
from torchlm.tasks import TASKS

B, T, D, V, M = 4, 6, 12, 11, 2
SIZES = {"vocab_size": V, "d_model": D, "n_layers": 2, "n_heads": 3, "seq_len": T}


def config_of(task: str = "mlm", **settings: Any) -> configs.Config:
    settings = {f"model.{name}": value for name, value in SIZES.items()} | {"model.dropout": 0.0} | settings
    return configs.build({"task": task, "train.warmup_steps": 0, "train.decay_steps": 10, **settings})


def batch_of(n: int = B, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch of mlm; each row but the first has an ignored label."""
    random = np.random.default_rng(seed)
    batch = {
        "tokens": random.integers(1, V, (n, T)),
        "positions": random.integers(0, T, (n, M)),
        "labels": random.integers(1, V, (n, M)),
    }
    batch["labels"][1:, 1] = -1
    return {name: torch.from_numpy(x) for name, x in batch.items()}


def start(config: configs.Config) -> tuple[Any, step.TrainState]:
    task = TASKS[config.task](config)
    model = task.build_model(torch.Generator().manual_seed(0))
    return task, step.init_state(model, optim.make_optimizer(config.train, model))


def update(
    config: configs.Config, task: Any, state: step.TrainState, batches: dict[str, torch.Tensor], key: Any = None
) -> Totals:
    rate = schedule.learning_rate(config.train)
    return step.train_step(step.Rule(rate, config.train.clip_norm), task.loss, state, batches, key)[1]


def test_accumulated_batches_count_as_one_large_batch() -> None:
    large = batch_of(2 * B)
    large["labels"][0] = -1  # so that the halves count differently many
    results = []
    for shape in ((1, 2 * B), (2, B)):
        task, state = start(config := config_of(**{"train.clip_norm": 0.5}))
        totals = update(config, task, state, {name: x.reshape(*shape, -1) for name, x in large.items()})
        results.append((totals, state.model.state_dict()))
    (one, weights), (two, weights_2) = results
    for name in one:
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-6), name
    for name, x in weights.items():
        # AdamW's first step is the sign of a gradient: one that is zero but for rounding goes anywhere.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(weights_2[name], x, rtol=1e-4, atol=2e-6, msg=name)


def test_padding_does_not_change_the_loss_of_real_tokens() -> None:
    task, state = start(config_of())
    padded = batch_of()
    padded["tokens"][:, 4:] = 0
    padded["positions"] %= 4
    short = padded | {"tokens": padded["tokens"][:, :4]}
    with torch.no_grad():
        losses = [float(task.loss(state.model, batch, None)["loss"]) for batch in (padded, short)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("clip_norm", [0.3, 1e3])
def test_updates_are_those_of_the_equations(clip_norm: float) -> None:
    """AdamW as algorithm 2 of arXiv 1711.05101 has it, in NumPy, on the gradients of the model in float64."""
    config = config_of(**{"train.clip_norm": clip_norm, "train.weight_decay": 0.1, "train.learning_rate": 1e-2})
    task, state = start(config)
    state.model.double()
    weights = {name: x.detach().numpy().copy() for name, x in state.model.named_parameters()}
    mean = {name: np.zeros_like(x) for name, x in weights.items()}
    square = {name: np.zeros_like(x) for name, x in weights.items()}
    rate = schedule.learning_rate(config.train)
    for i in range(3):
        totals = task.loss(state.model, batch_of(seed=i), None)
        grads = torch.autograd.grad(totals["loss"] / totals["count"], list(state.model.parameters()))
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads))
        metrics = update(config, task, state, {name: x[None] for name, x in batch_of(seed=i).items()})
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-12)
        assert (norm > clip_norm) == (clip_norm == 0.3)
        for name, grad in zip(weights, grads, strict=True):
            grad = grad.numpy() * min(1.0, clip_norm / (norm + 1e-6))
            mean[name] = 0.9 * mean[name] + 0.1 * grad
            square[name] = 0.999 * square[name] + 0.001 * grad**2
            direction = mean[name] / (1 - 0.9 ** (i + 1)) / (np.sqrt(square[name] / (1 - 0.999 ** (i + 1))) + 1e-8)
            decay = 0.1 if weights[name].ndim == 2 else 0.0
            weights[name] = weights[name] - rate(i) * (direction + decay * weights[name])
    for name, x in state.model.named_parameters():
        np.testing.assert_allclose(x.detach(), weights[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_decay_spares_biases_norms_and_tables_of_one_row() -> None:
    config = config_of(**{"model.positions": "learned", "model.tied_embedding": True, "model.final_norm": True})
    model = TASKS["mlm"](config).build_model(torch.Generator())
    groups = optim.make_optimizer(config.train, model).param_groups
    assert [group["weight_decay"] for group in groups] == [config.train.weight_decay, 0.0]
    decayed = {id(x) for x in groups[0]["params"]}
    assert len(decayed) + len(groups[1]["params"]) == len(list(model.parameters()))
    for name, x in model.named_parameters():
        is_matrix = name.endswith(("position", "weight")) and "norm" not in name
        assert (id(x) in decayed) == is_matrix, name
    assert not optim.is_decayed(torch.zeros(1, D))


def test_dropout_differs_from_update_to_update_and_repeats_with_the_state() -> None:
    config = config_of(**{"model.dropout": 0.5, "train.learning_rate": 0.0, "train.min_learning_rate": 0.0})
    task, state = start(config)
    state.model.eval()  # as an evaluation leaves it
    batches = {name: x[None] for name, x in batch_of().items()}
    losses = [float(update(config, task, state, batches, (0, 0))["loss"]) for _ in range(3)]
    assert len(set(losses)) == 3
    state.step = 1
    assert float(update(config, task, state, batches, (0, 0))["loss"]) == losses[1]
    state.step = 1
    assert float(update(config, task, state, batches, (0, 1))["loss"]) != losses[1]


def test_an_update_without_labels_changes_no_weight_by_its_gradient() -> None:
    config = config_of(**{"train.weight_decay": 0.0})
    task, state = start(config)
    before = {name: x.clone() for name, x in state.model.state_dict().items()}
    batch = batch_of() | {"labels": torch.full((B, M), -1)}
    metrics = update(config, task, state, {name: x[None] for name, x in batch.items()})
    assert (int(metrics["count"]), float(metrics["loss"]), float(metrics["grad_norm"])) == (0, 0.0, 0.0)
    assert all(torch.equal(x, before[name]) for name, x in state.model.state_dict().items())


def test_confusion_counts_predictions_that_are_no_class() -> None:
    config = config_of("sst2", **{"model.head_outputs": "vocabulary", "data.n_labels": 3})
    task = TASKS["sst2"](config)
    logits = torch.zeros(5, V)
    for row, prediction in enumerate([0, 2, 9, 1, 1]):
        logits[row, prediction] = 1
    labels = torch.tensor([0, 1, 2, 1, -1])
    totals = task.totals(logits, labels)
    assert totals["confusion"].tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert (int(totals["count"]), int(totals["correct"])) == (4, 2)


GOOD = {"x": torch.ones(1, 4), "root": torch.ones(1, 4)}


# A batch with a loss of NaN, and one with a finite loss whose gradient is NaN, by a square root of 0.
@pytest.mark.parametrize("bad", [{"x": torch.full((1, 4), math.nan)}, {"root": torch.zeros(1, 4)}])
def test_an_update_that_is_no_number_changes_nothing_but_the_count(bad: dict[str, torch.Tensor]) -> None:
    def loss(model: Any, batch: Any, key: None) -> Totals:
        values = (model.weight[0] - batch["x"]) ** 2 + (batch["root"] * model.weight[0]).sqrt()
        return {"loss": values.sum(), "count": torch.tensor(4)}

    def trained(batches: list[dict[str, torch.Tensor]], steps: list[int]) -> tuple[list[Any], torch.Tensor, Any]:
        model = torch.nn.Linear(4, 1, bias=False)
        model.weight.data = torch.arange(1.0, 5.0)[None]
        state = step.init_state(model, optim.make_optimizer(configs.TrainConfig(), model))
        rule, metrics = step.Rule(lambda i: 0.1 / (1 + i), 1.0, skips_nonfinite=True), []
        for batch, i in zip(batches, steps, strict=True):
            state.step = i
            metrics.append(step.train_step(rule, loss, state, batch)[1])
            assert state.step == i + 1
        return metrics, model.weight.detach(), state.optimizer.state[model.weight]

    metrics, weight, moments = trained([GOOD, GOOD | bad, GOOD], [0, 1, 2])
    assert torch.isfinite(metrics[1]["loss"]) == ("root" in bad) and not torch.isfinite(metrics[1]["grad_norm"])
    # The next one has the rate of its number, and is otherwise as if this one had not been.
    _, without, moments_without = trained([GOOD, GOOD], [0, 2])
    assert torch.equal(weight, without)
    assert all(torch.equal(moments[name], x) for name, x in moments_without.items())
    assert not torch.equal(weight, trained([GOOD], [0])[1])
