"""Rolling back to a checkpoint after NaN or infinity (train.on_nonfinite=rollback)."""

from jaxlm.data import mixture
from jaxlm.data.position import Position
from jaxlm.errors import UserError
from jaxlm.training import history
from jaxlm.training.run import Run

MOST_ROLLBACKS = 10  # to one checkpoint


def step_to_return_to(run: Run, saved: list[int], position: Position, bad: int) -> int:
    """Return the last saved step before the update `bad`, whose loss or gradient is NaN or infinite.

    Raises UserError if there is none, or after MOST_ROLLBACKS to the same one.
    """
    what = f"train.on_nonfinite=rollback: step {bad} is NaN or infinite"
    step = max((step for step in saved if step < bad), default=None)
    if step is None:
        raise UserError(
            f"{what}, and there is no checkpoint before it; lower train.learning_rate or train.eval_interval "
            f"({run.dir} is kept)"
        )
    n_rollbacks = sum(first >= position.sample for first, _ in position.skipped)
    if n_rollbacks >= MOST_ROLLBACKS and position.step == step:
        raise UserError(
            f"{what} again, after {MOST_ROLLBACKS} rollbacks to step {step}; lower train.learning_rate "
            f"({run.dir} is kept)"
        )
    return step


def without(run: Run, position: Position, step: int, bad: int) -> Position:
    """Return the position after `step`, in data without the samples of update `bad`; drop later logs and scores."""
    train = run.config.train
    first, end = position.first(bad - 1, train), position.after(bad - 1, train)
    samples = f"samples {first:,} to {end:,}"
    run.log.warn(f"step {bad}: the loss or gradient is NaN or infinite: back to step {step}, without {samples}")
    run.log.drop_after(step, history.FILES)
    try:
        history.restore_to(run.dir, step, warn=run.log.warn)
    except UserError as error:  # a read-only disk
        run.log.warn(str(error))
    for later in [i for i in run.validation if i > step]:
        del run.validation[later]
    sample = position.after(step - 1, train) if step > position.step else position.sample
    mix = mixture.state_of(run.data.samples["train"], train, position, sample)
    return Position(step, sample, (*position.skipped, (first, end)), mix)
