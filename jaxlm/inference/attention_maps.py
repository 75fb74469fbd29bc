"""Attention weights of one head, for display. Letters as in model.py; S are the attended positions."""

import functools

from jax import Array

from jaxlm.model import Block, Places, Transformer
from jaxlm.ops.plain_attention import attend
from jaxlm.ops.stacks import scan_blocks


def weights(base: Transformer, tokens_BT: Array, layer: Array, head: Array, types_BT: Array | None = None) -> Array:
    """Return the attention weights [B, T, S] of one head; they sum to 1 over S. `layer` and `head` count from 0.

    `types_BT` are the token types, 0 by default.
    """
    places = Places(tokens_BT == base.config.pad_id if base.config.pad_id >= 0 else None)

    def run_block(x_BTD: Array, block: Block, layer: int) -> tuple[Array, Array]:
        seen: list[Array] = []

        def keep(weights_BHTS: Array) -> Array:
            seen.append(weights_BHTS[:, head])
            return weights_BHTS

        return block(x_BTD, places, layer, None, functools.partial(attend, drop=keep)), seen[0]

    config, x_BTD = base.config, base.embedding(tokens_BT, None, None, types_BT)
    _, weights_LBTS = scan_blocks(config, run_block, x_BTD, base.blocks, 0, config.n_layers)
    return weights_LBTS[layer]
