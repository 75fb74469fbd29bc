"""Fused attention against the plain one. cuDNN's runs where there is a GPU; a TPU's kernel is only interpreted."""

import functools
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from jaxlm import model as models
from jaxlm.config import ModelConfig
from jaxlm.ops import flash_attention

T = 128
LENGTHS = np.array([T, 60, 1])


@functools.cache
def outputs(
    by: str,
    is_causal: bool,
    dtype: str = "float32",
    is_packed: bool = False,
    settings: tuple = (),
    has_gaps: bool = True,
) -> tuple[Array, Any]:
    """Return what a layer of attention makes of random input, and the gradients of it and of the layer.

    Rows are one document each, or, if they are packed, several. With `has_gaps`, there are pads before tokens and among
    them, not only after them.
    """
    config = ModelConfig(**{"d_model": 32, "n_heads": 2, "vocab_size": 9, "dropout": 0.0} | dict(settings))
    layer = models.Attention(config, is_causal, jnp.dtype(dtype), nnx.Rngs(0))
    x_BTD = jax.random.normal(jax.random.key(1), (3, T, 32))
    is_pad_BT = np.arange(T)[None] >= LENGTHS[:, None]
    segments_BT = np.where(is_pad_BT, 0, 1 + np.searchsorted([5, 40, 100], np.arange(T), side="right"))
    if has_gaps:
        is_pad_BT = is_pad_BT | (np.arange(T)[None] % 9 == 4) | (np.arange(T)[None] < [[0], [20], [0]])
    weights_BTD = jax.random.normal(jax.random.key(2), x_BTD.shape)
    places = models.Places(jnp.asarray(is_pad_BT), jnp.asarray(segments_BT) if is_packed else None)

    def loss(layer: models.Attention, x_BTD: Array) -> tuple[Array, Array]:
        out_BTD = layer(x_BTD, places, 0, [None, None])
        return jnp.sum(out_BTD * weights_BTD), out_BTD

    attend = {
        "splash": functools.partial(flash_attention.splash, interpreted=True),
        "XLA": functools.partial(flash_attention.by_xla, implementation="xla"),
        "cuDNN": functools.partial(flash_attention.by_xla, implementation="cudnn"),
    }.get(by)
    with (
        mock.patch.object(flash_attention, "hindrance", lambda *args: "" if attend else "plain"),
        mock.patch.object(flash_attention, "attend", attend),
    ):
        grads, out_BTD = jax.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))(layer, x_BTD)
    return out_BTD, grads


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("by", ["splash", "XLA"])
def test_fused_attention_and_its_gradients_are_those_of_the_plain_one(by: str, is_causal: bool) -> None:
    has_gaps = by == "splash" or is_causal  # cuDNN's, which XLA's stands for, knows lengths alone if it is not causal
    assert_same(*(outputs(x, is_causal, has_gaps=has_gaps) for x in ("plain", by)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_fused_attention_keeps_to_the_documents_of_packed_rows(is_causal: bool) -> None:
    expected, found = (outputs(by, is_causal, is_packed=True) for by in ("plain", "splash"))
    assert_same(expected, found)
    assert not np.allclose(expected[0], outputs("plain", is_causal)[0], atol=1e-2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("by", ["splash", "XLA"])
def test_fused_attention_keeps_to_windows_and_groups_of_heads(by: str, is_causal: bool) -> None:
    if by == "XLA" and not is_causal:
        pytest.skip("cuDNN's, which it stands for, has no window to the right")
    settings = (("n_heads", 4), ("n_kv_heads", 2), ("window", 7))
    assert_same(*(outputs(x, is_causal, settings=settings) for x in ("plain", by)))
    if by == "splash":
        assert_same(*(outputs(x, is_causal, is_packed=True, settings=settings) for x in ("plain", by)))


def assert_same(expected_and_grads: tuple[Array, Any], found_and_grads: tuple[Array, Any]) -> None:
    (expected, expected_grads), (found, grads) = expected_and_grads, found_and_grads
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected_grads))
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=5e-6 * scale)  # of sums over 384 positions, in another order


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_of_cudnn_is_off_by_no_more_than_the_plain_one_in_bfloat16(is_causal: bool) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs a GPU")
    expected, plain, found = (
        jax.tree.leaves(outputs(args[0], is_causal, args[1], has_gaps=is_causal))
        for args in (("plain", "float32"), ("plain", "bfloat16"), ("cuDNN", "bfloat16"))
    )
    for x, y, z in zip(found, plain, expected, strict=True):
        assert jnp.linalg.norm(x - z) <= 1.5 * jnp.linalg.norm(y - z) + 1e-3 * jnp.linalg.norm(z)


def test_what_keeps_attention_from_being_fused_is_told() -> None:
    def why(
        platform: str = "gpu",
        dtype: Any = jnp.bfloat16,
        capability: str = "9.0",
        seq_len: int = 64,
        is_packed: bool = False,
        is_causal: bool = False,
        **settings: Any,
    ) -> str:
        device = SimpleNamespace(compute_capability=capability)
        with (
            mock.patch.object(jax, "devices", lambda: [device]),
            mock.patch.object(flash_attention, "platform", lambda: platform),
        ):
            values: dict[str, Any] = {"d_model": 64, "n_heads": 4, "dropout": 0.0} | settings
            config = ModelConfig(**values)
            return flash_attention.hindrance(config, dtype, seq_len, is_packed, config.window, is_causal)

    assert why() == why(attention="fused") == why("tpu", seq_len=256) == why("tpu", seq_len=128, n_heads=16) == ""
    assert why(attention="plain") == "it is to be plain"
    assert "NVIDIA GPU" in why("cpu") and "NVIDIA GPU" in why(capability="7.5")
    assert "NVIDIA GPU" in why(capability="gfx90a") and why(capability="10.0") == why(capability="8.6") == ""
    assert "model.pad_id=-1" in why(head_dim=128, is_causal=True)
    assert why(head_dim=128) == why(head_dim=128, is_causal=True, pad_id=-1) == why(head_dim=120, is_causal=True) == ""
    assert "train.precision" in why(dtype=jnp.float32)
    assert "model.dropout=0" in why(dropout=0.1)
    assert "heads of 256" in why(d_model=1024) and "heads of 4" in why(n_heads=16)
    assert "no window to the right" in why(window=3) and why(window=3, is_causal=True) == ""
    assert why("tpu", seq_len=128, window=3) == why(head_dim=32) == "" and "heads of 36" in why(head_dim=36)
    assert "data.pack=none" in why(is_packed=True) and why("tpu", seq_len=128, is_packed=True) == ""
    assert why("tpu", seq_len=200) == "200 positions are no multiple of 128"
