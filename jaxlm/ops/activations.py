"""Activation functions of the feed-forward."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.ops import matmul


def gelu(x: Array, kind: str) -> Array:
    """Return x Phi(x), where Phi is the normal distribution function, exact or by tanh. Source: arXiv 1606.08415.

    The exact one uses erf, as PyTorch does: the erfc of jax.nn.gelu is three times as slow on a CPU.
    """
    return matmul.elementwise(jax.nn.gelu if kind == "tanh" else _gelu, x)


def _gelu(x: Array) -> Array:
    return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


def activation(x: Array, mlp: str, kind: str) -> Array:
    """Apply the activation of model.mlp: GELU (exact or tanh, by `kind`), SiLU, or squared ReLU (arXiv 2109.08668)."""
    if mlp == "swiglu":
        return matmul.elementwise(jax.nn.silu, x)
    return matmul.elementwise(_relu2, x) if mlp == "relu2" else gelu(x, kind)


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))
