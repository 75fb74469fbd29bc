"""The learning rate as a function of the update number, composed from Optax schedules."""

import jax.numpy as jnp
import optax
from jax import Array

from jaxlm.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Return the original's rate at update i, counted from 0: warmup, cosine to the minimum, then the minimum.

    i < warmup: i * peak / warmup, so that the first update of a warmup has rate 0.
    """
    peak, minimum, warmup_steps = config.learning_rate, config.min_learning_rate, config.warmup_steps
    decay_steps = (config.decay_steps or config.max_steps) - warmup_steps
    # Optax refuses a piece of length 0: a warmup that is none lies before its boundary, whatever its length.
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    decay = optax.constant_schedule(minimum)
    if decay_steps > 0:
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=minimum / peak if peak else 0.0)
    rate = optax.join_schedules([warmup, decay], [warmup_steps])
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
