"""The rate at every update against the original's formula in plain Python."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import TrainConfig
from jaxlm.schedule import learning_rate

PEAK, MINIMUM = 3e-3, 2e-4


def original(i: int, warmup: int, decay: int, peak: float = PEAK, minimum: float = MINIMUM) -> float:
    if i < warmup:
        return i * peak / warmup
    if i >= decay:
        return minimum
    share = (i - warmup) / (decay - warmup)
    return minimum + 0.5 * (1 + math.cos(math.pi * share)) * (peak - minimum)


@pytest.mark.parametrize(
    ("warmup", "decay", "last"),
    [(4, 0, 13), (0, 0, 13), (1, 0, 13), (4, 9, 13), (0, 9, 13), (4, 20, 13), (4, 4, 13), (6, 3, 13), (20, 0, 13)],
)
def test_rate_at_every_update(warmup: int, decay: int, last: int) -> None:
    rate = learning_rate(
        TrainConfig(
            max_steps=last, learning_rate=PEAK, min_learning_rate=MINIMUM, warmup_steps=warmup, decay_steps=decay
        )
    )
    expected = [original(i, warmup, decay or last) for i in range(last + 10)]
    # The cosine in float32 has an error of 6e-8 of the peak.
    np.testing.assert_allclose(rate(jnp.arange(last + 10)), expected, rtol=1e-6, atol=1e-7 * PEAK)
    assert rate(0) == (0 if warmup else np.float32(PEAK))


def test_a_peak_of_zero_is_a_rate_of_zero() -> None:
    rate = learning_rate(TrainConfig(max_steps=5, learning_rate=0.0, min_learning_rate=0.0, warmup_steps=2))
    assert np.all(rate(jnp.arange(7)) == 0)
