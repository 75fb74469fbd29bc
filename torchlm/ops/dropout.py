"""Dropout."""

import torch
from torch import Tensor


def dropout(x: Tensor, rate: float, is_training: bool) -> Tensor:
    """Zero a share `rate` of the elements and scale up the rest; outside training, return `x`."""
    return torch.nn.functional.dropout(x, rate, is_training)
