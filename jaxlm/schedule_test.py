"""The rate at every update against the original's formula in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import TrainConfig
from jaxlm.schedule import cycled, learning_rate, n_batches, rewarmup

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


def test_the_cycle_accumulates_1_1_2_batches_and_ramps_the_rate() -> None:
    schedule = cycled(lambda i: jnp.full(jnp.shape(i), PEAK), 4, 0.03)
    counts, rates = [], []
    for i in range(30):
        ramp = 1 - abs(2 * (i % 4) / 4 - 1)
        counts.append((1, 1, 2)[i // 4 % 3])
        rates.append(PEAK * (1 + (0.03 if counts[-1] == 1 else -0.03) * ramp))
    assert [n_batches(i, 4) for i in range(30)] == counts
    np.testing.assert_allclose(schedule(jnp.arange(30)), rates, rtol=1e-6)


def test_a_resumed_run_warms_up_from_the_stored_rate() -> None:
    asked = learning_rate(TrainConfig(max_steps=20, learning_rate=PEAK, min_learning_rate=MINIMUM, warmup_steps=3))
    rate = rewarmup(asked, 8, 5, 1e-4)
    for i in range(8, 20):
        share = min((i - 8) / 5, 1)
        expected = (1 - share) * 1e-4 + share * original(i, 3, 20)
        assert float(rate(i)) == pytest.approx(expected, rel=1e-6)
    assert float(rewarmup(asked, 8, 0, 1e-4)(8)) == pytest.approx(original(8, 3, 20), rel=1e-6)


def test_rates_have_64_bits_where_floats_have() -> None:
    with jax.enable_x64(True):
        rate = learning_rate(TrainConfig(max_steps=13, learning_rate=PEAK, min_learning_rate=MINIMUM, warmup_steps=4))
        found = [float(jax.jit(rate)(jnp.int32(i))) for i in range(13)]
    np.testing.assert_allclose(found, [original(i, 4, 13) for i in range(13)], rtol=1e-13)


def asked(kind: str, i: int, train: TrainConfig) -> float:
    """Return the rate of a schedule by its definition."""
    warmup, end = train.warmup_steps, train.decay_steps or train.max_steps
    if i < warmup:
        return i * PEAK / warmup
    if kind == "constant":
        return PEAK
    if kind == "inverse_sqrt":  # the same curve through (warmup, PEAK), whatever the warmup
        return max(PEAK / math.sqrt((i - warmup + max(warmup, 1)) / max(warmup, 1)), MINIMUM)
    if kind == "wsd" and i < warmup + train.stable_steps:
        return PEAK
    begin = warmup + (train.stable_steps if kind == "wsd" else 0)
    return MINIMUM if i >= end else (PEAK * (end - i) + MINIMUM * (i - begin)) / (end - begin)


PIECES = [
    (kind, {"warmup_steps": warmup, "decay_steps": decay, "stable_steps": stable})
    for kind, stables in (("linear", (0,)), ("constant", (0,)), ("inverse_sqrt", (0,)), ("wsd", (0, 5, 9)))
    for warmup, decay in ((0, 0), (4, 13))
    for stable in stables
]


@pytest.mark.parametrize(("kind", "settings"), PIECES)
def test_each_piece_at_every_update(kind: str, settings: dict) -> None:
    train = TrainConfig(max_steps=20, learning_rate=PEAK, min_learning_rate=MINIMUM, schedule=kind, **settings)
    expected = [asked(kind, i, train) for i in range(40)]
    np.testing.assert_allclose(learning_rate(train)(jnp.arange(40)), expected, rtol=1e-6, atol=1e-7 * PEAK)


@pytest.mark.parametrize("kind", ["linear", "constant", "inverse_sqrt", "wsd"])
def test_pieces_compose(kind: str) -> None:
    train = TrainConfig(
        max_steps=30,
        learning_rate=PEAK,
        min_learning_rate=MINIMUM,
        schedule=kind,
        warmup_steps=3,
        stable_steps=8,
        cycle_steps=4,
        rewarmup_steps=6,
    )
    for first, stored in ((10, 1e-4), (10, 1e-2), (1, 0.0), (28, PEAK)):
        expected = []
        for i in range(first, 40):
            ramp = 1 - abs(2 * (i % 4) / 4 - 1)
            rate = asked(kind, i, train) * (1 + (-0.03 if i // 4 % 3 == 2 else 0.03) * ramp)
            share = min((i - first) / 6, 1)
            expected.append(stored + share * (rate - stored))
        found = learning_rate(train, (first, stored))(jnp.arange(40))[first:]
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7 * PEAK)
        assert found[0] == np.float32(stored)
