"""The learning rate as a function of the update number, composed from Optax schedules."""

import optax

from jaxlm.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Return the original's rate at update i, counted from 0: warmup, cosine to the minimum, then the minimum.

    i < warmup: i * peak / warmup, so that the first update of a warmup has rate 0.
    """
    peak, minimum, warmup_steps = config.learning_rate, config.min_learning_rate, config.warmup_steps
    decay_steps = (config.decay_steps or config.max_steps) - warmup_steps
    # Optax refuses a piece of length 0; one update long, it lies behind its boundary or at its end value.
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    decay = optax.cosine_decay_schedule(peak, max(decay_steps, 1), alpha=minimum / peak if peak else 0.0)
    return optax.join_schedules([warmup, decay], [warmup_steps])
