"""Faults of an update: AdamW, clipping, and the mean over accumulated batches."""

from collections.abc import Iterable
from typing import Any

import jax
import optax
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from parity_tests.faults.planting import Function, both, edit, instead, mirrored
from parity_tests.faults.targets import adamw, clip, is_decayed, pytorch_adamw_step, scale_by_adam, train_step

ADAMW, FLOAT64 = "AdamW of NumPy and PyTorch", "gpt in float64"
CLIP = "_norm = _clip(state.model.parameters(), rule.clip_norm)"
JAX_COUNT, JAX_N_BATCHES = "jnp.maximum(_totals['count'], 1)", "len(jax.tree.leaves(batches)[0])"
TORCH_COUNT, TORCH_N_BATCHES = "_totals['count'].clamp(min=1)", "len(next(iter(batches.values())))"
AVERAGE = "for _grad in _grads: _grad.div_(_count)"


def adamw_step(is_inside: bool = False, is_corrected: bool = True, is_swapped: bool = False) -> Function:
    """Return a step of PyTorch's AdamW with a mistake: epsilon inside the root, no bias correction, moments swapped."""

    @torch.no_grad()
    def step(self: torch.optim.AdamW) -> None:
        for group in self.param_groups:
            (beta1, beta2), epsilon, rate = group["betas"], group["eps"], group["lr"]
            for x in group["params"]:
                state = self.state[x]
                first, second = (state.get(name, torch.zeros_like(x)) for name in _MOMENTS[:: -1 if is_swapped else 1])
                n = int(state.get("step", 0)) + 1
                first, second = beta1 * first + (1 - beta1) * x.grad, beta2 * second + (1 - beta2) * x.grad**2
                size = second / (1 - beta2**n) if is_corrected else second
                root = (size + epsilon).sqrt() if is_inside else size.sqrt() + epsilon
                x.mul_(1 - rate * group["weight_decay"])
                x.sub_(rate * (first / (1 - beta1**n) if is_corrected else first) / root)
                state.update(
                    zip(_MOMENTS[:: -1 if is_swapped else 1], (first, second), strict=True), step=torch.tensor(float(n))
                )

    return step


_MOMENTS = ("exp_avg", "exp_avg_sq")


def clipped_one_by_one(parameters: Iterable[torch.Tensor], max_norm: float) -> Any:
    """Clip each gradient by its own norm; return the norm of all."""
    parameters = list(parameters)
    norm = clip_grad_norm_(parameters, torch.inf)
    for x in parameters:
        clip_grad_norm_(x, max_norm)
    return norm


def clipped_by_value(parameters: Iterable[torch.Tensor], max_norm: float) -> Any:
    """Clip each element of the gradients; return the norm of all."""
    parameters = list(parameters)
    norm = clip_grad_norm_(parameters, torch.inf)
    clip_grad_value_(parameters, max_norm)
    return norm


