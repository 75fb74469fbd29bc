"""AdamW with the original's decay groups, and its clipping."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from jaxlm.config import TrainConfig
from torchlm import parallel


def adamw(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with decoupled decay (arXiv 1711.05101, algorithm 2); step.py sets its rate before each update.

    A group has `share` of the rate, where that is not all of it: the original's files have no such key.
    """
    model = parallel.single(model)
    shares = layer_shares(model, config.layer_decay)
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        named = [(name, x) for name, x in model.named_parameters() if x.requires_grad and is_decayed(x) == decays]
        for share, part in itertools.groupby(named, lambda pair: shares[pair[0]]):
            decay = config.weight_decay if decays else 0.0
            group = {"params": [x for _, x in part], "weight_decay": decay}
            groups.append(group if share == 1 else group | {"share": share})
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


def is_decayed(parameter: Tensor) -> bool:
    """Return whether a parameter decays: matrices with more than one row, not biases or norms."""
    return parameter.ndim > 1 and len(parameter) > 1


def layer_shares(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the share of the rate that each parameter has, by name; the head's and final norm's is 1.

    That of the top block is `layer_decay`, that of each below it again so much less, and the embedding's the least
    (BEiT, arXiv 2106.08254, appendix H).
    """
    n_layers = len({name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("base.blocks.")})
    shares = {}
    for name, _ in model.named_parameters():
        depth = 0
        if name.startswith("base.embedding."):
            depth = n_layers + 1
        elif name.startswith("base.blocks."):
            depth = n_layers - int(name.split(".")[2])
        shares[name] = layer_decay**depth
    return shares


def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients, in place, to a global norm of at most `max_norm`; return their norm before that."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)
