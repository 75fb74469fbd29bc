"""The update: accumulation, clipping, dropout keys, precision, donation. The loss: uniform logits, masked positions."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlm import config as configs
from jaxlm import loop, optim, parallel, step
from jaxlm.config import TrainConfig
from jaxlm.tasks import TASKS

B, T, D, M, V = 2, 6, 12, 3, 11


def settings(task: str, **changes: Any) -> configs.Config:
    sizes = {"vocab_size": V, "d_model": D, "n_layers": 1, "n_heads": 3, "seq_len": T, "dropout": 0.0}
    values = {"task": task, "train.batch_size": B, "train.max_steps": 10, "train.warmup_steps": 2}
    return configs.build(values | {f"model.{name}": value for name, value in sizes.items()} | changes)


def parts(task: str, **changes: Any) -> tuple[Any, dict]:
    """Return loss(params, batch, key) of a tiny model of a task, and its parameters."""
    this = TASKS[task](settings(task, **changes))
    graphdef, params = nnx.split(this.build_model(nnx.Rngs(0)), nnx.Param)
    return lambda params, batch, key: this.loss(nnx.merge(graphdef, params), batch, key), nnx.to_pure_dict(params)


def batches(n: int) -> dict[str, np.ndarray]:
    """Return n batches for mlm, [n, B, ...]; they count 1, 2, 3, ... labels."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, V, (n, B, T)).astype(np.int32)
    positions = np.argsort(random.random((n, B, T)), axis=-1)[..., :M].astype(np.int32)
    labels = random.integers(0, V, (n, B * M)).astype(np.int32)
    for i in range(n):
        labels[i, i + 1 :] = -1
    return {"tokens": tokens, "positions": positions, "labels": labels.reshape(n, B, M)}


