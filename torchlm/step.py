"""One optimizer update, made in place on the training state. Read model.py and loss.py first."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from torchlm import optim, parallel
from torchlm.loss import Totals

# loss(model, batch, key) -> Totals; gradients are of totals["loss"] / totals["count"]. The key is None: see model.py.
LossFn = Callable[[Any, Any, None], Totals]


@dataclasses.dataclass
class TrainState:
    """All that training changes. Dropout seeds are derived from `step`, so a restored state continues identically."""

    step: int  # updates made so far
    model: nn.Module
    optimizer: torch.optim.Optimizer


def init_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Return the state before the first update."""
    return TrainState(0, model, optimizer)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is the same in every update of a run, apart from the loss."""

    schedule: Callable[[int], float]
    clip_norm: float
    skips_nonfinite: bool = False  # if the loss or gradient norm is NaN or infinite, change only the step count


def train_step(
    rule: Rule, loss_fn: LossFn, state: TrainState, batches: dict[str, Tensor], key: Hashable = None
) -> tuple[TrainState, Totals]:
    """Make one update from `batches`, arrays [A, B, ...] of A microbatches.

    The loss is the mean over the labels of all A microbatches, as if they were one batch. Returns the state, changed
    in place, and the totals with the learning rate of this update (`rate`) and the gradient norm before clipping
    (`grad_norm`). `key` seeds dropout.
    """
    state.model.train()
    if key is not None:
        torch.manual_seed(hash((key, state.step)))
    n_batches = len(next(iter(batches.values())))
    totals: Totals = {}
    for i in range(n_batches):
        with parallel.gradients_exchanged(state.model, is_last=i == n_batches - 1):
            batch_totals = loss_fn(state.model, {name: x[i] for name, x in batches.items()}, None)
            # DDP averages gradients over processes; this makes it a sum.
            (batch_totals["loss"] * parallel.n_processes()).backward()
        totals = {name: totals.get(name, 0) + x.detach() for name, x in batch_totals.items()}
    totals = parallel.sum_over_processes(totals)

    for grad in (x.grad for x in state.model.parameters() if x.grad is not None):
        grad.div_(totals["count"].clamp(min=1))
    grad_norm = optim.clip_by_global_norm(state.model.parameters(), rule.clip_norm)
    rate = rule.schedule(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
    if not rule.skips_nonfinite or torch.isfinite(totals["loss"]) & torch.isfinite(grad_norm):
        state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    return state, {**totals, "rate": torch.tensor(rate, dtype=torch.float64), "grad_norm": grad_norm}
