"""Activations of feed-forwards."""

from torch import Tensor, nn


def gelu(x: Tensor, kind: str) -> Tensor:
    """Return x times the share of a normal distribution below x, exactly or by tanh. Source: arXiv 1606.08415."""
    return nn.functional.gelu(x, approximate="tanh" if kind == "tanh" else "none")


def activation(x: Tensor, mlp: str, kind: str) -> Tensor:
    """Return the nonlinearity of a feed-forward: GELU of a `kind`, SiLU, or squared ReLU (arXiv 2109.08668)."""
    if mlp == "swiglu":
        return nn.functional.silu(x)
    return nn.functional.relu(x).square() if mlp == "relu2" else gelu(x, kind)
