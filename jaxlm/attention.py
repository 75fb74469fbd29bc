"""Where a model looks: the weights of one head of attention. For people to see; training has no use for them.

Letters as in model.py; S positions looked at.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.model import Attention, Block, Transformer, rotate


def weights(base: Transformer, tokens_BT: Array, layer: Array, head: Array) -> Array:
    """Return how much each position looks at each, [B, T, S]; rows sum to 1. `layer` and `head` count from 0."""
    is_pad_BT = tokens_BT == base.config.pad_id if base.config.pad_id >= 0 else None

    def run_block(x_BTD: Array, block: Block) -> tuple[Array, Array]:
        seen_BTD = x_BTD if base.config.post_norm else block.layernorm1(x_BTD)
        return block(x_BTD, is_pad_BT, None), _of_head(block.attention, seen_BTD, is_pad_BT, head)

    _, weights_LBTS = jax.lax.scan(run_block, base.embedding(tokens_BT, None), base.blocks)
    return weights_LBTS[layer]


def _of_head(module: Attention, x_BTD: Array, is_pad_BT: Array | None, head: Array) -> Array:
    """Return the weights that Attention.__call__ multiplies the values of a head with, but in float32."""
    B, T, D = x_BTD.shape
    H = module.config.n_heads
    q_BTHK, k_BTHK = (f(x_BTD).reshape(B, T, H, D // H) for f in (module.query, module.key))
    if module.config.positions == "rotary":
        q_BTHK, k_BTHK = rotate(q_BTHK), rotate(k_BTHK)
    scores_BTS = jnp.einsum("BTK,BSK->BTS", q_BTHK[:, :, head], k_BTHK[:, :, head]) / (D // H) ** 0.5
    if is_pad_BT is not None:
        scores_BTS = jnp.where(is_pad_BT[:, None], -1e9, scores_BTS)
    if module.is_causal:
        scores_BTS = jnp.where(np.triu(np.ones((T, T), bool), k=1)[None], -jnp.inf, scores_BTS)
    return jax.nn.softmax(scores_BTS)
