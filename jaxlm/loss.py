"""The loss: cross-entropy, and a pass over the output layer in chunks that never holds all logits.

Letters as in model.py; R rows (positions of all samples), N rows of a chunk, C chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.ops import matmul
from jaxlm.parallel import platform

# Sums over samples or tokens: "loss" and "count", and what a task adds, such as "correct". Quotients are taken last.
Totals = dict[str, Array]
ROWS = {"cpu": 256, "gpu": 4096, "tpu": 1024}  # of logits in memory at a time


@jax.named_scope("output layer")
def cross_entropy(logits: Array, labels: Array) -> Totals:
    """Return the summed cross-entropy, the number of labels, and how often the largest logit is the label.

    logits [..., V], labels [...]; a negative label counts nothing.
    """
    is_counted = labels >= 0
    labels = jnp.maximum(labels, 0)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    indices = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    # A sum rather than an index, whose derivative is a scatter.
    label_logits = jnp.sum(jnp.where(indices == labels[..., None], logits, 0), axis=-1)
    # logsumexp minus the logit would round a small loss as coarsely as the logits; this is exact to the rounding of 1.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    losses = jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)) + (largest - label_logits)
    return {
        "loss": jnp.sum(jnp.where(is_counted, losses, 0)),
        "count": jnp.sum(is_counted),
        "correct": jnp.sum(is_counted & (matmul.argmax(logits, largest) == labels)),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_chunks(totals_of: Callable[..., Any], weights: Any, x_RD: Array, labels_R: Array) -> Any:
    """Return totals_of(weights, x, labels), which are sums over rows, without the whole of what it makes of the rows.

    The derivative of its "loss" is computed in the same pass. Others of the totals have none.
    """
    return _by_chunks(lambda *args: (totals_of(*args), None), weights, x_RD, labels_R)[0]


def _by_chunks(function: Callable[..., Any], weights: Any, x_RD: Array, labels_R: Array) -> Any:
    """Return the sums of what a function returns first over chunks of rows, and what it returns second of all rows."""
    R, D = x_RD.shape
    n = -(-R // ROWS[platform()])
    size = -(-R // (16 * n)) * 16
    x_CND = jnp.pad(x_RD, ((0, n * size - R), (0, 0))).reshape(n, size, D)
    labels_CN = jnp.pad(labels_R, (0, n * size - R), constant_values=-1).reshape(n, size)

    def add(sums: Any, chunk: tuple[Array, Array]) -> tuple[Any, Any]:
        totals, of_rows = function(weights, *chunk)
        return jax.tree.map(jnp.add, sums, totals), of_rows

    first, of_first = function(weights, x_CND[0], labels_CN[0])
    if n == 1:
        return first, jax.tree.map(lambda x_ND: x_ND[:R], of_first)
    sums, of_rest = jax.lax.scan(add, first, (x_CND[1:], labels_CN[1:]))
    of_rows = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]).reshape(n * size, D)[:R], of_first, of_rest)
    return sums, of_rows


def _by_chunks_forward(totals_of: Callable[..., Any], weights: Any, x_RD: Array, labels_R: Array) -> Any:
    def loss(weights: Any, x_ND: Array, labels_N: Array) -> tuple[Array, Any]:
        totals = totals_of(weights, x_ND, labels_N)
        return totals["loss"], totals

    def with_gradients(*args: Any) -> Any:
        (dweights, dx_ND), totals = jax.grad(loss, (0, 1), has_aux=True)(*args)
        return (totals, dweights), dx_ND

    (totals, dweights), dx_RD = _by_chunks(with_gradients, weights, x_RD, labels_R)
    return totals, (dweights, dx_RD)


def _by_chunks_back(totals_of: Callable[..., Any], kept: Any, grads: Any) -> tuple[Any, Any, None]:
    return *jax.tree.map(lambda x: x * grads["loss"], kept), None


by_chunks.defvjp(_by_chunks_forward, _by_chunks_back)
