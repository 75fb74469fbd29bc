"""The loss: cross-entropy."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.ops import matmul

# Sums over samples or tokens: "loss", "count", and those that a task adds, such as "correct". Division comes last.
Totals = dict[str, Array]


@jax.named_scope("output layer")
def cross_entropy(
    logits: Array, labels: Array, z_loss: float = 0.0, smoothing: float = 0.0, weights: Sequence[float] = ()
) -> Totals:
    """Return the summed cross-entropy in nats, the number of labels, and how often the largest logit is the label's.

    logits [..., V], labels [...]; negative labels are ignored. `z_loss` is the weight of a term that keeps logits
    small: the squared logarithm of the softmax's denominator (PaLM, arXiv 2204.02311, section 5). `smoothing` gives
    all V a share of each label (arXiv 1512.00567, section 7); `weights` [V] are those of the terms of the classes.
    """
    is_counted = labels >= 0
    labels = jnp.maximum(labels, 0)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    indices = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    # A masked sum, because the derivative of indexing is a scatter, which is slow.
    label_logits = jnp.sum(jnp.where(indices == labels[..., None], logits, 0), axis=-1)
    # Subtracting the label's logit from a logsumexp would round a small loss as coarsely as the logits.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    log_sums = jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    losses = log_sums + (largest - label_logits)
    if smoothing or weights:
        weights_V = jnp.array(weights or (1,) * logits.shape[-1], logits.dtype)
        apart = weights_V[indices] * ((log_sums + largest)[..., None] - logits)
        losses = (1 - smoothing) * weights_V[labels] * losses + smoothing * jnp.mean(apart, axis=-1)
    if z_loss:
        losses = losses + z_loss * jnp.square(log_sums + largest)
    return {
        "loss": jnp.sum(jnp.where(is_counted, losses, 0)),
        "count": jnp.sum(is_counted),
        "correct": jnp.sum(is_counted & (matmul.argmax(logits, largest) == labels)),
    }
