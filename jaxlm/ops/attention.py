"""Attention by the fastest implementation for a model and a device; all compute the same as plain_attention.py."""

from jax import Array

from jaxlm.config import ModelConfig
from jaxlm.ops import flash_attention, local_attention, plain_attention
from jaxlm.ops.dropout import dropout
from jaxlm.ops.plain_attention import Mask


def attend(
    q_BTHK: Array, k_BTGK: Array, v_BTGK: Array, mask: Mask, config: ModelConfig, dropout_key: Array | None
) -> Array:
    """Return the attention output [B, T, H, K]; with a key, attention weights are dropped out."""
    T, is_packed = q_BTHK.shape[1], mask.segments_BT is not None
    if not flash_attention.hindrance(config, q_BTHK.dtype, T, is_packed, mask.window, mask.is_causal):
        return flash_attention.attend(q_BTHK, k_BTGK, v_BTGK, mask)
    if local_attention.fits(mask, T) and (dropout_key is None or config.dropout == 0):
        return local_attention.attend(q_BTHK, k_BTGK, v_BTGK, mask)
    return plain_attention.attend(
        *(q_BTHK, k_BTGK, v_BTGK, mask), lambda weights_BHTT: dropout(weights_BHTT, config.dropout, dropout_key)
    )
