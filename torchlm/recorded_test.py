"""torchlm against the recorded original: forward, loss, gradients, and every update up to the final weights."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jaxlm import config as configs
from jaxlm import names
from torchlm import optim, schedule, step
from torchlm.tasks import TASKS

CASES = Path(__file__).parent.parent / "parity_tests" / "cases"
# Float32 sums of some hundred products each, in another order: a few rounding errors of 6e-8.
TOLERANCE = 1e-5
# The gradient of a key's bias is zero but for rounding, since it shifts all scores of a query alike; Adam turns that
# rounding into steps of the size of the rate. Its bound is absolute.
KEY_BIAS = ".attention.key.bias"


class Case:
    """One recorded case, with its arrays under torchlm's names and its labels as the tasks give them."""

    def __init__(self, name: str):
        self.recorded = json.loads((CASES / name / "case.json").read_text())
        self.arrays = dict(np.load(CASES / name / "arrays.npz"))
        self.task_name = self.recorded["task"]
        self.config = configs.build(
            {
                "task": self.task_name,
                "model.vocab_size": self.recorded["vocab_size"],
                "model.d_model": self.recorded["d_model"],
                "model.n_layers": self.recorded["n_layers"],
                "model.n_heads": self.recorded["heads"],
                "model.seq_len": self.recorded["seq_len"],
                "model.dropout": self.recorded["dropout"],
                "model.head_outputs": "vocabulary",
                "train.max_steps": self.recorded["steps"],
                "train.learning_rate": self.recorded["learning_rate"],
                "train.min_learning_rate": self.recorded["min_learning_rate"],
                "train.warmup_steps": self.recorded["warmup_iters"],
                "train.decay_steps": self.recorded["lr_decay_iters"],
                "train.weight_decay": self.recorded["weight_decay"],
            }
        )
        self.task = TASKS[self.task_name](self.config)

    def weights(self, kind: str) -> dict[str, torch.Tensor]:
        """Return the arrays `kind`/NAME under torchlm's names."""
        arrays = {name.removeprefix(f"{kind}/"): x for name, x in self.arrays.items() if name.startswith(f"{kind}/")}
        state = names.check(names.from_original(arrays, self.task_name), names.shapes(self.config), kind)
        return {name: torch.from_numpy(x) for name, x in state.items()}

    def model(self, kind: str) -> torch.nn.Module:
        model = self.task.build_model(torch.Generator())
        model.load_state_dict(self.weights(kind))
        return model

    def batch(self, i: int) -> dict[str, torch.Tensor]:
        """Return batch i; in the original, label 0 of a token means: not counted."""
        tokens, labels = torch.from_numpy(self.arrays["x"][i]), torch.from_numpy(self.arrays["y"][i])
        if self.task_name in ("mlm", "gpt"):
            labels = torch.where(labels == 0, -1, labels)
        batch = {"tokens": tokens, "labels": labels}
        if self.task_name == "mlm":
            batch["positions"] = torch.arange(tokens.shape[1]).expand(tokens.shape)
        return batch

    def loss(self, model, batch, key):
        """Return the task's totals, but for the confusion of as many classes as the head has outputs."""
        totals = dict(self.task.loss(model, batch, key))
        totals.pop("confusion", None)
        return totals


@functools.cache
def load(name: str) -> Case:
    return Case(name)


@pytest.fixture(params=["mlm", "gpt", "sst2", "cola"])
def case(request: pytest.FixtureRequest) -> Case:
    return load(request.param)


def test_logits_and_loss_of_the_first_batch(case: Case) -> None:
    model, batch, expected = case.model("init"), case.batch(0), case.arrays["logits0"]
    with torch.no_grad():
        logits, totals = model(batch["tokens"]), case.loss(model, batch, None)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    assert float(totals["loss"] / totals["count"]) == pytest.approx(float(case.arrays["loss0"]), rel=TOLERANCE)


def test_every_gradient_of_the_first_batch(case: Case) -> None:
    model, expected = case.model("init"), case.weights("grad0")
    totals = case.loss(model, case.batch(0), None)
    (totals["loss"] / totals["count"]).backward()
    norm = float(torch.stack([x.norm() for x in expected.values()]).norm())
    for name, x in model.named_parameters():
        bound = 1e-7 * norm if name.endswith(KEY_BIAS) else TOLERANCE * expected[name].norm()
        assert (x.grad - expected[name]).norm() <= bound, name


def test_every_update_and_the_final_weights(case: Case) -> None:
    model = case.model("init")
    rate = schedule.learning_rate(case.config.train)
    state = step.init_state(model, optim.adamw(case.config.train, model))
    for i in range(case.recorded["steps"]):
        batches = {name: x[None] for name, x in case.batch(i).items()}
        state, metrics = step.train_step(case.loss, rate, case.recorded["clip"], state, batches)
        assert float(metrics["loss"] / metrics["count"]) == pytest.approx(case.recorded["loss"][i], rel=TOLERANCE)
        assert float(metrics["grad_norm"]) == pytest.approx(case.recorded["grad_norm"][i], rel=TOLERANCE)
        # The recorded rates include the ramp of a cycle of 1e9 updates: a factor of up to 1 + 1e-9.
        assert float(metrics["rate"]) == pytest.approx(case.recorded["lr"][i], rel=1e-8)

    for name, want in case.weights("final").items():
        atol = case.config.train.learning_rate if name.endswith(KEY_BIAS) else 1e-6
        torch.testing.assert_close(model.state_dict()[name], want, rtol=TOLERANCE, atol=atol, msg=name)


def test_evaluation_with_the_final_weights(case: Case) -> None:
    with torch.no_grad():
        totals = case.loss(case.model("final").eval(), case.batch(-1), None)
    assert float(totals["loss"] / totals["count"]) == pytest.approx(float(case.arrays["eval_loss"]), rel=TOLERANCE)
    if case.task_name != "gpt":  # for which the original counts nothing
        counts = int(case.arrays["eval_total"]), int(case.arrays["eval_correct"])
        assert (int(totals["count"]), int(totals["correct"])) == counts
