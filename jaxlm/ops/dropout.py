"""Dropout by a hash of the key and of each element's index; XLA fuses it into the operations around it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero a share `rate` of the elements and scale up the rest; without a key, return `x`."""
    if key is None or rate == 0:
        return x
    return jnp.where(keeps(key, rate, x.shape), x / (1 - rate), 0)


def keeps(key: Array, rate: float, shape: tuple[int, ...]) -> Array:
    """Return which elements dropout keeps, as bool of this shape: each with probability 1 - rate.

    A hash of the key and of the element's index: MurmurHash3's finalizer (Appleby, 2011), once for each half of the
    key. XLA fuses these few operations; jax.random.bits would take a tenth of an update on a CPU. The index is a
    uint32, so masks repeat after 2^32 elements.
    """

    def mix(x: Array) -> Array:
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    first, second = jax.random.key_data(key)
    strides = np.cumprod([1, *shape[:0:-1]])[::-1].astype(np.uint32)
    place = sum(jax.lax.broadcasted_iota(jnp.uint32, shape, i) * stride for i, stride in enumerate(strides))
    return mix(mix(place ^ first) + second) >= np.uint32(rate * 2**32)
