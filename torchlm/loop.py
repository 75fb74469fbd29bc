"""A run from settings to summary: `run` sets up, `fit` is the training loop, `finish` scores and sums up."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from jaxlm import run as runs
from jaxlm.config import Config
from jaxlm.data import loader
from jaxlm.data import tokenizer as tokenizers
from jaxlm.run import Run
from torchlm import optim, parallel, schedule, step
from torchlm.checkpoint import Checkpoints
from torchlm.parallel import Mesh
from torchlm.step import TrainState
from torchlm.tasks import TASKS, Task


class Compiled(NamedTuple):
    """What runs on the devices. jaxlm compiles it; here it is called as it is."""

    mesh: Mesh
    update: Callable[..., Any]  # (state, batches, key) -> (state, metrics)
    totals: Callable[..., Any]  # (model, batch) -> totals, without dropout
    predict: Callable[..., Any]  # (model, batch) -> what the task shows


def run(config: Config, origins: dict[str, str], started_s: float) -> int:
    """Train as the settings say; return the exit status. Raises UserError, and then leaves no run folder."""
    mesh = parallel.make_mesh(config.train.batch_size)
    device = f"{mesh.size} x {_device_kind(mesh.device)}"
    with contextlib.ExitStack() as stack:
        config = stack.enter_context(parallel.joined(mesh, config))
        if mesh.rank:
            parallel.wait(mesh)  # for the caches, which the first process makes
        with runs.started(config, origins, TASKS, device, started_s, "python -m torchlm.train") as this:
            if not mesh.rank:
                parallel.wait(mesh)
            state, compiled = build(this.config, this.task, mesh)
            # From here on Ctrl-C does not raise, and the run folder stays.
            is_interrupted = stack.enter_context(runs.interrupts(this.log))
        is_interrupted = functools.partial(parallel.any_process, mesh, is_interrupted)
        stack.enter_context(contextlib.closing(this.log))
        checkpoints = stack.enter_context(Checkpoints(this.dir / "checkpoints"))
        state = fit(this, compiled, state, checkpoints, is_interrupted)
        finish(this, compiled, state, checkpoints, is_interrupted)
        return 130 if is_interrupted() else 0


def build(config: Config, task: Task, mesh: Mesh) -> tuple[TrainState, Compiled]:
    """Return the state before the first update, on the mesh, and the functions of a task that run there."""

    def without_training(function: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def call(model: nn.Module, *args: Any) -> Any:
            return function(parallel.single(model).eval(), *args)

        return call

    rate = schedule.learning_rate(config.train)
    model = parallel.replicated(mesh, task.build_model(torch.Generator().manual_seed(config.train.seed)))
    optimizer = optim.adamw(config.train, model)
    update = functools.partial(step.train_step, task.loss, rate, config.train.clip_norm)
    compiled = Compiled(
        mesh=mesh,
        update=update,
        totals=without_training(lambda model, batch: parallel.sum_over_processes(task.loss(model, batch, None))),
        predict=without_training(task.predict),
    )
    return step.init_state(model, optimizer), compiled


def fit(
    run: Run, compiled: Compiled, state: TrainState, checkpoints: Checkpoints, is_interrupted: Callable[[], bool]
) -> TrainState:
    """Train until train.max_steps, the file `stop` or Ctrl-C; return the state."""
    train, mesh = run.config.train, compiled.mesh
    batches = loader.training_batches(run.data.samples["train"], train.batch_size, train.accumulate, train.seed)
    key = (train.seed, mesh.rank)
    take = functools.partial(parallel.any_process, mesh, runs.FileWatch(run.dir).take)
    with run.log.training_bar(train.max_steps) as show:
        meter = runs.Meter(run, _read, show)
        for i in range(1, train.max_steps + 1):
            batch = next(batches)
            state, metrics = compiled.update(state, parallel.put_batch(mesh, batch, axis=1), key)
            # Metrics of the update before are read only now that this one is under way: a GPU never waits.
            meter.add(i, metrics, batch)

            is_last = is_interrupted() or take("stop") or i == train.max_steps
            is_evaluated = (is_last or i % train.eval_interval == 0) and not is_interrupted()
            if is_evaluated or is_last or take("save_checkpoint"):
                meter.flush()
                with meter.paused():
                    loss = evaluate_and_show(run, compiled, state, i, is_interrupted) if is_evaluated else None
                    if not mesh.rank:
                        checkpoints.save(state, _info(run, i), loss)
            if is_last or is_interrupted():
                break
        return state


def evaluate(
    run: Run, compiled: Compiled, model: nn.Module, split: str, is_interrupted: Callable[[], bool]
) -> dict[str, Any] | None:
    """Return the totals over every sample of a split, once each, summed in float64 on the host; None after Ctrl-C."""
    sums: dict[str, Any] = {}
    ahead: list[Any] = []
    samples = run.data.samples[split]
    for batch in loader.evaluation_batches(samples, run.config.train.batch_size):
        ahead.append(compiled.totals(model, parallel.put_batch(compiled.mesh, batch)))
        if len(ahead) > 1:
            _add(sums, ahead.pop(0))
        if is_interrupted():
            return None
    for totals in ahead:
        _add(sums, totals)
    return sums | samples.constants


def evaluate_and_show(
    run: Run, compiled: Compiled, state: TrainState, i: int, is_interrupted: Callable[[], bool]
) -> float | None:
    """Score the validation part after update `i`, log it, and dump samples; return the loss, None after Ctrl-C."""
    totals = evaluate(run, compiled, state.model, "validation", is_interrupted)
    if totals is None:
        return None
    scores = runs.tell_scores(run, i, totals)
    batch = runs.shown_samples(run, 1)
    predictions = compiled.predict(state.model, parallel.put_batch(compiled.mesh.alone(), batch)).cpu().numpy()
    run.log.samples(i, run.task.show(batch, predictions, run.data.tokenizer), run.config.log.samples)
    return scores["loss"]


def finish(
    run: Run, compiled: Compiled, state: TrainState, checkpoints: Checkpoints, is_interrupted: Callable[[], bool]
) -> None:
    """Score the test part with the best checkpoint, for the only time, and print the summary."""
    last, best = state.step, parallel.from_first(compiled.mesh, checkpoints.best_step())
    n_parameters = sum(x.numel() for x in state.model.parameters())
    totals = None
    if best is not None and runs.has_test(run) and not is_interrupted():
        if not compiled.mesh.rank:
            state = checkpoints.restore(best, state)
        parallel.copy_from_first(compiled.mesh, state.model)
        totals = evaluate(run, compiled, state.model, "test", is_interrupted)
    runs.sum_up(run, last, best, n_parameters, totals, is_interrupted())


def _device_kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _info(run: Run, i: int) -> dict[str, Any]:
    return {
        "step": i,
        "task": run.config.task,
        "rate": schedule.learning_rate(run.config.train)(i - 1),
        "config": runs.settings(run.config),
        "tokenizer": tokenizers.fingerprint(run.data.tokenizer),
    }


def _read(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu().numpy() for name, value in metrics.items()}


def _add(sums: dict[str, Any], totals: Any) -> None:
    for name, value in _read(totals).items():
        sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)