def only(i: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return accumulated batches; only batch i has labels that count."""
    is_other = np.arange(len(batch["labels"])) != i
    return batch | {"labels": np.where(is_other[:, None, None], -1, batch["labels"])}


def flat(tree: Any) -> np.ndarray:
    """Return all numbers of a tree in a row, in float64."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the norm of a - b over the norm of b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def plain() -> tuple[Any, dict]:
    """An update with rate 1 and no moments, so that it subtracts the clipped gradients; and parameters."""
    loss, params = parts("mlm")
    optimizer = optax.sgd(1.0)

    @jax.jit
    def update(clip_norm: float, params: dict, batch: dict) -> tuple[dict, dict]:
        state = step.init_state(params, optimizer)
        key = jax.random.key(0)
        state, metrics = step.train_step(
            step.Rule(optimizer, lambda i: jnp.array(1.0), clip_norm), loss, state, batch, key
        )
        return state.params, metrics

    return update, params


def test_accumulated_batches_are_one_large_batch(plain: tuple) -> None:
    update, params = plain
    many = batches(3)
    assert [int(np.sum(labels >= 0)) for labels in many["labels"]] == [1, 2, 3]
    one = {name: x.reshape(1, 3 * B, *x.shape[2:]) for name, x in many.items()}
    (params_many, metrics_many), (params_one, metrics_one) = (update(1e6, params, batch) for batch in (many, one))
    assert metrics_many["count"] == metrics_one["count"] == 6
    assert metrics_many["correct"] == metrics_one["correct"]
    for name in ("loss", "grad_norm"):
        assert metrics_many[name] == pytest.approx(float(metrics_one[name]), rel=1e-6)
    start, updated_many, updated_one = (flat(tree) for tree in (params, params_many, params_one))
    assert distance(updated_many - start, updated_one - start) < 1e-5
    assert distance(updated_many, updated_one) < 1e-6

    # The mean of the means is another number, which the tolerance would tell.
    alone = [update(1e6, params, only(i, many))[1] for i in range(3)]
    assert sum(totals["loss"] for totals in alone) == pytest.approx(float(metrics_one["loss"]), rel=1e-6)
    mean_of_means = sum(totals["loss"] / totals["count"] for totals in alone) / 3
    assert abs(mean_of_means / (metrics_one["loss"] / 6) - 1) > 1e-3


def test_clipping_scales_the_update_and_reports_the_norm_before_it(plain: tuple) -> None:
    update, params = plain
    batch = batches(3)
    free, metrics = update(1e6, params, batch)
    norm = float(metrics["grad_norm"])
    clipped, clipped_metrics = update(norm / 4, params, batch)
    assert clipped_metrics["grad_norm"] == metrics["grad_norm"]
    step_free, step_clipped = (flat(updated) - flat(params) for updated in (free, clipped))
    assert np.linalg.norm(step_free) == pytest.approx(norm, rel=1e-5)
    assert distance(4 * step_clipped, step_free) < 1e-5


def test_a_batch_that_counts_nothing_changes_nothing(plain: tuple) -> None:
    update, params = plain
    batch = batches(3)
    updated, metrics = update(1.0, params, batch | {"labels": np.full_like(batch["labels"], -1)})
    assert (metrics["count"], metrics["loss"], metrics["grad_norm"]) == (0, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, updated, params)


def test_loss_at_masked_positions_is_that_of_all_positions_with_the_others_ignored() -> None:
    loss, params = parts("mlm")
    batch = {name: x[4] for name, x in batches(5).items()}
    labels = np.full((B, T), -1, np.int32)
    np.put_along_axis(labels, batch["positions"], batch["labels"], axis=1)
    every = {"tokens": batch["tokens"], "positions": np.tile(np.arange(T), (B, 1)), "labels": labels}

    @jax.jit
    def totals_and_gradients(params: dict, batch: dict) -> tuple[dict, dict]:
        return loss(params, batch, None), jax.grad(lambda params: loss(params, batch, None)["loss"])(params)

    (totals, gradients), (expected, expected_gradients) = (totals_and_gradients(params, b) for b in (batch, every))
    assert totals["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert (totals["count"], totals["correct"]) == (expected["count"], expected["correct"]) and totals["count"] == 5
    assert distance(flat(gradients), flat(expected_gradients)) < 1e-5


@pytest.mark.parametrize(("task", "n_outputs"), [("mlm", V), ("gpt", V), ("sst2", 2)])
def test_loss_at_uniform_logits_is_the_log_of_their_number(task: str, n_outputs: int) -> None:
    loss, params = parts(task, **{"model.pad_id": -1})
    params["head"] = jax.tree.map(np.zeros_like, params["head"])
    batch = {name: x[0] for name, x in batches(1).items()}
    if task == "gpt":
        batch["labels"] = batch["tokens"]
    if task == "sst2":
        batch = {"tokens": batch["tokens"], "labels": np.array([1, 0])}
    totals = jax.jit(loss)(params, batch, None)
    assert totals["count"] == {"mlm": 1, "gpt": B * T, "sst2": B}[task]
    assert totals["loss"] / totals["count"] == pytest.approx(math.log(n_outputs), rel=1e-6)


# Dropout keys: a loss that is the random number its key gives


def test_each_step_and_each_accumulated_batch_has_a_key_of_its_own() -> None:
    def loss(params: Any, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        random = jax.random.uniform(key)
        return {"loss": random + 0 * params["w"], "square": random**2, "count": batch.sum()}

    optimizer = optax.sgd(0.0)
    rule = step.Rule(optimizer, lambda i: jnp.array(0.0), 1.0)
    run = jax.jit(lambda state, key: step.train_step(rule, loss, state, np.ones((2, 1)), key))
    start = step.init_state({"w": jnp.ones(())}, optimizer)
    state, first = run(start, jax.random.key(0))
    _, second = run(state, jax.random.key(0))
    _, again = run(start, jax.random.key(0))
    _, other_seed = run(start, jax.random.key(1))
    # Of two equal numbers, the square of the sum is twice the sum of the squares.
    assert first["loss"] ** 2 < 1.99 * first["square"]
    assert first["loss"] == again["loss"]
    assert len({float(metrics["loss"]) for metrics in (first, second, other_seed)}) == 3


# What the loop compiles


@pytest.fixture(scope="module")
def trained() -> tuple[list, Any, Any]:
    """The states of three updates in bfloat16, their metrics, and what made them."""
    config = settings("mlm", **{"train.precision": "bfloat16"})
    fresh, compiled = loop.build(config, TASKS["mlm"](config), parallel.make_mesh(config))
    state = fresh()
    states, metrics = [state], []
    for i in range(3):
        batch = {name: x[i : i + 1] for name, x in batches(3).items()}
        batch = parallel.put_batch(compiled.mesh, batch, axis=1)
        state, totals = compiled.update(states[-1], batch, jax.random.key(0))
        states.append(state)
        metrics.append(totals)
    return states, metrics, compiled


def test_old_states_are_donated_and_the_update_is_compiled_once(trained: tuple) -> None:
    states, metrics, compiled = trained
    assert [totals["count"] for totals in metrics] == [1, 2, 3]
    for state, is_old in zip(states, (True, True, True, False), strict=True):
        assert all(x.is_deleted() == is_old for x in jax.tree.leaves(state))
    assert int(states[-1].step) == 3
    assert compiled.update._cache_size() == 1


def test_bfloat16_keeps_weights_moments_and_sums_in_float32(trained: tuple, plain: tuple) -> None:
    states, metrics, _ = trained
    types = {x.dtype for x in jax.tree.leaves((states[-1], metrics))}
    assert types == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    update, params = plain
    _, exact = update(1e6, params, only(0, batches(3)))
    for name in ("loss", "grad_norm"):  # inputs of products are rounded by up to 4e-3
        assert 1e-6 < abs(float(metrics[0][name]) / float(exact[name]) - 1) < 0.02


# Updates that are no numbers


GOOD = {"x": np.ones((1, 4), np.float32), "root": np.ones((1, 4), np.float32)}


# A batch with a loss of NaN, and one with a finite loss whose gradient is NaN, by a square root of 0.
@pytest.mark.parametrize("bad", [{"x": np.full((1, 4), np.nan, np.float32)}, {"root": np.zeros((1, 4), np.float32)}])
def test_an_update_that_is_no_number_changes_nothing_but_the_count(bad: dict[str, np.ndarray]) -> None:
    def loss(params: Any, batch: Any, key: Any) -> dict[str, jax.Array]:
        values = (params["w"] - batch["x"]) ** 2 + jnp.sqrt(batch["root"] * params["w"])
        return {"loss": values.sum(), "count": jnp.array(4.0)}

    def rate(i: Any) -> Any:
        return 0.1 / (1 + i)

    @jax.jit
    def update(state: step.TrainState, batch: Any) -> tuple[step.TrainState, Any]:
        key = jax.random.key(0)
        return step.train_step(step.Rule(optimizer, rate, 1.0, skips_nonfinite=True), loss, state, batch, key)

    optimizer = optim.make_optimizer(TrainConfig(weight_decay=0.1), rate, 1)
    state, _ = update(step.init_state({"w": jnp.arange(1.0, 5.0)}, optimizer), GOOD)
    after, metrics = update(state, GOOD | bad)
    assert np.isfinite(metrics["loss"]) == ("root" in bad) and not np.isfinite(metrics["grad_norm"])
    # The next one has the rate of its number, and is otherwise as if this one had not been.
    counted = dataclasses.replace(state, step=state.step + 1, opt_state=optim.at_step(state.opt_state, state.step + 1))
    jax.tree.map(np.testing.assert_array_equal, after, counted)
    (one, metrics), (other, _) = (update(x, GOOD) for x in (after, counted))
    assert metrics["rate"] == pytest.approx(0.1 / 3)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert not np.array_equal(one.params["w"], state.params["w"])
