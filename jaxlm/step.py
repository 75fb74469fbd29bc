"""One optimizer update, as a pure function of the training state. Read model.py and loss.py first."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlm import optim
from jaxlm.config import ModelConfig
from jaxlm.loss import Totals
from jaxlm.params import frozen

# loss(params, batch, key) -> Totals; gradients are of totals["loss"] / totals["count"].
LossFn = Callable[[Any, Any, Array | None], Totals]
_ALL_TRAINED = ModelConfig()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes. Dropout keys are derived from `step`, so a restored state continues identically."""

    step: Array  # updates made so far, int32
    params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation, model: ModelConfig = _ALL_TRAINED) -> TrainState:
    """Return the state before the first update; parameters that `model` freezes have no moments."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(frozen.trained(model, params)))


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is the same in every update of a run, apart from the loss."""

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    clip_norm: float
    skips_nonfinite: bool = False  # if the loss or gradient norm is NaN or infinite, change only the step count
    model: ModelConfig = _ALL_TRAINED  # says which parameters are frozen


def train_step(rule: Rule, loss_fn: LossFn, state: TrainState, batches: Any, key: Array) -> tuple[TrainState, Totals]:
    """Make one update from `batches`, arrays [A, B, ...] of A microbatches.

    The loss is the mean over the labels of all A microbatches, as if they were one batch. Returns the new state, and
    the totals with the learning rate of this update (`rate`) and the gradient norm before clipping (`grad_norm`).
    """

    def loss(trained: Any, batch: Any, key: Array) -> tuple[Array, Totals]:
        totals = loss_fn(frozen.with_trained(state.params, trained), batch, key)
        return totals["loss"], totals

    def accumulate(sums: Any, batch_and_key: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, grad(trained, *batch_and_key)), None

    trained = frozen.trained(rule.model, state.params)
    grad = jax.grad(loss, has_aux=True)
    n_batches = jax.tree.leaves(batches)[0].shape[0]
    keys = jax.random.split(jax.random.fold_in(key, state.step), n_batches)
    first, rest = (jax.tree.map(lambda x, i=i: x[i], (batches, keys)) for i in (0, slice(1, None)))
    sums = grad(trained, *first)
    if n_batches > 1:
        sums, _ = jax.lax.scan(accumulate, sums, rest)
    grads, totals = sums

    with jax.named_scope("optimizer"):
        scale = 1 / jnp.maximum(totals["count"], 1)  # XLA fuses a multiplication into every use, but not a division
        grads = jax.tree.map(lambda x: x * scale.astype(x.dtype), grads)
        grads, grad_norm = optim.clip_by_global_norm(grads, rule.clip_norm)
        updates, opt_state = rule.optimizer.update(grads, state.opt_state, trained)
        params = frozen.with_trained(state.params, optax.apply_updates(trained, updates))
    if rule.skips_nonfinite:
        is_finite = jnp.isfinite(totals["loss"]) & jnp.isfinite(grad_norm)
        new, old = (params, opt_state), (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda x, before: jnp.where(is_finite, x, before), new, old)
        opt_state = optim.at_step(opt_state, state.step + 1)
    metrics = {**totals, "rate": rule.schedule(state.step), "grad_norm": grad_norm}
    return TrainState(state.step + 1, params, opt_state), metrics
