"""Continue a prompt with the likeliest tokens."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.heads import LanguageModel


def continue_greedily(model: LanguageModel, prompt_BT: Array, n_new: int) -> Array:
    """Return [B, n_new] token ids that continue the prompts, each the likeliest after what comes before.

    One compiled loop over a buffer of fixed length; each step runs the whole buffer, so keep n_new small.
    """
    B, T = prompt_BT.shape
    tokens_BT = jnp.pad(prompt_BT, ((0, 0), (0, n_new)))

    def step(i: Array, tokens_BT: Array) -> Array:
        logits_BMV = model(tokens_BT, positions_BM=jnp.full((B, 1), i - 1))
        return tokens_BT.at[:, i].set(jnp.argmax(logits_BMV[:, 0], axis=-1).astype(tokens_BT.dtype))

    return jax.lax.fori_loop(T, T + n_new, step, tokens_BT)[:, T:]
