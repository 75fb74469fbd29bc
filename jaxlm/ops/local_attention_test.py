"""Attention in blocks of its window against the plain one, with gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import local_attention
from jaxlm.ops.plain_attention import Mask, attend

B, H, G, K = 2, 4, 2, 3


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("T", "window"), [(10, 3), (12, 4), (13, 1), (17, 5), (7, 6)])
@pytest.mark.parametrize("masks", ["none", "pads", "documents"])
def test_blocks_give_what_all_pairs_give(T: int, window: int, masks: str, is_causal: bool) -> None:
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(B, T, heads, K)).astype(np.float32) for heads in (H, G, G)]
    weights = random.normal(size=(B, T, H, K))
    mask = Mask(is_causal=is_causal, window=window)
    if masks == "pads":  # at the end, in between, and whole rows of them
        mask = mask._replace(is_pad_BS=jnp.asarray(np.arange(T)[None] % 5 >= np.array([[3], [0]])))
    if masks == "documents":
        mask = mask._replace(segments_BT=jnp.asarray(np.sort(random.integers(0, 3, (B, T)))))

    def both(function: Any) -> tuple[jax.Array, Any]:
        def loss(arrays: list[Any]) -> tuple[jax.Array, jax.Array]:
            out_BTHK = function(*arrays, mask)
            return jnp.sum(out_BTHK * weights), out_BTHK

        grads, out_BTHK = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        return out_BTHK, grads

    for found, expected in zip(
        jax.tree.leaves(both(local_attention.attend)), jax.tree.leaves(both(attend)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_time_and_memory_grow_with_the_positions_alone() -> None:
    def flops(T: int) -> float:
        q, k = (jax.ShapeDtypeStruct((1, T, heads, K), jnp.float32) for heads in (H, G))
        attend_in_blocks = jax.jit(lambda q, k, v: local_attention.attend(q, k, v, Mask(window=8)))
        return attend_in_blocks.lower(q, k, k).cost_analysis()["flops"]

    assert flops(2048) == pytest.approx(8 * flops(256), rel=0.01)
    assert local_attention.fits(Mask(window=8), 25) and not local_attention.fits(Mask(window=8), 24)
    assert not local_attention.fits(Mask(), 24)
