"""The loss: cross-entropy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Sums over samples or tokens: "loss", "count", and those that a task adds, such as "correct". Division comes last.
Totals = dict[str, Tensor]


def cross_entropy(
    logits: Tensor, labels: Tensor, z_loss: float = 0.0, smoothing: float = 0.0, weights: Sequence[float] = ()
) -> Totals:
    """Return the summed cross-entropy in nats, the number of labels, and how often the largest logit is the label's.

    logits [..., V], labels [...]; negative labels are ignored. `z_loss` is the weight of a term that keeps logits
    small: the squared logarithm of the softmax's denominator (PaLM, arXiv 2204.02311, section 5). `smoothing` gives
    all V a share of each label (arXiv 1512.00567, section 7); `weights` [V] are those of the terms of the classes.
    """
    is_counted = labels >= 0
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = torch.where(is_counted, labels, -1).flatten()
    weights_V = logits.new_tensor(weights) if weights else None
    loss = nn.functional.cross_entropy(
        logits.flatten(0, -2), ignored, weights_V, ignore_index=-1, reduction="sum", label_smoothing=smoothing
    )
    if z_loss:
        loss = loss + z_loss * torch.where(is_counted, logits.logsumexp(dim=-1).square(), 0).sum()
    return {
        "loss": loss,
        "count": is_counted.sum(),
        "correct": (is_counted & (logits.argmax(dim=-1) == labels)).sum(),
    }
