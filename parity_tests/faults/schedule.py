"""Faults of the learning rate: warmup, decay, the cycle of accumulation, and the re-warmup of a run that resumes."""

from parity_tests.faults.planting import both, edit, mirrored
from parity_tests.faults.targets import cycled, n_batches, rewarmup, warmed_up

ADAMW, RESUME, CYCLE = "AdamW of NumPy and PyTorch", "replay of gpt_resume", "replay of mlm_cycle"
COSINE = "_minimum + 0.5 * (1 + math.cos(math.pi * _done / _n)) * (_peak - _minimum)"
LENGTH = "(config.decay_steps or config.max_steps)"

FAULTS = [
    *both(
        "warmup from 1: the first update of a warmup has a rate",
        ADAMW,
        edit(warmed_up.jaxlm, ("jnp.asarray(_i, float)", "jnp.asarray(_i + 1.0 * (_i < config.warmup_steps), float)")),
        edit(warmed_up.torchlm, ("return _i * _peak / _n", "return (_i + 1) * _peak / _n")),
    ),
    *both(
        "schedule off by one: update i has the rate of update i + 1",
        ADAMW,
        edit(warmed_up.jaxlm, ("jnp.asarray(_i, float)", "jnp.asarray(_i + 1, float)")),
        edit(warmed_up.torchlm, ("def _rate(_i): *_body", "def _rate(_i): _i += 1; *_body")),
    ),
    *both(
        "no warmup: the peak from the first update on",
        ADAMW,
        edit(warmed_up.jaxlm, ("optax.linear_schedule(0.0, _peak, _n)", "optax.linear_schedule(_peak, _peak, _n)")),
        edit(warmed_up.torchlm, ("return _i * _peak / _n", "return _peak")),
    ),
    *mirrored(
        "decay to the last update: cosine over max_steps, not over its own length",
        ADAMW,
        warmed_up,
        (LENGTH, "config.max_steps"),
    ),
    *mirrored(
        "decay as long as told: cosine over decay_steps after the warmup",
        ADAMW,
        warmed_up,
        (f"{LENGTH} - _warmup_steps", LENGTH),
    ),
    *both(
        "minimum ignored: cosine to 0",
        ADAMW,
        edit(warmed_up.jaxlm, ("_cosine(*_args, alpha=_x)", "_cosine(*_args, alpha=0.0)")),
        edit(warmed_up.torchlm, ("_minimum + 0.5 * _wave * (_peak - _minimum)", "0.5 * _wave * _peak")),
    ),
    *both(
        "linear decay: a line for the cosine",
        ADAMW,
        edit(
            warmed_up.jaxlm,
            (
                "optax.cosine_decay_schedule(_peak, _n, **_rest)",
                "optax.linear_schedule(_peak, config.min_learning_rate, _n)",
            ),
        ),
        edit(warmed_up.torchlm, (COSINE, "_peak + (_minimum - _peak) * _done / _n")),
    ),
    *mirrored(
        "re-warmup from zero: the stored rate is ignored", RESUME, rewarmup, ("(1 - _x) * stored_rate + _rate", "_rate")
    ),
    *mirrored(
        "stored rate off: the rate that is asked for, not the stored one",
        RESUME,
        rewarmup,
        ("stored_rate", "schedule(first_step)"),
    ),
    *mirrored(
        "re-warmup from update 0: a re-warmup that is over when it begins", RESUME, rewarmup, ("first_step", "0")
    ),
    *mirrored("another cycle: two batches in the first of three cycles", CYCLE, n_batches, ("_x == 2", "_x == 0")),
    *mirrored(
        "ramp upside down: a lower rate where one batch is used",
        CYCLE,
        cycled,
        ("1 + _sign * amplitude * _ramp", "1 - _sign * amplitude * _ramp"),
    ),
    *mirrored(
        "ramp without a peak: a ramp that only rises", CYCLE, cycled, ("_x / cycle_steps", "_x / cycle_steps / 2")
    ),
]
