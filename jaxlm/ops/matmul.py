"""Matmuls of activations and weights, with hand-written derivatives for speed.

JAX's own derivatives multiply cotangents in float32, which is slower than bfloat16, and sum bias gradients slowly.
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


class _Options(NamedTuple):
    """Compile-time options of a linear layer: the type of its matmuls, the kernel's axis of n_in, rounding, device."""

    dtype: Any
    axis: int
    is_rounded: bool
    is_on_cpu: bool
    is_on_gpu: bool


def linear(x: Array, kernel: Array, bias: Array | None, dtype: Any, axis: int = 0, is_rounded: bool = False) -> Array:
    """Return x [..., n_in] times kernel, plus bias [n_out] if there is one.

    The kernel is [n_in, n_out], or with `axis` 1 [n_out, n_in].

    The result is float32 or wider. `is_rounded` says that the caller rounds it to `dtype`: a GPU then rounds before it
    adds the bias, and so does not write and read float32 sums.
    """
    if bias is None:  # XLA removes the addition of zeros and their unused gradient
        bias = jnp.zeros(kernel.shape[1 - axis], sum_dtype(dtype))
    return _linear(x.astype(dtype), kernel, bias, _Options(dtype, axis, is_rounded, is_one_cpu(), platform() == "gpu"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: Array, kernel: Array, bias: Array, options: _Options) -> Array:
    return _linear_forward(x, kernel, bias, options)[0]


def _linear_forward(x: Array, kernel: Array, bias: Array, options: _Options) -> tuple[Array, tuple[Array, Array]]:
    n_out = len(bias)
    kernel = _aligned(kernel.astype(options.dtype), 1 - options.axis, options)
    # All axes but the last are merged: XLA's matmuls on a CPU then take half the time.
    result = options.dtype if options.is_on_gpu and options.is_rounded else None
    y = _dot(x.reshape(-1, x.shape[-1]), kernel, (1,), (options.axis,), result)[:, :n_out] + bias[None]
    return y.reshape(*x.shape[:-1], n_out), (x, kernel)


def _aligned(x: Array, axis: int, options: _Options) -> Array:
    """Return `x`, on GPUs with an axis zero-padded to a multiple of 8: their fast matmuls read 16 bytes at a time."""
    if not options.is_on_gpu or x.shape[axis] % 8 == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % 8)
    return jnp.pad(x, widths)


def _linear_backward(options: _Options, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    x, kernel = saved
    dtype, n_out = grad.dtype, grad.shape[-1]
    grad = _aligned(grad.astype(options.dtype), grad.ndim - 1, options)
    rows = grad.reshape(-1, grad.shape[-1])
    if options.is_on_cpu:  # a matmul by ones sums columns much faster than jnp.sum there, and 8 rows are faster than 1
        dbias = _dot(jnp.ones((8, len(rows)), rows.dtype), rows, (1,), (0,))[0]
    else:
        dbias = jnp.sum(rows, axis=0, dtype=dtype)[:n_out]
    dx = _dot(rows, kernel, (1,), (1 - options.axis,), options.dtype if options.is_on_gpu else None)
    dx = dx.reshape(x.shape).astype(options.dtype)
    if options.is_on_cpu and options.dtype == jnp.bfloat16:
        # In bfloat16, XLA transposes first, and so is several times as fast, if it contracts two axes instead of one.
        if x.ndim == 2 and len(x) % 16 == 0:
            x, grad = (a.reshape(-1, 16, a.shape[-1]) for a in (x, grad))
    else:
        x, grad = x.reshape(-1, x.shape[-1]), rows
    summed = tuple(range(x.ndim - 1))
    if options.axis == 0:
        return dx, _dot(x, grad, summed, summed)[:, :n_out], dbias
    return dx, _dot(grad, x, summed, summed)[:n_out], dbias


def _dot(a: Array, b: Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...], result: Any = None) -> Array:
    result = result or sum_dtype(a.dtype)
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=result)


_linear.defvjp(_linear_forward, _linear_backward)


def einsum(subscripts: str, a: Array, b: Array, dtype: Any) -> Array:
    """Return jnp.einsum of two arrays in `dtype`, accumulated as in sum_dtype.

    The derivative is JAX's own: XLA lacks some bfloat16 matmuls with batch axes on a CPU.
    """
    return jnp.einsum(subscripts, a.astype(dtype), b.astype(dtype), preferred_element_type=sum_dtype(dtype))


def argmax(x: Array, largest: Array | None = None) -> Array:
    """Return jnp.argmax along the last axis, except for NaN; int32, six times as fast on a CPU.

    XLA reduces float32 faster than int32, and float32 is exact for integers up to 2^24. `largest` is the maximum, if
    the caller has it. If there is a NaN, the result is n - 1.
    """
    n = x.shape[-1]
    indices = jnp.arange(n, dtype=jnp.float32).reshape((1,) * (x.ndim - 1) + (n,))
    largest = jnp.max(x, axis=-1) if largest is None else largest
    is_largest = x == largest[..., None]  # all False if there is a NaN
    return jnp.min(jnp.where(is_largest, indices, n - 1), axis=-1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def elementwise(function: Callable[[Array], Array], x: Array) -> Array:
    """Apply `function` to each element in float32 or wider, and round to x's type. The backward pass saves only x."""
    return function(x.astype(sum_dtype(x.dtype))).astype(x.dtype)


def _elementwise_backward(function: Callable[[Array], Array], x: Array, grad: Array) -> tuple[Array]:
    dtype = sum_dtype(x.dtype)
    _, dx = jax.jvp(function, (x.astype(dtype),), (grad.astype(dtype),))
    return (dx.astype(x.dtype),)


elementwise.defvjp(lambda function, x: (elementwise(function, x), x), _elementwise_backward)
