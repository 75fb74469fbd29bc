"""The weights that are shown are those that the model multiplies its values with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import config as configs
from jaxlm.inference import attention_maps
from jaxlm.model import Places, Transformer
from jaxlm.ops.stacks import block_of


@pytest.mark.parametrize(
    ("is_causal", "settings"),
    [
        (False, {"pad_id": 0, "positions": "rotary"}),
        (True, {"pad_id": -1, "positions": "learned", "post_norm": True}),
        (
            False,
            {"pad_id": 0, "positions": "rotary", "window": 2, "global_every": 2, "n_kv_heads": 1, "first_norm": False},
        ),
    ],
)
def test_the_weights_are_the_models(is_causal: bool, settings: dict) -> None:
    sizes = {"d_model": 12, "n_heads": 3, "n_layers": 2, "seq_len": 7, "vocab_size": 11, **settings}
    config = configs.build({"task": "mlm", **{f"model.{name}": value for name, value in sizes.items()}}).model
    base = jax.jit(lambda: Transformer(config, is_causal, jnp.float32, nnx.Rngs(0)))()
    base = jax.tree.map(lambda x: 2 * x, base)  # for weights that are not all alike
    tokens_BT = jnp.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 0, 0, 0]])

    @jax.jit
    def both(base: Transformer) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
        of_head = jax.vmap(lambda layer, head: attention_maps.weights(base, tokens_BT, layer, head), (None, 0))
        weights_LHBTS = jax.vmap(of_head, (0, None))(jnp.arange(2), jnp.arange(3))
        places = Places(tokens_BT == 0 if config.pad_id == 0 else None)
        x_BTD = base.embedding(tokens_BT, None)
        found = []
        for layer in range(2):
            block = block_of(config, base.blocks, layer)
            has_norm = not config.post_norm and (config.first_norm or layer > 0)
            seen_BTD = block.layernorm1(x_BTD) if has_norm else x_BTD
            value_BTGK = block.attention.value(seen_BTD).reshape(2, 7, -1, 4)
            value_BTHK = jnp.repeat(value_BTGK, 3 // value_BTGK.shape[2], 2)
            by_head_BTHK = jnp.einsum("HBTS,BSHK->BTHK", weights_LHBTS[layer], value_BTHK)
            output_BTD = block.attention.output(by_head_BTHK.reshape(2, 7, 12))
            found.append((output_BTD, block.attention(seen_BTD, places, layer, [None, None])))
            x_BTD = block(x_BTD, places, layer, None)
        return weights_LHBTS, found

    weights_LHBTS, found = both(base)
    for by_weights_BTD, by_model_BTD in found:
        np.testing.assert_allclose(by_weights_BTD, by_model_BTD, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weights_LHBTS.sum(axis=-1), 1, rtol=1e-5)
    assert weights_LHBTS.max() > 2 / 7 and bool(np.all(np.triu(weights_LHBTS, 1) == 0)) == is_causal
