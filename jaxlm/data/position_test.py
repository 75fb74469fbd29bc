"""The place of each update in the order of samples against a loop that takes them one after the other."""

import pytest

from jaxlm import schedule
from jaxlm.config import TrainConfig
from jaxlm.data.position import Position, n_batches

N_STEPS = 60


def counts(train: TrainConfig) -> list[int]:
    """Return the batches of each update: 1, 1 and 2 in turn, each for a cycle's length."""
    cycle = [1] * train.cycle_steps + [1] * train.cycle_steps + [2] * train.cycle_steps
    return [train.accumulate * (cycle[i % len(cycle)] if cycle else 1) for i in range(N_STEPS)]


def spans(train: TrainConfig, position: Position) -> list[tuple[int, int]]:
    """Return the first and the end of the samples of each update from a position on."""
    sample, found = position.sample, []
    for step in range(position.step, N_STEPS):
        for first, end in position.skipped:
            sample = end if sample == first else sample
        found.append((sample, sample + counts(train)[step] * train.batch_size))
        sample = found[-1][1]
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("cycle_steps", [0, 1, 4])
def test_each_update_takes_the_samples_behind_those_of_the_one_before(accumulate: int, cycle_steps: int) -> None:
    train = TrainConfig(batch_size=5, accumulate=accumulate, cycle_steps=cycle_steps)
    assert [n_batches(i, train) for i in range(N_STEPS)] == counts(train)
    if cycle_steps:
        assert counts(train) == [accumulate * schedule.n_batches(i, cycle_steps) for i in range(N_STEPS)]
    for position in (Position(), Position(7, 1000), Position(9, 12)):
        found = [(position.first(i, train), position.after(i, train)) for i in range(position.step, N_STEPS)]
        assert found == spans(train, position)


def test_skipped_samples_are_passed_over() -> None:
    train = TrainConfig(batch_size=5, cycle_steps=2)
    position = Position()
    for bad in (8, 8, 20):  # twice at the same update: the one that took its place was no better
        skipped = position.first(bad, train), position.after(bad, train)
        position = Position(0, 0, (*position.skipped, skipped))
    found = [(position.first(i, train), position.after(i, train)) for i in range(N_STEPS)]
    assert found == spans(train, position)
    assert all(end <= first or begin >= last for begin, end in found for first, last in position.skipped)
    # From a later checkpoint it continues in the same way, with ranges before and after it.
    for step in (5, 9, 15, 30):
        later = Position(step, position.after(step - 1, train), position.skipped)
        assert [later.first(i, train) for i in range(step, N_STEPS)] == [first for first, _ in found[step:]]


def test_a_changed_batch_size_goes_on_with_the_next_sample() -> None:
    before, after = TrainConfig(batch_size=4, accumulate=2), TrainConfig(batch_size=3, cycle_steps=2)
    end = Position().after(9, before)
    assert end == 80
    position = Position(10, end)
    assert [(position.first(i, after), position.after(i, after)) for i in range(10, N_STEPS)] == spans(after, position)
    assert position.first(10, after) == 80 and position.after(10, after) == 86  # two batches, as the cycle has it there
