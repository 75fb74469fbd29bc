"""Dropout: its share, its scale, and that its masks look like independent draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.dropout import dropout, keeps


def test_dropout_zeroes_its_share_and_scales_up_the_rest() -> None:
    x = jnp.full((100, 200), 2.0)
    dropped = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0, np.float32(2 / 0.7)}
    assert np.mean(dropped == 0) == pytest.approx(0.3, abs=0.02)  # six standard deviations
    assert dropout(x, 0.3, None) is x


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.5])
def test_masks_look_like_independent_draws(rate: float) -> None:
    shape = (8, 64, 256)
    keys = [*jax.random.split(jax.random.key(0), 3), jax.random.key(1)]
    masks = [np.asarray(keeps(key, rate, shape)) for key in keys]
    pairs = list(itertools.combinations(masks, 2))  # of different keys, and of neighbours, near and far, of one
    pairs += [
        (mask.take(range(n, size), axis), mask.take(range(size - n), axis))
        for mask in masks
        for axis, size in enumerate(shape)
        for n in (1, 2, 4, size // 2)
    ]
    for mask in masks:
        deviation = (rate * (1 - rate) / mask.size) ** 0.5
        assert abs(mask.mean() - (1 - rate)) < 5 * deviation
        of_rows = mask.mean(axis=2)  # means whose own deviation is that of 256 draws
        assert of_rows.std() == pytest.approx((rate * (1 - rate) / 256) ** 0.5, rel=5 * (2 * of_rows.size) ** -0.5)
    for a, b in pairs:
        covariance = np.mean((a - (1 - rate)) * (b - (1 - rate)))
        assert abs(covariance) < 5 * rate * (1 - rate) / a.size**0.5
