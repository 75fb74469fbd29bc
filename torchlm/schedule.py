"""The learning rate as a function of the update number."""

import math
from collections.abc import Callable

from jaxlm.config import TrainConfig

Schedule = Callable[[int], float]


def learning_rate(config: TrainConfig, rewarmed: tuple[int, float] | None = None) -> Schedule:
    """Return the rate at update i, counted from 0: warmup, the schedule, cycle and re-warmup, as the settings say.

    `rewarmed` is the update at which a re-warmup of train.rewarmup_steps begins, and the rate before it.
    """
    rate = warmed_up(config)
    if config.cycle_steps:
        rate = cycled(rate, config.cycle_steps, config.cycle_amplitude)
    return rate if rewarmed is None else rewarmup(rate, rewarmed[0], config.rewarmup_steps, rewarmed[1])


def warmed_up(config: TrainConfig) -> Schedule:
    """Return the warmup and what follows it. Except for `constant`, the rate is never below the minimum after it.

    i < warmup: i * peak / warmup, so that the first update of a warmup has rate 0. `cosine` is the original's: to the
    minimum, then the minimum.
    """
    peak, minimum, warmup_steps = config.learning_rate, config.min_learning_rate, config.warmup_steps
    stable_steps = config.stable_steps if config.schedule == "wsd" else 0
    decay_steps = (config.decay_steps or config.max_steps) - warmup_steps - stable_steps

    def rate(i: int) -> float:
        if i < warmup_steps:
            return i * peak / warmup_steps
        if config.schedule == "constant":
            return peak
        if config.schedule == "inverse_sqrt":  # arXiv 1706.03762, eq. 3
            start = max(warmup_steps, 1)
            return max(peak * math.sqrt(start / (start + i - warmup_steps)), minimum)
        done = i - warmup_steps - stable_steps
        if done < 0:
            return peak
        if done >= decay_steps:
            return minimum
        if config.schedule == "cosine":
            return minimum + 0.5 * (1 + math.cos(math.pi * done / decay_steps)) * (peak - minimum)
        return peak + done / decay_steps * (minimum - peak)  # linear, and wsd (arXiv 2404.06395)

    return rate


def n_batches(i: int, cycle_steps: int) -> int:
    """Return how many batches update i accumulates in the original's cycle: 1, 1, 2, each for `cycle_steps` updates."""
    return 1 + (i // cycle_steps % 3 == 2)


def cycled(schedule: Schedule, cycle_steps: int, amplitude: float) -> Schedule:
    """Return the schedule with the ramp of the original's cycle of accumulation.

    The factor is 1 at both ends of each `cycle_steps` updates, and half-way through 1 + `amplitude` where one batch
    is used, 1 - `amplitude` where two are.
    """

    def rate(i: int) -> float:
        ramp = 1 - abs(2 * (i % cycle_steps) / cycle_steps - 1)
        sign = 1 if n_batches(i, cycle_steps) == 1 else -1
        return schedule(i) * (1 + sign * amplitude * ramp)

    return rate


def rewarmup(schedule: Schedule, first_step: int, n_steps: int, stored_rate: float) -> Schedule:
    """Return the schedule of a run that resumes at update `first_step`, where the rate was `stored_rate`.

    The first `n_steps` updates go from there to what the schedule asks for, linearly.
    """
    if n_steps == 0:
        return schedule

    def rate(i: int) -> float:
        asked = min((i - first_step) / n_steps, 1.0)
        return (1 - asked) * stored_rate + asked * schedule(i)

    return rate