FAULTS = [
    # AdamW
    *both(
        "decay on all: weight decay on biases and norms",
        ADAMW,
        instead(is_decayed.jaxlm, lambda params: jax.tree.map(lambda x: True, params)),
        instead(is_decayed.torchlm, lambda parameter: True),
    ),
    *both(
        "decay by rank: stacked biases have two axes, and decay",
        ADAMW,
        instead(is_decayed.jaxlm, lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        None,
    ),
    *both(
        "decay coupled: Adam with L2, not AdamW",
        ADAMW,
        edit(adamw.jaxlm, ("optax.chain(_adam, _decay, *_rest)", "optax.chain(_decay, _adam, *_rest)")),
        edit(adamw.torchlm, ("torch.optim.AdamW", "torch.optim.Adam")),
    ),
    *mirrored("no decay: weight decay is ignored", ADAMW, adamw, ("config.weight_decay", "0.0")),
    *both(
        "epsilon inside the root: sqrt(v + epsilon), not sqrt(v) + epsilon",
        ADAMW,
        edit(scale_by_adam, ("jnp.sqrt(_v) + epsilon", "jnp.sqrt(_v + epsilon)")),
        instead(pytorch_adamw_step, adamw_step(is_inside=True)),
    ),
    *both(
        "no bias correction: moments are not divided by 1 - beta^t",
        ADAMW,
        edit(scale_by_adam, ("_correction if _beta else 1.0", "1.0")),
        instead(pytorch_adamw_step, adamw_step(is_corrected=False)),
    ),
    *both(
        "moments swapped: first and second moment are stored in each other's place",
        ADAMW,
        edit(scale_by_adam, ("optax.ScaleByAdamState(_n, _m, _v)", "optax.ScaleByAdamState(_n, _v, _m)")),
        None,
    ),
    *both(
        "moments swapped: first and second moment have each other's names",
        "replay of cola",
        None,
        instead(pytorch_adamw_step, adamw_step(is_swapped=True)),
    ),
    *mirrored("beta2 of 0.99: another beta2", ADAMW, adamw, ("config.beta2", "0.99")),
    *mirrored("epsilon of Adam: epsilon 1e-6, not 1e-8", ADAMW, adamw, ("config.epsilon", "1e-6")),
    # Clipping
    *both(
        "clipping per tensor: each gradient is clipped by its own norm",
        ADAMW,
        edit(clip.jaxlm, ("_grad * _scale", "_grad * jnp.minimum(1.0, max_norm / (optax.tree.norm(_grad) + 1e-6))")),
        instead(clip.torchlm, clipped_one_by_one),
    ),
    *both(
        "clipping by value: each element is clipped",
        ADAMW,
        edit(clip.jaxlm, ("_grad * _scale", "jnp.clip(_grad, -max_norm, max_norm)")),
        instead(clip.torchlm, clipped_by_value),
    ),
    *both(
        "no clipping: the norm is only reported",
        ADAMW,
        instead(clip.jaxlm, lambda grads, max_norm: (grads, optax.tree.norm(grads))),
        instead(clip.torchlm, lambda parameters, max_norm: clip_grad_norm_(parameters, torch.inf)),
    ),
    *both(
        "norm after clipping: the norm that is reported is at most the bound",
        FLOAT64,
        edit(clip.jaxlm, ("return _clipped, _norm", "return _clipped, jnp.minimum(_norm, max_norm)")),
        edit(clip.torchlm, ("return _norm", "return _norm.clamp(max=max_norm)")),
    ),
    *both(
        "clipping after the update: what is clipped is not the gradient that is used",
        ADAMW,
        edit(
            train_step.jaxlm,
            ("_grads, _norm = _clip(_grads, rule.clip_norm)", "_norm = _clip(_grads, rule.clip_norm)[1]"),
            (
                "_updates, _state = rule.optimizer.update(*_args)",
                "_updates, _state = rule.optimizer.update(*_args); _updates = _clip(_updates, rule.clip_norm)[0]",
            ),
        ),
        edit(train_step.torchlm, (CLIP, "pass"), ("state.optimizer.step()", f"state.optimizer.step(); {CLIP}")),
    ),
    *both(
        "clipping before averaging: sums of gradients are clipped, then divided",
        FLOAT64,
        edit(
            train_step.jaxlm,
            (
                "_grads = jax.tree.map(_average, _grads); _grads, _norm = _clip(_grads, rule.clip_norm)",
                "_grads, _norm = _clip(_grads, rule.clip_norm); _grads = jax.tree.map(_average, _grads)",
            ),
        ),
        edit(train_step.torchlm, (f"{AVERAGE}\n{CLIP}", f"{CLIP}\n{AVERAGE}")),
    ),
    # Accumulated batches
    *both(
        "gradients of the sum: the loss is not divided by what it counts",
        FLOAT64,
        edit(train_step.jaxlm, ("_x * _share.astype(_x.dtype)", "_x")),
        edit(train_step.torchlm, ("_grad.div_(_count)", "_grad")),
    ),
    *both(
        "accumulation of means: accumulated batches weigh alike, whatever they count",
        FLOAT64,
        edit(
            train_step.jaxlm,
            ("return _batch['loss'], _batch", "return _batch['loss'] / _batch['count'], _batch"),
            (JAX_COUNT, f"jnp.asarray({JAX_N_BATCHES})"),
        ),
        edit(
            train_step.torchlm,
            ("_batch['loss'] * _n_processes", "_batch['loss'] / _batch['count']"),
            (TORCH_COUNT, TORCH_N_BATCHES),
        ),
    ),
    *both(
        "accumulation divided twice: by the count, and by the number of batches",
        FLOAT64,
        edit(train_step.jaxlm, (JAX_COUNT, f"{JAX_N_BATCHES} * _totals['count']")),
        edit(train_step.torchlm, (TORCH_COUNT, f"{TORCH_N_BATCHES} * _totals['count']")),
    ),
    *both(
        "last batch only: an accumulated batch replaces those before it",
        FLOAT64,
        edit(train_step.jaxlm, ("jax.tree.map(jnp.add, _sums, _batch)", "_batch")),
        edit(train_step.torchlm, ("_batch = loss_fn(*_args)", "state.optimizer.zero_grad(); _batch = loss_fn(*_args)")),
    ),
    *both(
        "gradients kept: gradients are not reset after an update",
        ADAMW,
        None,
        edit(train_step.torchlm, ("state.optimizer.zero_grad()", "pass")),
    ),
    *both(
        "rate of the next update: the optimizer is a step ahead of the schedule",
        ADAMW,
        edit(
            adamw.jaxlm, ("optax.scale_by_learning_rate(rate)", "optax.scale_by_learning_rate(lambda i: rate(i + 1))")
        ),
        edit(train_step.torchlm, ("rule.schedule(state.step)", "rule.schedule(state.step + 1)")),
    ),
]
