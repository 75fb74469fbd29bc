"""Checkpoints of a run, written by Orbax while training goes on: the last one and the best one are kept.

A checkpoint folder has `state` (step, params, opt_state; blocks stacked along a leading axis of layers) and `info`
(format, settings, tokenizer, and how far the run was).
"""

import logging
import math
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxlm.step import TrainState

FORMAT = 1


class Checkpoints:
    """The checkpoints in one folder, by step. Call `close` (or leave the `with` block) to wait for the last save."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells each of its steps otherwise
        policy = AnyPreservationPolicy(
            [
                LatestN(n=1),
                BestN(get_metric_fn=_validation_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self.manager = ocp.CheckpointManager(
            folder.absolute(),
            # best_fn decides nothing here, but without it Orbax does not write the metrics.
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_validation_loss, best_mode="min"),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def save(self, state: TrainState, info: dict[str, Any], validation_loss: float | None = None) -> None:
        """Start to save; returns when the arrays are copied from the device.

        Without a validation loss, the checkpoint is kept only until the next one.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_tree(state)), info=ocp.args.JsonSave({"format": FORMAT, **info})
            ),
            metrics=None if validation_loss is None else {"validation_loss": validation_loss},
            force=True,
        )

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss, None if nothing has been evaluated and saved."""
        self.manager.wait_until_finished()
        losses = {step: self.manager.metrics(step) for step in self.manager.all_steps()}
        evaluated = {step: _validation_loss(scores) for step, scores in losses.items() if scores}
        return min(evaluated, key=evaluated.__getitem__) if evaluated else None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state saved at `step`, with the shapes, types and placement of `like`."""
        self.manager.wait_until_finished()
        tree = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_tree(like))))["state"]
        return TrainState(**tree)

    def close(self) -> None:
        self.manager.close()


def _validation_loss(scores: dict[str, float]) -> float:
    loss = scores["validation_loss"]
    return math.inf if math.isnan(loss) else loss  # compared with NaN, nothing is better or worse


def _tree(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
