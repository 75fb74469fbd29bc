"""The learning rate as a function of the update number, composed from Optax schedules."""

import jax.numpy as jnp
import optax
from jax import Array

from jaxlm.config import TrainConfig


def learning_rate(config: TrainConfig, rewarmed: tuple[int, float] | None = None) -> optax.Schedule:
    """Return the rate at update i, counted from 0: warmup, the schedule, cycle and re-warmup, as the settings say.

    `rewarmed` is the update at which a re-warmup of train.rewarmup_steps begins, and the rate before it.
    """
    rate = warmed_up(config)
    if config.cycle_steps:
        rate = cycled(rate, config.cycle_steps, config.cycle_amplitude)
    return rate if rewarmed is None else rewarmup(rate, rewarmed[0], config.rewarmup_steps, rewarmed[1])


def warmed_up(config: TrainConfig) -> optax.Schedule:
    """Return the warmup and what follows it. Except for `constant`, the rate is never below the minimum after it.

    i < warmup: i * peak / warmup, so that the first update of a warmup has rate 0. `cosine` is the original's: to the
    minimum, then the minimum.
    """
    peak, minimum, warmup_steps = config.learning_rate, config.min_learning_rate, config.warmup_steps
    stable_steps = config.stable_steps if config.schedule == "wsd" else 0
    decay_steps = (config.decay_steps or config.max_steps) - warmup_steps - stable_steps

    def inverse_sqrt(i: Array) -> Array:  # arXiv 1706.03762, eq. 3; i from the end of the warmup
        start = max(warmup_steps, 1)
        return jnp.maximum(peak * jnp.sqrt(start / (start + i)), minimum)

    # Optax refuses a piece of length 0. Without warmup, this piece has length 1, and the boundary at 0 skips it.
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    rest: optax.Schedule
    if config.schedule == "constant":
        rest = optax.constant_schedule(peak)
    elif config.schedule == "inverse_sqrt":
        rest = inverse_sqrt
    elif decay_steps <= 0:
        pieces = [optax.constant_schedule(rate) for rate in (peak, minimum)]
        rest = optax.join_schedules(pieces, [stable_steps])
    elif config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, decay_steps, alpha=minimum / peak if peak else 0.0)
    else:  # linear, and wsd (arXiv 2404.06395), which is linear after its stable updates
        rest = optax.linear_schedule(peak, minimum, decay_steps, transition_begin=stable_steps)
    rate = optax.join_schedules([warmup, rest], [warmup_steps])
    # Optax divides the count by a length: of an int32, that is a float32 even where floats have 64 bits.
    return lambda i: rate(jnp.asarray(i, float))


def n_batches(i: int | Array, cycle_steps: int) -> int | Array:
    """Return how many batches update i accumulates in the original's cycle: 1, 1, 2, each for `cycle_steps` updates."""
    return 1 + (i // cycle_steps % 3 == 2)


def cycled(schedule: optax.Schedule, cycle_steps: int, amplitude: float) -> optax.Schedule:
    """Return the schedule with the ramp of the original's cycle of accumulation.

    The factor is 1 at both ends of each `cycle_steps` updates, and half-way through 1 + `amplitude` where one batch
    is used, 1 - `amplitude` where two are.
    """

    def rate(i: int | Array) -> Array:
        ramp = 1 - jnp.abs(2 * jnp.asarray(i % cycle_steps, float) / cycle_steps - 1)
        sign = jnp.where(n_batches(i, cycle_steps) == 1, 1, -1)
        return schedule(i) * (1 + sign * amplitude * ramp)

    return rate


def rewarmup(schedule: optax.Schedule, first_step: int, n_steps: int, stored_rate: float) -> optax.Schedule:
    """Return the schedule of a run that resumes at update `first_step`, where the rate was `stored_rate`.

    The first `n_steps` updates go from there to what the schedule asks for, linearly.
    """
    if n_steps == 0:
        return schedule
    share = optax.linear_schedule(0.0, 1.0, n_steps, transition_begin=first_step)

    def rate(i: int | Array) -> Array:
        asked = share(jnp.asarray(i, float))
        return (1 - asked) * stored_rate + asked * schedule(i)

    return rate


if __name__ == "__main__":
    import runpy  # the command is above what the training step imports

    runpy.run_module("jaxlm.reporting.plot_schedule", run_name="__main__")
