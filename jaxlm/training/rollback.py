"""Which checkpoint a run goes back to after NaN or infinity, and where its data go on (train.on_nonfinite)."""

from jaxlm.data.position import Position
from jaxlm.errors import UserError
from jaxlm.training import history
from jaxlm.training.run import Run

MOST_ROLLBACKS = 10  # to one checkpoint


def step_to_return_to(run: Run, saved: list[int], position: Position, bad: int) -> int:
    """Return the last saved step before the update `bad`, whose loss or gradient is no number.

    Raises UserError if there is none, or if the run has been rolled back MOST_ROLLBACKS times since.
    """
    step = max((step for step in saved if step < bad), default=None)
    if step is None:
        raise UserError(
            f"train.on_nonfinite=rollback: step {bad} is no number, and there is no checkpoint before it; "
            f"lower train.learning_rate or train.eval_interval ({run.dir} is kept)"
        )
    if sum(first >= position.sample for first, _ in position.skipped) >= MOST_ROLLBACKS and position.step == step:
        raise UserError(
            f"train.on_nonfinite=rollback: {MOST_ROLLBACKS} times back to step {step}, and step {bad} is no number "
            f"still; lower train.learning_rate ({run.dir} is kept)"
        )
    return step


def without(run: Run, position: Position, step: int, bad: int) -> Position:
    """Return the position after `step` in data without the samples of update `bad`, and say so."""
    train = run.config.train
    samples = position.first(bad - 1, train), position.after(bad - 1, train)
    run.log.warn(
        f"step {bad}: the loss or gradient is no number: back to step {step}, on without samples "
        f"{samples[0]:,} to {samples[1]:,}"
    )
    before = position.after(step - 1, train) if step > position.step else position.sample
    run.log.drop_after(step, history.FILES)
    try:
        history.restore_to(run.dir, step, warn=run.log.warn)
    except UserError as error:  # where the disk can only be read
        run.log.warn(str(error))
    for later in [i for i in run.validation if i > step]:
        del run.validation[later]
    return Position(step, before, (*position.skipped, samples))
