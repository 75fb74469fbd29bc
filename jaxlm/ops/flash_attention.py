"""Attention in one kernel that keeps no scores: cuDNN's on NVIDIA GPUs, JAX's Splash Attention on TPUs.

Letters as in model.py.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jaxlm.config import ModelConfig
from jaxlm.ops.plain_attention import Mask
from jaxlm.ops.token_positions import document_positions
from jaxlm.parallel import BATCH, platform

TILE = 128  # the TPU kernel takes multiples of so many positions


def hindrance(
    config: ModelConfig, dtype: Any, seq_len: int, is_packed: bool = False, window: int = 0, is_causal: bool = False
) -> str:
    """Return why attention cannot be fused on this platform; "" if it can. `is_packed`: rows have several documents."""
    if config.attention == "plain":
        return "it is to be plain"
    where = platform()
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # of AMD's GPUs: gfx90a
    if where == "cpu" or (where == "gpu" and not re.match(r"([89]|\d\d)\.\d", capability)):
        return "it needs a TPU, or an NVIDIA GPU of compute capability 8.0"
    if dtype != jnp.bfloat16:
        return "it needs train.precision=bfloat16"
    if config.dropout:
        return "it has no dropout on attention weights; set model.dropout=0"
    if where == "gpu" and is_packed:
        return "cuDNN's attends across the documents of packed rows; set data.pack=none"
    if where == "gpu" and window and not is_causal:
        return "cuDNN's has no window to the right"
    size, has_pads = config.head_size, is_causal and config.pad_id >= 0
    if where == "gpu" and has_pads and size == 128:
        return "cuDNN's has no room to hide pads beside heads of 128 dimensions; set model.pad_id=-1 if there are none"
    if where == "gpu" and (size % 8 or size > 128):
        return f"heads of {size} dimensions are none of 8, 16, ... 128"
    return f"{seq_len} positions are no multiple of {TILE}" if where == "tpu" and seq_len % TILE else ""


def attend(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, mask: Mask) -> Array:
    """Return the values [B, T, H, K] that each position attends to, of bfloat16 arrays."""
    if platform() == "tpu":
        return splash(q_BTHK, k_BTHK, v_BTHK, mask)
    return by_xla(q_BTHK, k_BTHK, v_BTHK, mask, "cudnn")


def by_xla(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, mask: Mask, implementation: Any) -> Array:
    assert mask.segments_BT is None, "hindrance() says so"
    lengths_B, is_pad_BT, K = None, mask.is_pad_BS, q_BTHK.shape[3]
    if is_pad_BT is not None and mask.is_causal:
        # A further dimension gives pads their score, since cuDNN would compute a gradient of a mask.
        score_BT = jnp.where(is_pad_BT, -1e9 * K**0.5, 0)[:, :, None, None].astype(k_BTHK.dtype)
        k_BTHK = jnp.where(is_pad_BT[:, :, None, None], 0, k_BTHK)
        k_BTHK = _wider(k_BTHK).at[..., K : K + 1].set(score_BT)
        q_BTHK, v_BTHK = _wider(q_BTHK).at[..., K].set(1), _wider(v_BTHK)
    elif is_pad_BT is not None:
        # As lengths: pads are at the ends of rows. A pad among tokens is attended to, and so is the first of a row of
        # pads, which no loss counts.
        ends_T = np.arange(1, is_pad_BT.shape[1] + 1, dtype=np.int32)
        lengths_B = jnp.max(jnp.where(is_pad_BT, 1, ends_T[None]), axis=1)
    x_BTHK = jax.nn.dot_product_attention(
        q_BTHK,
        k_BTHK,
        v_BTHK,
        scale=K**-0.5,
        key_value_seq_lengths=lengths_B,
        is_causal=mask.is_causal,
        local_window_size=(mask.window, 0) if mask.window else None,
        implementation=implementation,
    )
    return x_BTHK[..., :K]


def _wider(x_BTHK: Array) -> Array:
    return jnp.pad(x_BTHK, ((0, 0), (0, 0), (0, 0), (0, 8)))  # cuDNN takes multiples of 8


def sees_pads_alone(mask: Mask) -> Array:
    """Return which queries see no token, [B, T]."""
    assert mask.is_pad_BS is not None
    at_BT = jnp.broadcast_to(jnp.arange(mask.is_pad_BS.shape[1]), mask.is_pad_BS.shape)
    n_left = n_right = mask.window or at_BT.shape[1]  # how many positions a query sees before and after it, at most
    n_right = 0 if mask.is_causal else n_right
    first_BT, last_BT = jnp.maximum(at_BT - n_left, 0), jnp.minimum(at_BT + n_right, at_BT.shape[1] - 1)
    if mask.segments_BT is not None:
        first_BT = jnp.maximum(first_BT, at_BT - document_positions(mask.segments_BT))
        last_BT = jnp.minimum(last_BT, at_BT + document_positions(mask.segments_BT[:, ::-1])[:, ::-1])
    n_tokens = jnp.cumsum(jnp.pad(~mask.is_pad_BS, ((0, 0), (1, 0))), axis=1)  # before each position
    return jnp.take_along_axis(n_tokens, first_BT, 1) == jnp.take_along_axis(n_tokens, last_BT + 1, 1)


def splash(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array, mask: Mask, interpreted: bool = False) -> Array:
    """Attend by Pallas; `interpreted` runs the kernel where there is no TPU."""
    # Not at the top: importing it takes half a second.
    from jax.experimental.pallas.ops.tpu import splash_attention

    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    block = next(size for size in (512, 256, TILE) if T % size == 0)
    blocks = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    mask_TT: Any = (splash_attention.CausalMask if mask.is_causal else splash_attention.FullMask)((T, T))
    if mask.window:
        mask_TT = splash_attention.LocalMask((T, T), (mask.window, 0 if mask.is_causal else mask.window), 0)

    def on_device(*arrays: Array) -> Array:
        q_BHTK, k_BHTK, v_BHTK = (x.transpose(0, 2, 1, 3) for x in arrays[:3])
        masks = splash_attention.MultiHeadMask([mask_TT] * q_BHTK.shape[1])
        kernel = splash_attention.make_splash_mha(
            masks, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpreted
        )
        segments = [splash_attention.SegmentIds(*arrays[3:])] if arrays[3:] else []
        return jax.vmap(kernel)(q_BHTK, k_BHTK, v_BHTK, *segments).transpose(0, 2, 1, 3)

    arrays = [q_BTHK * K**-0.5, k_BTHK, v_BTHK]
    if mask.is_pad_BS is not None or mask.segments_BT is not None:
        # A query attends to keys of its segment. The pads of a segment are one of their own: of keys, and of queries
        # that see no token, to whom all pads are alike.
        segments_BT = jnp.zeros(q_BTHK.shape[:2], jnp.int32) if mask.segments_BT is None else mask.segments_BT
        of_queries_BT = of_keys_BT = segments_BT
        if mask.is_pad_BS is not None:
            is_blind_BT = sees_pads_alone(mask)
            of_queries_BT = jnp.where(is_blind_BT, -1 - segments_BT, segments_BT)
            of_keys_BT = jnp.where(mask.is_pad_BS, -1 - segments_BT, segments_BT)
            arrays[0] = jnp.where(is_blind_BT[:, :, None, None], 0, arrays[0])
        arrays += [of_queries_BT, of_keys_BT]
    if jax.sharding.get_abstract_mesh().empty:
        return on_device(*arrays)
    # XLA cannot partition a kernel: each device runs it on its own samples and heads.
    of_heads, of_rows = PartitionSpec(BATCH, None, "tensor"), PartitionSpec(BATCH)
    specs = (of_heads, of_heads, of_heads, of_rows, of_rows)[: len(arrays)]
    return jax.shard_map(on_device, in_specs=specs, out_specs=of_heads, check_vma=False)(*arrays)
