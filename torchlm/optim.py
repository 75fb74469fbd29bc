"""AdamW with the original's decay groups, Muon for matrices of blocks, and the original's clipping."""

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from jaxlm.config import TrainConfig
from jaxlm.params import muon
from torchlm import parallel


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with decoupled decay (arXiv 1711.05101, algorithm 2), or Muon; step.py sets its rate before updates.

    A group has `share` of the rate, where that is not all of it, and `is_hidden` where Muon updates it: the original's
    files have no such keys.
    """
    model = parallel.single(model)
    shares = rate_shares(model, config)
    groups: list[dict[str, Any]] = []
    for decays in (True, False):
        named = [(name, x) for name, x in model.named_parameters() if x.requires_grad and is_decayed(x) == decays]
        for (share, is_hidden), part in itertools.groupby(
            named, lambda pair: (shares[pair[0]], muon.updates(config, pair[0]))
        ):
            decay = config.weight_decay if decays else 0.0
            group = {"params": [x for _, x in part], "weight_decay": decay}
            group |= {"is_hidden": True} if is_hidden else {}
            groups.append(group if share == 1 else group | {"share": share})
    kind = functools.partial(Muon, config) if config.optimizer == "muon" else torch.optim.AdamW
    return kind(
        groups,
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


class Muon(torch.optim.AdamW):
    """Muon's update of the groups with `is_hidden`, and AdamW's of all others.

    A matrix has the state of AdamW without `exp_avg_sq`. Not torch.optim.Muon: that knows neither Polar Express nor
    another precision than bfloat16, and would be a second optimizer beside AdamW.
    """

    def __init__(self, config: TrainConfig, groups: list[dict[str, Any]], **options: Any):
        super().__init__(groups, **options)
        self.config = config

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make an update, which uses up the gradients of the matrices."""
        dtype, beta = torch.bfloat16 if self.config.precision == "bfloat16" else None, self.config.muon_momentum
        for group in self.param_groups:
            for x in group["params"] if "is_hidden" in group else ():
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(x))
                state["step"] += 1
                momentum = state["exp_avg"].mul_(beta).add_((1 - beta) * x.grad)
                ahead = (1 - beta) * x.grad + beta * momentum
                update = orthogonal(ahead, self.config.muon_coefficients, dtype)
                update = muon.scale(self.config.muon_scale, x.shape[1], x.shape[0]) * update
                x.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                x.grad = None  # so that AdamW leaves it alone
        super().step()


def orthogonal(x: Tensor, coefficients: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a matrix [n_out, n_in] with its singular values brought near 1; matmuls are in `dtype`, or in x's.

    Five iterations of an odd polynomial of the fifth order, as params/muon.py has them.
    """
    is_tall, like = x.shape[0] > x.shape[1], x.dtype
    x = x.T if is_tall else x
    x = (x / (x.norm() * muon.MARGIN[coefficients]).clamp(min=muon.EPSILON)).to(dtype or like)
    for a, b, c in muon.COEFFICIENTS[coefficients]:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # with one rounding each
    return (x.T if is_tall else x).to(like)


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


def rate_shares(model: nn.Module, config: TrainConfig) -> dict[str, float]:
    """Return the share of the rate that each parameter has, by its layer, and by Muon's rate."""
    shares = layer_shares(model, config.layer_decay)
    return {name: share * (config.muon_rate if muon.updates(config, name) else 1) for name, share in shares.items()}


def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients, in place, to a global norm of at most `max_norm`; return their norm before that."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)
