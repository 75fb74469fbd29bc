"""Greedy continuation of prompts, for the samples shown in training."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.heads import LanguageModel


def continue_greedily(model: LanguageModel, prompt_BT: Array, n_new: int, n_B: Array | None = None) -> Array:
    """Return [B, n_new] token ids that continue the prompts greedily.

    `n_B` is the length of each prompt, by default T; tokens behind it are overwritten. One compiled loop over a buffer
    of fixed length; each step runs the whole buffer, so keep n_new small.
    """
    B, T = prompt_BT.shape
    n_B = jnp.full(B, T) if n_B is None else n_B
    tokens_BT = jnp.pad(prompt_BT, ((0, 0), (0, n_new)))

    def step(i: Array, tokens_BT: Array) -> Array:
        logits_BMV = model(tokens_BT, positions_BM=(n_B + i - 1)[:, None])
        new_B = jnp.argmax(logits_BMV[:, 0], axis=-1).astype(tokens_BT.dtype)
        return tokens_BT.at[jnp.arange(B), n_B + i].set(new_B)

    tokens_BT = jax.lax.fori_loop(0, n_new, step, tokens_BT)
    return jnp.take_along_axis(tokens_BT, n_B[:, None] + jnp.arange(n_new)[None], axis=1)
