"""Attention in plain PyTorch, and the mask that it takes.

Letters as in model.py; S keys.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """Which keys a query cannot attend to, for each of these reasons. None: there is no such reason."""

    is_pad_BS: Tensor | None = None  # keys that are padding
    segments_BT: Tensor | None = None  # documents of keys and queries: other documents are hidden
    is_causal: bool = False  # keys after a query are hidden
    window: int = 0  # farther keys are hidden; 0: at any distance, none is


def hidden(mask: Mask, T: int, device: torch.device) -> Tensor | None:
    """Return which of T keys each of T queries cannot attend to, apart from pads: bool [B or 1, T, T], or None."""
    queries_BT = torch.arange(T, device=device)[None]
    distance_BTS = queries_BT[:, None, :] - queries_BT[:, :, None]  # key position minus query position
    reasons = []
    if mask.is_causal:
        reasons.append(distance_BTS > 0)
    if mask.segments_BT is not None:
        reasons.append(mask.segments_BT[:, :, None] != mask.segments_BT[:, None, :])
    if mask.window:
        reasons.append(abs(distance_BTS) > mask.window)
    return functools.reduce(operator.or_, reasons) if reasons else None


def attend(
    q_BTHK: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    drop: Callable[[Tensor], Tensor] = lambda weights_BHTS: weights_BHTS,
) -> Tensor:
    """Return the attention output [B, T, H, K]: for each of T queries, the weighted mean of S values.

    Keys and values are [B, S, H, K], or have fewer heads. With G heads, key head g serves query heads g H / G to
    (g + 1) H / G - 1. `drop` gets the attention weights [B, H, T, S] and returns those to use.
    """
    H = q_BTHK.shape[2]
    if H != k.shape[2]:
        k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))

    def multiply(subscripts: str, a: Tensor, b: Tensor) -> Tensor:
        product = torch.einsum(subscripts, a, b)
        return product.to(torch.promote_types(product.dtype, torch.float32))

    scores_BHTS = multiply("BTHK,BSHK->BHTS", q_BTHK, k) / q_BTHK.shape[-1] ** 0.5
    # Pads mask keys only: a query at a pad position still attends, and a row of pads stays finite.
    if mask.is_pad_BS is not None:
        scores_BHTS = torch.where(mask.is_pad_BS[:, None, None, :], -1e9, scores_BHTS)
    is_hidden_BTS = hidden(mask, q_BTHK.shape[1], q_BTHK.device)
    if is_hidden_BTS is not None:
        scores_BHTS = torch.where(is_hidden_BTS[:, None], -torch.inf, scores_BHTS)
    return multiply("BHTS,BSHK->BTHK", drop(scores_BHTS.softmax(dim=-1)), v)
