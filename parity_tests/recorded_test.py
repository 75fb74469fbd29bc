"""jaxlm against the recorded original: forward, loss, gradients, and every update up to the final weights."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm import config as configs
from jaxlm import optim, schedule, step
from jaxlm.tasks import TASKS

CASES = Path(__file__).parent / "cases"
# Float32 sums of some hundred products each, in another order: a few rounding errors of 6e-8.
TOLERANCE = 1e-5
LAYERS = {"attention": "self_multihead", "output": "output_linear", "layernorm": "normlayer"}
VARIABLES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
HEADS = {"mlm": "mask_lm", "gpt": "gen_lm", "sst2": "classifier_model", "cola": "classifier_model"}
OUTPUTS = {"mlm": "linear", "gpt": "classifier", "sst2": "classifier", "cola": "classifier"}


class Case:
    """One recorded case, with its arrays in jaxlm's names, layouts and labels."""

    def __init__(self, name: str):
        settings = json.loads((CASES / name / "case.json").read_text())
        self.arrays = dict(np.load(CASES / name / "arrays.npz"))
        self.task_name, self.recorded = settings["task"], settings
        self.n_layers = settings["n_layers"]
        config = configs.build(
            {
                "task": settings["task"],
                "model.vocab_size": settings["vocab_size"],
                "model.d_model": settings["d_model"],
                "model.n_layers": settings["n_layers"],
                "model.n_heads": settings["heads"],
                "model.seq_len": settings["seq_len"],
                "model.dropout": settings["dropout"],
                "model.head_outputs": "vocabulary",
                "train.max_steps": settings["steps"],
                "train.learning_rate": settings["learning_rate"],
                "train.min_learning_rate": settings["min_learning_rate"],
                "train.warmup_steps": settings["warmup_iters"],
                "train.decay_steps": settings["lr_decay_iters"],
                "train.weight_decay": settings["weight_decay"],
            }
        )
        self.config, self.task = config, TASKS[settings["task"]](config)
        self.graphdef, shapes = nnx.split(nnx.eval_shape(lambda: self.task.build_model(nnx.Rngs(0))), nnx.Param)
        self.shapes = nnx.to_pure_dict(shapes)
        self.evaluate = jax.jit(self._evaluate)  # one compile for three tests

    def params(self, kind: str) -> dict:
        """Return the arrays `kind`/NAME as jaxlm's parameters: kernels transposed, blocks stacked."""

        def convert(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
            names = [part.key for part in path]
            if names[1] == "blocks":
                blocks = [self._array(kind, ["encoder_blocks", str(i), *names[2:]]) for i in range(self.n_layers)]
                value = np.stack(blocks)
            elif names[0] == "base":
                value = self._array(kind, names[1:])
            else:
                value = self._array(kind, [OUTPUTS[self.task_name] if name == "linear" else name for name in names])
            assert value.shape == shape.shape, names
            return value

        return jax.tree_util.tree_map_with_path(convert, self.shapes)

    def _array(self, kind: str, names: list[str]) -> np.ndarray:
        prefix = {"head": HEADS[self.task_name]}.get(names[0], "gpt" if self.task_name == "gpt" else "bert")
        body = names[1:] if names[0] == "head" else names
        name = ".".join([prefix, *(LAYERS.get(part, part) for part in body[:-1]), VARIABLES[body[-1]]])
        value = self.arrays[f"{kind}/{name}"]
        return value.T if names[-1] == "kernel" else value

    def batch(self, i: int) -> dict[str, np.ndarray]:
        """Return batch i; in the original, label 0 of a token means: not counted."""
        tokens, labels = self.arrays["x"][i].astype(np.int32), self.arrays["y"][i].astype(np.int32)
        if self.task_name in ("mlm", "gpt"):
            labels = np.where(labels == 0, -1, labels)
        batch = {"tokens": tokens, "labels": labels}
        if self.task_name == "mlm":
            batch["positions"] = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return batch

    def loss(self, params, batch, key):
        """Return the task's totals, with as many classes as the head has outputs."""
        totals = dict(self.task.loss(nnx.merge(self.graphdef, params), batch, key))
        totals.pop("confusion", None)
        return totals

    def _evaluate(self, params, batch) -> tuple:
        """Return the totals and logits of a batch, and the gradients of its mean loss."""

        def mean_loss(params):
            totals = self.loss(params, batch, None)
            logits = nnx.merge(self.graphdef, params)(batch["tokens"])
            return totals["loss"] / totals["count"], (totals, logits)

        grads, (totals, logits) = jax.grad(mean_loss, has_aux=True)(params)
        return totals, logits, grads


@functools.cache
def load(name: str) -> Case:
    return Case(name)


@pytest.fixture(params=["mlm", "gpt", "sst2", "cola"])
def case(request: pytest.FixtureRequest) -> Case:
    return load(request.param)


def test_logits_and_loss_of_the_first_batch(case: Case) -> None:
    totals, logits, _ = case.evaluate(case.params("init"), case.batch(0))
    expected = case.arrays["logits0"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    assert totals["loss"] / totals["count"] == pytest.approx(float(case.arrays["loss0"]), rel=TOLERANCE)


def test_every_gradient_of_the_first_batch(case: Case) -> None:
    _, _, grads = case.evaluate(case.params("init"), case.batch(0))
    expected = case.params("grad0")
    # Nothing but rounding is left of the gradient of a key's bias (see below).
    floor = 1e-6 * float(optax.tree.norm(expected))

    def check(path, grad, want):
        assert np.linalg.norm(grad - want) <= TOLERANCE * np.linalg.norm(want) + floor, path

    jax.tree_util.tree_map_with_path(check, grads, expected)


def test_every_update_and_the_final_weights(case: Case) -> None:
    rate = schedule.learning_rate(case.config.train)
    optimizer = optim.adamw(case.config.train, rate)
    update = jax.jit(functools.partial(step.train_step, case.loss, optimizer, rate, case.recorded["clip"]))
    state = step.init_state(jax.tree.map(jnp.asarray, case.params("init")), optimizer)
    for i in range(case.recorded["steps"]):
        batch = jax.tree.map(lambda x: x[None], case.batch(i))
        state, metrics = update(state, batch, jax.random.key(0))
        assert metrics["loss"] / metrics["count"] == pytest.approx(case.recorded["loss"][i], rel=TOLERANCE)
        assert metrics["grad_norm"] == pytest.approx(case.recorded["grad_norm"][i], rel=TOLERANCE)
        # The recorded rates include the ramp of a cycle of 1e9 updates: a factor of up to 1 + 1e-9.
        assert metrics["rate"] == pytest.approx(case.recorded["lr"][i], rel=1e-6)
    # The longest way that Adam can have moved a weight, about.
    way = sum(case.recorded["lr"])

    def check(path, got, want):
        if [part.key for part in path[-2:]] == ["key", "bias"]:
            # It shifts all scores of a query alike, which the softmax does not see: its gradient is zero but for
            # rounding, and Adam makes whole steps of that, which may point in opposite directions.
            rtol, atol = 0.0, 2 * way
        else:
            # Each update rounds a weight by up to 6e-8 of it, 12 updates by 7e-7. And gradients agree to TOLERANCE
            # of their tensor's norm, so those that are a tenth of that agree to 1e-4, and so do their steps.
            rtol, atol = 1e-6, 1e-4 * way
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, state.params, case.params("final"))


def test_evaluation_with_the_final_weights(case: Case) -> None:
    totals, _, _ = case.evaluate(case.params("final"), case.batch(-1))
    assert totals["loss"] / totals["count"] == pytest.approx(float(case.arrays["eval_loss"]), rel=TOLERANCE)
    if case.task_name != "gpt":  # for which the original counts nothing
        counts = int(case.arrays["eval_total"]), int(case.arrays["eval_correct"])
        assert (int(totals["count"]), int(totals["correct"])) == counts
