"""Matmuls of activations and weights, with hand-written derivatives for speed.

JAX's own derivatives multiply float32 cotangents, which misses the fast bfloat16 path, and sum bias gradients slowly.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.parallel import is_one_cpu, platform


def sum_dtype(dtype: Any) -> Any:
    """Return the accumulation type of matmuls in `dtype`: float32, or wider."""
    return jnp.promote_types(dtype, jnp.float32)


class _How(NamedTuple):
    """Static options of a linear layer: matmul type, the axis of n_in in the kernel, rounding, platform."""

    dtype: Any
    axis: int
    is_rounded: bool
    is_on_cpu: bool
    is_on_gpu: bool


def linear(x: Array, kernel: Array, bias: Array | None, dtype: Any, axis: int = 0, is_rounded: bool = False) -> Array:
    """Return x [..., n_in] times kernel, plus bias [n_out] if there is one.

    The kernel is [n_in, n_out], or with `axis` 1 [n_out, n_in].

    `is_rounded`: the caller rounds the result to `dtype`. A GPU then rounds before it adds the bias, which avoids
    writing and reading the sums in float32.
    """
    if bias is None:  # XLA removes the addition of zeros and their unused gradient
        bias = jnp.zeros(kernel.shape[1 - axis], sum_dtype(dtype))
    return _linear(x.astype(dtype), kernel, bias, _How(dtype, axis, is_rounded, is_one_cpu(), platform() == "gpu"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: Array, kernel: Array, bias: Array, how: _How) -> Array:
    return _linear_forward(x, kernel, bias, how)[0]


def _linear_forward(x: Array, kernel: Array, bias: Array, how: _How) -> tuple[Array, tuple[Array, Array]]:
    n_out = len(bias)
    kernel = _aligned(kernel.astype(how.dtype), 1 - how.axis, how)
    # All axes but the last are merged: XLA's matmuls on a CPU then take half the time.
    result = how.dtype if how.is_on_gpu and how.is_rounded else None
    y = _dot(x.reshape(-1, x.shape[-1]), kernel, (1,), (how.axis,), result)[:, :n_out] + bias[None]
    return y.reshape(*x.shape[:-1], n_out), (x, kernel)


def _aligned(x: Array, axis: int, how: _How) -> Array:
    """Return `x` with an axis zero-padded to a multiple of 8, because fast matmuls of a GPU read 16 bytes at a time."""
    if not how.is_on_gpu or x.shape[axis] % 8 == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % 8)
    return jnp.pad(x, widths)


def _linear_back(how: _How, kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    x, kernel = kept
    dtype, n_out = grad.dtype, grad.shape[-1]
    grad = _aligned(grad.astype(how.dtype), grad.ndim - 1, how)
    rows = grad.reshape(-1, grad.shape[-1])
    if how.is_on_cpu:  # XLA sums columns many times slower there than by a matmul, and one row slower than eight
        dbias = _dot(jnp.ones((8, len(rows)), rows.dtype), rows, (1,), (0,))[0]
    else:
        dbias = jnp.sum(rows, axis=0, dtype=dtype)[:n_out]
    dx = _dot(rows, kernel, (1,), (1 - how.axis,), how.dtype if how.is_on_gpu else None)
    dx = dx.reshape(x.shape).astype(how.dtype)
    if how.is_on_cpu and how.dtype == jnp.bfloat16:
        # With two contracted axes, XLA transposes bfloat16 first and is several times faster; float32 is not.
        if x.ndim == 2 and len(x) % 16 == 0:
            x, grad = (a.reshape(-1, 16, a.shape[-1]) for a in (x, grad))
    else:
        x, grad = x.reshape(-1, x.shape[-1]), rows
    summed = tuple(range(x.ndim - 1))
    if how.axis == 0:
        return dx, _dot(x, grad, summed, summed)[:, :n_out], dbias
    return dx, _dot(grad, x, summed, summed)[:n_out], dbias


def _dot(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...], result: Any = None) -> Array:
    result = result or sum_dtype(a.dtype)
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=result)


_linear.defvjp(_linear_forward, _linear_back)


def einsum(subscripts: str, a: Array, b: Array, dtype: Any) -> Array:
    """Return jnp.einsum of two arrays in `dtype`, accumulated as in sum_dtype.

    It has JAX's own derivative, because on a CPU, XLA lacks some bfloat16 matmuls with batch axes.
    """
    return jnp.einsum(subscripts, a.astype(dtype), b.astype(dtype), preferred_element_type=sum_dtype(dtype))


def argmax(x: Array, largest: Array | None = None) -> Array:
    """Return jnp.argmax along the last axis, int32, six times as fast on a CPU.

    XLA reduces float32 fast, and float32 represents whole numbers up to 2^24. `largest` is the maximum, if known.
    """
    n = x.shape[-1]
    places = jnp.arange(n, dtype=jnp.float32).reshape((1,) * (x.ndim - 1) + (n,))
    largest = jnp.max(x, axis=-1) if largest is None else largest
    is_largest = x == largest[..., None]  # nowhere, if there is a NaN
    return jnp.min(jnp.where(is_largest, places, n - 1), axis=-1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def elementwise(function: Callable[[Array], Array], x: Array) -> Array:
    """Apply a function to each element in at least float32, rounded to x's type; only x is kept for the gradient."""
    return function(x.astype(sum_dtype(x.dtype))).astype(x.dtype)


def _elementwise_back(function: Callable[[Array], Array], x: Array, grad: Array) -> tuple[Array]:
    dtype = sum_dtype(x.dtype)
    _, dx = jax.jvp(function, (x.astype(dtype),), (grad.astype(dtype),))
    return (dx.astype(x.dtype),)


elementwise.defvjp(lambda function, x: (elementwise(function, x), x), _elementwise_back)
