"""Where a model looks: the weights of one head of attention. For people to see; training has no use for them.

Letters as in model.py; S positions looked at.
"""

import functools

import jax
from jax import Array

from jaxlm.model import Block, Transformer, attend, future


def weights(base: Transformer, tokens_BT: Array, layer: Array, head: Array) -> Array:
    """Return how much each position looks at each, [B, T, S]; rows sum to 1. `layer` and `head` count from 0."""
    is_pad_BT = tokens_BT == base.config.pad_id if base.config.pad_id >= 0 else None
    is_future = future(tokens_BT.shape[1]) if base.blocks.attention.is_causal else None

    def run_block(x_BTD: Array, block: Block) -> tuple[Array, Array]:
        seen: list[Array] = []

        def keep(weights_BHTS: Array) -> Array:
            seen.append(weights_BHTS[:, head])
            return weights_BHTS

        attend_to = functools.partial(attend, is_pad_BS=is_pad_BT, is_future_BTS=is_future, drop=keep)
        return block(x_BTD, is_pad_BT, None, None, attend_to), seen[0]

    _, weights_LBTS = jax.lax.scan(run_block, base.embedding(tokens_BT, None), base.blocks)
    return weights_LBTS[layer]
