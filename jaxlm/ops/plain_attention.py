"""Attention in plain JAX, the reference that all other implementations equal, and the mask that all of them take.

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
    """What hides keys from queries. None: nothing of the kind does."""

    is_pad_BS: Array | None = None  # the keys that are pads
    segments_BT: Array | None = None  # of keys and queries: those of other documents are hidden
    is_causal: bool = False  # keys after a query are hidden
    queries_BT: Array | None = None  # where the queries are among the keys; None: they are 0 to T - 1
    window: int = 0  # keys that are farther away from a query are hidden; 0: none


Attend = Callable[[Array, Array, Array, Mask], Array]  # queries, keys, values [B, T, H, K] -> what each position takes


def hidden(mask: Mask, T: int, S: int) -> Any:
    """Return which of S keys are hidden from each of T queries for another reason than being pads, [B or 1, T, S]."""
    queries_BT: Any = np.arange(T)[None] if mask.queries_BT is None else mask.queries_BT
    distance_BTS = np.arange(S)[None, None] - queries_BT[:, :, None]  # of each key from each query
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
    """Return what each of T positions takes from S values, [B, T, H, K]: the plain attention, which all others equal.

    Keys and values have the given axes, and H or fewer heads: key head g is of the H / G queries from g H / G on.
    `drop` gets the weights [B, H, T, S], and may change them.
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
