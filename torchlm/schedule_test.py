"""The learning rate against the numbers of its definition."""

import math

import pytest

from jaxlm.config import TrainConfig
from torchlm import schedule


def rates(n: int, **settings: float) -> list[float]:
    rate = schedule.learning_rate(TrainConfig(**{"learning_rate": 0.5, "min_learning_rate": 0.1} | settings))
    return [rate(i) for i in range(n)]


def test_warmup_starts_at_zero_and_the_cosine_ends_at_the_minimum() -> None:
    found = rates(12, warmup_steps=4, decay_steps=10)
    assert found[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5], rel=1e-15)
    assert found[7] == pytest.approx(0.3)  # half-way
    assert found[6] == pytest.approx(0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert found[10:] == pytest.approx([0.1, 0.1], rel=1e-15)


def test_decay_lasts_to_the_last_update_by_default() -> None:
    found = rates(10, warmup_steps=0, max_steps=9)
    assert (found[0], found[9]) == (0.5, pytest.approx(0.1))
    assert all(a > b for a, b in zip(found, found[1:], strict=False))


def test_a_decay_that_ends_before_the_warmup_leaves_the_minimum() -> None:
    assert rates(6, warmup_steps=4, decay_steps=2)[4:] == pytest.approx([0.1, 0.1])
