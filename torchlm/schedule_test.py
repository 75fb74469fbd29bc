"""The learning rate against the numbers of its definition, and against the recorded original."""

import json
import math
from pathlib import Path

import pytest

from jaxlm.config import TrainConfig
from torchlm import schedule

CASES = Path(__file__).parent.parent / "parity_tests" / "cases"


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
    assert rates(6, warmup_steps=4, decay_steps=2)[3:] == pytest.approx([0.375, 0.1, 0.1])


def config_of(settings: dict) -> TrainConfig:
    return TrainConfig(
        learning_rate=settings["learning_rate"],
        min_learning_rate=settings["min_learning_rate"],
        warmup_steps=settings["warmup_iters"],
        decay_steps=settings["lr_decay_iters"],
    )


@pytest.mark.parametrize("name", ["mlm", "mlm_cycle"])
def test_rates_and_accumulation_of_a_recorded_cycle(name: str) -> None:
    recorded = json.loads((CASES / name / "case.json").read_text())
    rate = schedule.cycled(schedule.learning_rate(config_of(recorded)), recorded["cycle_len"], 0.03)
    steps = range(recorded["steps"])
    assert [rate(i) for i in steps] == pytest.approx(recorded["lr"], rel=1e-12)
    assert [schedule.n_batches(i, recorded["cycle_len"]) for i in steps] == recorded["micro"]


def test_rates_of_a_recorded_resume() -> None:
    recorded = json.loads((CASES / "gpt_resume" / "case.json").read_text())
    first, after = recorded["resume_at"], recorded | recorded["after_resume"]
    stored = recorded["lr"][first - 1]
    rate = schedule.cycled(schedule.learning_rate(config_of(after)), recorded["cycle_len"], 0.03)
    resumed = schedule.rewarmup(rate, first, after["resume_warmup_iters"], stored)
    found = [resumed(i) for i in range(first, len(recorded["lr"]))]
    assert found == pytest.approx(recorded["lr"][first:], rel=1e-12)
    assert schedule.rewarmup(rate, first, 0, stored) is rate


def asked(kind: str, i: int, train: TrainConfig) -> float:
    """Return the rate of a schedule by its definition, with a peak of 0.5 and a minimum of 0.1."""
    warmup, end = train.warmup_steps, train.decay_steps or train.max_steps
    if i < warmup:
        return i * 0.5 / warmup
    if kind == "constant":
        return 0.5
    if kind == "inverse_sqrt":  # the same curve through (warmup, peak), whatever the warmup
        return max(0.5 / math.sqrt((i - warmup + max(warmup, 1)) / max(warmup, 1)), 0.1)
    if kind == "wsd" and i < warmup + train.stable_steps:
        return 0.5
    begin = warmup + (train.stable_steps if kind == "wsd" else 0)
    return 0.1 if i >= end else (0.5 * (end - i) + 0.1 * (i - begin)) / (end - begin)


@pytest.mark.parametrize("kind", ["linear", "constant", "inverse_sqrt", "wsd"])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (1, 0), (4, 0), (4, 13)])
@pytest.mark.parametrize("stable", [0, 5, 9])
@pytest.mark.parametrize("rewarmed", [None, (10, 0.03), (10, 0.9), (1, 0.0)])
@pytest.mark.parametrize("cycle_steps", [0, 4])
def test_each_piece_and_all_together_at_every_update(
    kind: str, warmup: int, decay: int, stable: int, rewarmed: tuple[int, float] | None, cycle_steps: int
) -> None:
    train = TrainConfig(
        max_steps=20,
        learning_rate=0.5,
        min_learning_rate=0.1,
        schedule=kind,
        warmup_steps=warmup,
        decay_steps=decay,
        stable_steps=stable,
        cycle_steps=cycle_steps,
        rewarmup_steps=6,
    )
    rate = schedule.learning_rate(train, rewarmed)
    for i in range(rewarmed[0] if rewarmed else 0, 40):
        expected = asked(kind, i, train)
        if cycle_steps:
            ramp = 1 - abs(2 * (i % 4) / 4 - 1)
            expected *= 1 + (-0.03 if i // 4 % 3 == 2 else 0.03) * ramp
        if rewarmed:
            expected = rewarmed[1] + min((i - rewarmed[0]) / 6, 1) * (expected - rewarmed[1])
        assert rate(i) == pytest.approx(expected, rel=1e-12, abs=1e-15), i
