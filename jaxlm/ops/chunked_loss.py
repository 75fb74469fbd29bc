"""Output layer and loss in one pass over chunks of rows, so that the logits of all rows are never in memory at once.

Letters as in model.py; R rows (positions of all samples), N rows of a chunk, C chunks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.parallel import platform

ROWS = {"cpu": 256, "gpu": 4096, "tpu": 1024}  # of a chunk, at most


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
