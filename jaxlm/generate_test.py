"""Greedy continuation against a plain loop over the growing prompt."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.generate import continue_greedily
from jaxlm.heads import LanguageModel

B, T, V, N_NEW = 3, 2, 11, 4


def test_continuation_is_that_of_the_growing_prompt() -> None:
    config = ModelConfig(vocab_size=V, d_model=12, n_layers=2, n_heads=3, seq_len=T + N_NEW, dropout=0.0, pad_id=-1)
    model = LanguageModel(config, is_causal=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    kernel = model.head.linear.kernel
    kernel[...] = kernel[...] * 50  # far from ties, and from one token again and again
    prompts = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)

    expected = prompts
    logits = jax.jit(lambda tokens: model(tokens))
    for _ in range(N_NEW):
        expected = np.concatenate([expected, np.argmax(logits(expected)[:, -1], axis=-1)[:, None]], axis=1)

    continued = jax.jit(lambda prompts: continue_greedily(model, prompts, N_NEW))(prompts)
    np.testing.assert_array_equal(continued, expected[:, T:])
    assert len(np.unique(continued)) > 3
    # Prompts of other lengths, with anything behind them, are continued as each would be alone.
    filled = np.concatenate([prompts[:1], prompts[1:] * [1, 0]]).astype(np.int32)
    by_length = jax.jit(lambda prompts, n_B: continue_greedily(model, prompts, N_NEW, n_B))
    mixed = np.asarray(by_length(filled, np.array([2, 1, 1])))
    np.testing.assert_array_equal(mixed[0], continued[0])
    alone = jax.jit(lambda prompts: continue_greedily(model, prompts, N_NEW))(prompts[1:, :1])
    np.testing.assert_array_equal(mixed[1:], alone)
    assert continued.dtype == prompts.dtype
