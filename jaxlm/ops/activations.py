"""Activations of feed-forwards."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.ops import matmul


def gelu(x: Array, kind: str) -> Array:
    """Return x times the share of a normal distribution below x, exactly or by tanh. Source: arXiv 1606.08415.

    The exact one by erf, as PyTorch does it: jax.nn.gelu takes erfc, which is three times as slow on a CPU.
    """
    return matmul.elementwise(jax.nn.gelu if kind == "tanh" else _gelu, x)


def _gelu(x: Array) -> Array:
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


def activation(x: Array, mlp: str, kind: str) -> Array:
    """Return the nonlinearity of a feed-forward: GELU of a `kind`, SiLU, or squared ReLU (arXiv 2109.08668)."""
    if mlp == "swiglu":
        return matmul.elementwise(jax.nn.silu, x)
    return matmul.elementwise(_relu2, x) if mlp == "relu2" else gelu(x, kind)


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))
