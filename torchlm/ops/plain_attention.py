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
    """What hides keys from queries. None: nothing of the kind does."""

    is_pad_BS: Tensor | None = None  # the keys that are pads
    segments_BT: Tensor | None = None  # of keys and queries: those of other documents are hidden
    is_causal: bool = False  # keys after a query are hidden
    window: int = 0  # keys that are farther away from a query are hidden; 0: none


def hidden(mask: Mask, T: int, device: torch.device) -> Tensor | None:
    """Return which keys are hidden from each of T queries for another reason than being pads, [B or 1, T, T]."""
    queries_BT = torch.arange(T, device=device)[None]
    distance_BTS = queries_BT[:, None, :] - queries_BT[:, :, None]  # of each key from each query
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
    """Return what each of T positions takes from S values, [B, T, H, K].

    Keys and values are [B, S, H, K], or of fewer heads: key head g is of the H / G queries from g H / G on. `drop` gets
    the weights [B, H, T, S], and may change them.
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
