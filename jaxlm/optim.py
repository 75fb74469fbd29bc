"""AdamW with the original's decay groups, and its clipping."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlm.config import TrainConfig


def adamw(config: TrainConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return AdamW with decoupled decay (arXiv 1711.05101, algorithm 2); its count of updates drives the rate."""
    return optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=is_decayed,
    )


def is_decayed(params: optax.Params) -> optax.Params:
    """Return which parameters decay: matrices with more than one row as PyTorch stores them, not biases or norms."""

    def decays(path: tuple, value: Array) -> bool:
        # Rank alone cannot tell: parameters of the blocks have a leading axis of layers.
        name = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)][-1]
        rows = {"kernel": -1, "embedding": -2, "position": -2}
        return name in rows and value.shape[rows[name]] > 1

    return jax.tree_util.tree_map_with_path(decays, params)


def clip_by_global_norm(grads: optax.Updates, max_norm: float) -> tuple[optax.Updates, Array]:
    """Return the gradients scaled to a global norm of at most `max_norm`, and their norm before that.

    The 1e-6 is PyTorch's; optax.clip_by_global_norm has none.
    """
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads), norm
