"""Rotary positions of queries and keys, and positions that start at 0 in each document of a row.

Letters as in model.py; the tables are in position_tables.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def rotate(x_BTHK: Array, frequency_K: np.ndarray, positions_BT: Array | None = None, seq_len: int = 0) -> Array:
    """Rotate each pair of columns (k, k + K/2) by position * frequency radians (RoFormer, arXiv 2104.09864, eq. 34).

    Positions are 0 to T - 1, or `positions_BT`, each below `seq_len`.
    """
    T = x_BTHK.shape[1]
    angle_TK = np.arange(seq_len or T)[:, None] * frequency_K
    cos, sin = (f(angle_TK).astype(np.float32)[None, :, None, :] for f in (np.cos, np.sin))
    if positions_BT is not None:
        cos, sin = (jnp.asarray(x[0])[positions_BT] for x in (cos, sin))  # type: ignore[assignment]
    first, second = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def document_positions(segments_BT: Array) -> Array:
    """Return the index of each position in its document, int [B, T]."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32), segments_BT.shape)
    is_first_BT = segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index_BT - jax.lax.cummax(jnp.where(is_first_BT, index_BT, 0), axis=1)
