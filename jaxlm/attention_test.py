"""The weights that are shown are those that the model multiplies its values with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import attention
from jaxlm import config as configs
from jaxlm.model import Transformer


@pytest.mark.parametrize(
    ("is_causal", "settings"),
    [
        (False, {"pad_id": 0, "positions": "rotary"}),
        (True, {"pad_id": -1, "positions": "learned", "post_norm": True}),
    ],
)
def test_the_weights_are_the_models(is_causal: bool, settings: dict) -> None:
    sizes = {"d_model": 12, "n_heads": 3, "n_layers": 2, "seq_len": 7, "vocab_size": 11, **settings}
    config = configs.build({"task": "mlm", **{f"model.{name}": value for name, value in sizes.items()}}).model
    base = Transformer(config, is_causal, jnp.float32, nnx.Rngs(0))
    base = jax.tree.map(lambda x: 2 * x, base)  # for weights that are not all alike
    tokens_BT = jnp.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 0, 0, 0]])

    @jax.jit
    def both(base: Transformer) -> list[tuple[jax.Array, jax.Array]]:
        is_pad_BT = tokens_BT == 0 if config.pad_id == 0 else None
        x_BTD = base.embedding(tokens_BT, None)
        found = []
        for layer in range(2):
            block = jax.tree.map(lambda x, layer=layer: x[layer], base.blocks)
            seen_BTD = x_BTD if config.post_norm else block.layernorm1(x_BTD)
            value_BTHK = block.attention.value(seen_BTD).reshape(2, 7, 3, 4)
            by_head = [attention.weights(base, tokens_BT, layer, head) @ value_BTHK[:, :, head] for head in range(3)]
            output_BTD = block.attention.output(jnp.concatenate(by_head, axis=-1))
            found.append((output_BTD, block.attention(seen_BTD, is_pad_BT, None)))
            x_BTD = block(x_BTD, is_pad_BT, None)
        return found

    for by_weights_BTD, by_model_BTD in both(base):
        np.testing.assert_allclose(by_weights_BTD, by_model_BTD, rtol=1e-4, atol=1e-4)
    weights_BTS = np.asarray(jax.jit(attention.weights)(base, tokens_BT, 1, 2))
    np.testing.assert_allclose(weights_BTS.sum(axis=2), 1, rtol=1e-5)
    assert weights_BTS.max() > 2 / 7 and bool(np.all(np.triu(weights_BTS, 1) == 0)) == is_causal
