"""How far a run is in the endless order of its training samples, and how many batches an update takes from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxlm.config import TrainConfig


@dataclass(frozen=True)
class Position:
    """Where the next update finds its samples. `skipped` are (first, end) of samples that made an update go wrong."""

    step: int = 0  # updates made
    sample: int = 0  # of the endless order of samples, where that update's begin
    skipped: tuple[tuple[int, int], ...] = ()
    mix: Mapping[str, Any] = field(default_factory=dict)  # of several sources: as Mix.state makes it; {}: unused yet

    def after(self, step: int, train: TrainConfig) -> int:
        """Return where the samples of update `step` (counted from 0) end."""
        return self.first(step, train) + n_batches(step, train) * train.batch_size

    def first(self, step: int, train: TrainConfig) -> int:
        """Return where the samples of update `step`, not before `self.step`, begin."""
        n = _batches_before(step, train) - _batches_before(self.step, train)
        sample = self.sample + n * train.batch_size
        for first, end in sorted(self.skipped):
            if first >= self.sample and sample >= first:
                sample += end - first
        return sample


def n_batches(step: int, train: TrainConfig) -> int:
    """Return how many batches update `step` takes: train.accumulate, and twice that in each third of the cycle."""
    return _batches_before(step + 1, train) - _batches_before(step, train)


def _batches_before(step: int, train: TrainConfig) -> int:
    if not train.cycle_steps:
        return step * train.accumulate
    cycles, rest = divmod(step, 3 * train.cycle_steps)
    return train.accumulate * (4 * cycles * train.cycle_steps + rest + max(0, rest - 2 * train.cycle_steps))
