"""The sketch of an array that is too large to store: a sample, the norm, and random projections of all elements.

The sample is `x[i, j, ...]` for sorted numbers i, j, ... that depend on the lengths of the axes alone: a transposed
array has the transposed sample, so samples reveal the same differences as small arrays. The
projections multiply every element by a sign that is a product of one sign an axis: no change goes unseen.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

KEPT = 16_384  # elements of a sample, at most
N_PROJECTIONS = 4


def can(shape: tuple[int, ...]) -> bool:
    """Return whether there is anything to leave out."""
    return len(shape) > 0


def axes(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return which places of each axis are in the sample: the same for axes of one length."""
    kept = list(shape)
    while np.prod(kept, dtype=np.int64) > KEPT:
        longest = max(kept)
        kept = [max(1, n // 2) if n == longest else n for n in kept]
    lengths = dict(zip(shape, kept, strict=True))
    return [np.sort(np.random.default_rng([n, 1]).permutation(n)[: lengths[n]]).astype(np.int32) for n in shape]


def signs(n: int) -> np.ndarray:
    """Return the signs of an axis, float32 [n, N_PROJECTIONS]."""
    return np.random.default_rng([n, 2]).choice([-1.0, 1.0], (n, N_PROJECTIONS)).astype(np.float32)


def projections(x: Any, einsum: Callable[..., Any], array: Callable[[np.ndarray], Any]) -> Any:
    """Return the projections of an array of any framework, given its einsum and how it makes arrays of NumPy's."""
    sums = einsum("...n,np->...p", x, array(signs(x.shape[-1])))
    for n in reversed(x.shape[:-1]):
        sums = einsum("...np,np->...p", sums, array(signs(n)))
    return sums


def line(shape: tuple[int, ...], sums: np.ndarray) -> dict[str, Any]:
    """Return what a line of entries.jsonl says of a sketch."""
    kept = [len(x) for x in axes(shape)]
    return {"kept": kept, "norm": float(sums[0]), "projections": [float(x) for x in sums[1:]]}
