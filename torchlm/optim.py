"""AdamW with the original's decay groups, and its clipping."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from jaxlm.config import TrainConfig


def adamw(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with decoupled decay (arXiv 1711.05101, algorithm 2); step.py sets its rate before each update."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [x for x in parameters if is_decayed(x)], "weight_decay": config.weight_decay},
            {"params": [x for x in parameters if not is_decayed(x)], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


def is_decayed(parameter: Tensor) -> bool:
    """Return whether a parameter decays: matrices with more than one row, not biases or norms."""
    return parameter.ndim > 1 and len(parameter) > 1


def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients, in place, to a global norm of at most `max_norm`; return their norm before that."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)
