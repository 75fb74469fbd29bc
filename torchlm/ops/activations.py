"""Activation functions of the feed-forward."""

from torch import Tensor, nn


def gelu(x: Tensor, kind: str) -> Tensor:
    """Return x Phi(x), where Phi is the normal distribution function, exact or by tanh. Source: arXiv 1606.08415."""
    return nn.functional.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def activation(x: Tensor, mlp: str, kind: str) -> Tensor:
    """Apply the activation of model.mlp: GELU (exact or tanh, by `kind`), SiLU, or squared ReLU (arXiv 2109.08668)."""
    if mlp == "swiglu":
        return nn.functional.silu(x)
    return nn.functional.relu(x).square() if mlp == "relu2" else gelu(x, kind)
