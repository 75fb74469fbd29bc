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
