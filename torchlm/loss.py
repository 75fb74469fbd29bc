"""The loss: cross-entropy."""

import torch
from torch import Tensor, nn

# Sums over samples or tokens: "loss" and "count", and what a task adds, such as "correct". Quotients are taken last.
Totals = dict[str, Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Totals:
    """Return the summed cross-entropy, the number of labels, and how often the largest logit is the label.

    logits [..., V], labels [...]; a negative label counts nothing.
    """
    is_counted = labels >= 0
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = torch.where(is_counted, labels, -1).flatten()
    return {
        "loss": nn.functional.cross_entropy(logits.flatten(0, -2), ignored, ignore_index=-1, reduction="sum"),
        "count": is_counted.sum(),
        "correct": (is_counted & (logits.argmax(dim=-1) == labels)).sum(),
    }
