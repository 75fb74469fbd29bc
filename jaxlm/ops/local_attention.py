"""Attention within a window, in blocks: time and memory grow with T, not with T^2. In plain JAX, so on any device.

Letters as in model.py; W window, N blocks of W positions, S positions of a block and its neighbours.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.ops import matmul
from jaxlm.ops.plain_attention import Mask

HIDDEN = -1e30  # a score so low that its weight is 0, also beside pads, whose score is -1e9; a row of it has no NaN


def fits(mask: Mask, seq_len: int) -> bool:
    """Return whether blocks take less than all pairs of positions."""
    return 0 < mask.window and 3 * mask.window < seq_len


def attend(q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, mask: Mask) -> Array:
    """Return what plain attention does without dropout, [B, T, H, K], for a mask with a window."""
    (B, T, H, K), G, W = q_BTHK.shape, k_BTGK.shape[2], mask.window
    N, n_near = -(-T // W), 2 if mask.is_causal else 3  # the block before, the own one, and the one after

    def blocks(x: Array) -> Array:
        """Return [B, T, ...] as [B, N, W, ...], with zeros after the end."""
        x = jnp.pad(x, ((0, 0), (0, N * W - T), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(B, N, W, *x.shape[2:])

    def near(x: Array) -> Array:
        """Return for each block what is near it, [B, N, S, ...]."""
        x = blocks(x)
        x = jnp.pad(x, ((0, 0), (1, n_near - 2), *[(0, 0)] * (x.ndim - 2)))
        return jnp.concatenate([x[:, i : i + N] for i in range(n_near)], axis=2)

    q_BNWGRK = blocks(q_BTHK).reshape(B, N, W, G, H // G, K)
    k_BNSGK, v_BNSGK = near(k_BTGK), near(v_BTGK)
    scores = matmul.einsum("BNWGRK,BNSGK->BNGRWS", q_BNWGRK, k_BNSGK, k_BTGK.dtype) / K**0.5
    if mask.is_pad_BS is not None:
        scores = jnp.where(near(mask.is_pad_BS)[:, :, None, None, None], -1e9, scores)
    distance_WS = np.arange(-W, (n_near - 1) * W)[None] - np.arange(W)[:, None]  # of the key from the query
    place_NS = np.arange(N)[:, None] * W + np.arange(-W, (n_near - 1) * W)[None]
    is_hidden = (abs(distance_WS) > W) | (distance_WS > 0) & mask.is_causal
    is_hidden = is_hidden[None, None] | ((place_NS < 0) | (place_NS >= T))[None, :, None]
    if mask.segments_BT is not None:
        is_hidden = is_hidden | (blocks(mask.segments_BT)[..., None] != near(mask.segments_BT)[:, :, None])
    scores = jnp.where(is_hidden[:, :, None, None], HIDDEN, scores)
    x = matmul.einsum("BNGRWS,BNSGK->BNWGRK", jax.nn.softmax(scores), v_BNSGK, v_BTGK.dtype)
    return x.reshape(B, N * W, H, K)[:, :T]
