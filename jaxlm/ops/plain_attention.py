"""Attention in plain JAX: the reference for all other implementations, and the mask that all of them take.

Letters as in model.py; S keys.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.ops import matmul


class Mask(NamedTuple):
    """Which keys a query cannot attend to, for each of these reasons. None: there is no such reason."""

    is_pad_BS: Array | None = None  # keys that are padding
    segments_BT: Array | None = None  # documents of keys and queries: other documents are hidden
    is_causal: bool = False  # keys after a query are hidden
    queries_BT: Array | None = None  # positions of the queries; None: 0 to T - 1
    window: int = 0  # farther keys are hidden; 0: at any distance, none is


Attend = Callable[[Array, Array, Array, Mask], Array]  # (queries, keys, values, mask) -> output [B, T, H, K]


def hidden(mask: Mask, T: int, S: int) -> Any:
    """Return which of S keys each of T queries cannot attend to, apart from pads: bool [B or 1, T, S], or None."""
    queries_BT: Any = np.arange(T)[None] if mask.queries_BT is None else mask.queries_BT
    distance_BTS = np.arange(S)[None, None] - queries_BT[:, :, None]  # key position minus query position
    reasons = []
    if mask.is_causal:
        reasons.append(distance_BTS > 0)
    if mask.segments_BT is not None:
        reasons.append(mask.segments_BT[:, :, None] != mask.segments_BT[:, None, :])
    if mask.window:
        reasons.append(abs(distance_BTS) > mask.window)
    return functools.reduce(operator.or_, reasons) if reasons else None


def attend(
    q_BTHK: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Callable[[Array], Array] = lambda weights_BHTS: weights_BHTS,
    axes: str = "BSHK",
) -> Array:
    """Return the attention output [B, T, H, K]: for each of T queries, the weighted mean of S values.

    Keys and values have the given axes, and H or fewer heads. With G heads, key head g serves query heads g H / G to
    (g + 1) H / G - 1. `drop` gets the attention weights [B, H, T, S] and returns those to use.
    """
    H, head_axis = q_BTHK.shape[2], axes.index("H")
    if H != k.shape[head_axis]:
        k, v = (jnp.repeat(x, H // x.shape[head_axis], head_axis) for x in (k, v))

    def multiply(subscripts: str, a: Array, b: Array) -> Array:
        return matmul.einsum(subscripts, a.astype(q_BTHK.dtype), b, b.dtype)

    scores_BHTS = multiply(f"BTHK,{axes}->BHTS", q_BTHK, k) / q_BTHK.shape[-1] ** 0.5
    # Pads mask keys only: a query at a pad position still attends, and a row of pads stays finite.
    if mask.is_pad_BS is not None:
        scores_BHTS = jnp.where(mask.is_pad_BS[:, None, None, :], -1e9, scores_BHTS)
    is_hidden_BTS = hidden(mask, *scores_BHTS.shape[2:])
    if is_hidden_BTS is not None:
        scores_BHTS = jnp.where(is_hidden_BTS[:, None], -jnp.inf, scores_BHTS)
    return multiply(f"BHTS,{axes}->BTHK", drop(jax.nn.softmax(scores_BHTS)), v)
