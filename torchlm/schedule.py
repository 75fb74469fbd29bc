"""The learning rate as a function of the update number."""

import math
from collections.abc import Callable

from jaxlm.config import TrainConfig


def learning_rate(config: TrainConfig) -> Callable[[int], float]:
    """Return the original's rate at update i, counted from 0: warmup, cosine to the minimum, then the minimum.

    i < warmup: i * peak / warmup, so that the first update of a warmup has rate 0.
    """
    peak, minimum, warmup_steps = config.learning_rate, config.min_learning_rate, config.warmup_steps
    decay_steps = (config.decay_steps or config.max_steps) - warmup_steps

    def rate(i: int) -> float:
        if i < warmup_steps:
            return i * peak / warmup_steps
        progress = min((i - warmup_steps) / max(decay_steps, 1), 1.0)
        return minimum + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - minimum)

    return rate
