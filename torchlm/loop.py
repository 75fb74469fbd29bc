"""A run from settings to summary: `run` sets up, `fit` is the training loop, `finish` scores and prints the summary."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from jaxlm.config import Config
from jaxlm.data import loader, metrics, mixture
from jaxlm.data.position import Position
from jaxlm.errors import UserError, slow
from jaxlm.io import storage
from jaxlm.params import layout, muon, names
from jaxlm.runtime import chips
from jaxlm.tasks import flops, parameters
from jaxlm.training import rollback, run_dir, signals, summary
from jaxlm.training.meter import Meter
from jaxlm.training.resume import Start
from jaxlm.training.run import UNSAVED, Run, info, started
from jaxlm.training.teacher import Teacher
from jaxlm.weights import snapshots
from torchlm import checkpoint, distill, optim, parallel, schedule, step
from torchlm.checkpoint import Checkpoints
from torchlm.parallel import Mesh
from torchlm.step import TrainState
from torchlm.tasks import TASKS, Task


class Compiled(NamedTuple):
    """The functions of a run, and their mesh and teacher. jaxlm compiles them; here they run eagerly."""

    mesh: Mesh
    update: Callable[..., Any]  # (state, batches, key, teacher) -> (state, metrics)
    totals: Callable[..., Any]  # (model, batch) -> totals, without dropout
    predict: Callable[..., Any]  # (model, batch) -> predictions, for the samples that are shown
    teacher: nn.Module | None = None


def run(config: Config, origins: dict[str, str], start: Start, started_s: float) -> int:
    """Train with these settings; return the exit status. Raises UserError, and then leaves no run folder."""
    if config.profile:
        raise UserError(f"profile={config.profile}: torchlm makes no trace; leave it, or use PyTorch's own profiler")
    if config.model.attention == "fused":
        raise UserError("model.attention=fused: torchlm has only plain attention; leave it, or use jaxlm")
    mesh = parallel.make_mesh(config)
    device = f"{mesh.size} x {parallel.device_kind(mesh)}"
    with contextlib.ExitStack() as stack:
        config = stack.enter_context(parallel.joined(mesh, config))
        if mesh.rank:
            parallel.wait(mesh)  # for the caches, which process 0 builds
        with started(config, origins, start, TASKS, device, started_s, "python -m torchlm.train") as this:
            if not mesh.rank:
                parallel.wait(mesh)
            this.validation.update(parallel.from_first(this.validation))
            fresh, compiled = build(this.config, this.task, mesh, this.rewarmed, this.teacher)
            state = begin(this, fresh)
            # From here on, a signal saves a checkpoint before the process ends, and the run folder stays.
            status = stack.enter_context(signals.interrupts(this.log))
        status = parallel.any_process(mesh, status)
        stack.enter_context(this)
        folder = storage.checkpoints(this.dir, config.run.checkpoint_dir)
        record = functools.partial(run_dir.record_saved, this.dir)
        keep = config.run.keep_checkpoints
        checkpoints = stack.enter_context(Checkpoints(folder, keep, this.log.warn, record))
        state = fit(this, compiled, state, checkpoints, status)
        ending = finish(this, compiled, state, checkpoints, status)
        del state  # before the process group ends (parallel.joined)
        return ending


def build(
    config: Config,
    task: Task,
    mesh: Mesh,
    rewarmed: tuple[int, float] | None = None,
    teacher: Teacher | None = None,
) -> tuple[Callable[[], TrainState], Compiled]:
    """Return a function that makes the initial state on the mesh, and the functions of a task.

    `rewarmed` is the update at which a re-warmup begins, and the learning rate before it.
    """
    train = config.train
    rate = schedule.learning_rate(train, rewarmed)
    rule = step.Rule(rate, train.clip_norm, train.on_nonfinite == "skip")

    def fresh() -> TrainState:
        model = parallel.replicated(mesh, task.build_model(torch.Generator().manual_seed(train.seed)))
        return step.init_state(model, optim.make_optimizer(train, model))

    def without_training(function: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def call(model: nn.Module, *args: Any) -> Any:
            return function(parallel.single(model).eval(), *args)

        return call

    def loss(model: nn.Module, batch: Any, key: None, teacher: nn.Module | None = None) -> Any:
        return task.loss(model, batch, key) if teacher is None else distill.loss(task, model, teacher, batch, key)

    def update(state: TrainState, batches: Any, key: Any, teacher: nn.Module | None = None) -> tuple[TrainState, Any]:
        return step.train_step(rule, lambda model, batch, key: loss(model, batch, key, teacher), state, batches, key)

    compiled = Compiled(
        mesh=mesh,
        update=update,
        totals=without_training(lambda model, batch: parallel.sum_over_processes(task.loss(model, batch, None))),
        predict=without_training(task.predict),
        teacher=distill.model_of(teacher, task, mesh) if teacher else None,
    )
    return fresh, compiled


@slow("making or restoring the weights")
def begin(run: Run, fresh: Callable[[], TrainState]) -> TrainState:
    """Return the state that a run starts with, and print which parts are restored.

    `fresh` makes the initial values.
    """
    start, state = run.start, fresh()
    if start.path is None:
        return state
    if start.is_student:
        assert run.teacher is not None, "the student starts from layers of its teacher"
        weights = run.teacher.every_layer(run.config.model.n_layers)
        weights = names.check(weights, parameters.shapes(run.config), str(start.path))
        parallel.single(state.model).load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    else:
        snapshot, is_base = snapshots.read(start.path), start.kind == "base"
        state = checkpoint.with_snapshot(state, snapshot, str(start.path), start.parts, start.position().step, is_base)
    numbers = {name: x.numel() for name, x in parallel.single(state.model).named_parameters()}
    sizes = {part: [n for name, n in numbers.items() if name.startswith(part)] for part in layout.PARTS[:2]}
    sizes = {part: found for part, found in sizes.items() if found}
    trained = names.trained(run.config.model, numbers)
    moments = [*trained.values(), *muon.with_second_moment(run.config.train, trained).values()]
    run.log.say(summary.start_table(start, sizes | {"optimizer": moments}))
    return state


def fit(
    run: Run, compiled: Compiled, state: TrainState, checkpoints: Checkpoints, status: Callable[[], int]
) -> TrainState:
    """Train until the run is over, a signal, or a file `stop` in the run folder; return the state.

    `status` returns the exit status of the process so far: 0, or after a signal another number.
    """
    train, samples, mesh = run.config.train, run.data.samples["train"], compiled.mesh
    position = run.start.position()
    local = parallel.local_samples(mesh, train.batch_size)
    batches = loader.training_batches(samples, train, position, local)
    key = (train.seed, mesh.rank)
    take = parallel.any_process(mesh, signals.FileWatch(run.dir).take)
    i = position.step
    if i and (i % train.eval_interval == 0 or i == train.max_steps) and i not in run.validation:
        evaluate_and_show(run, compiled, state, i, status)  # a signal ended the run before this evaluation
    if run.is_over(i) and not mesh.rank and i not in checkpoints.steps():
        checkpoints.save_last(state, _info(run, i, position), run.losses())  # no updates left, but a new run folder
    with run.log.training_bar(train.max_steps) as show:
        meter = Meter(run, _read, show, chips.peak_flops(parallel.device_kind(mesh), mesh.size))
        while not run.is_over(i):
            batch, i = next(batches), i + 1
            state, metrics = compiled.update(state, parallel.put_batch(mesh, batch), key, compiled.teacher)
            # This reads the metrics of the previous update, so that a GPU never waits for the host.
            A, _, T = batch["tokens"].shape
            n_flops = A * train.batch_size * flops.flops_per_sample(run.config, T)
            n_positions = sum(batch[name].size for name in ("tokens", "pair_tokens") if name in batch)
            real = parallel.mean_of_processes(mesh, samples.n_tokens(batch) / n_positions)
            bad = meter.add(i, metrics, real, n_positions * train.batch_size // len(local), n_flops)

            is_interrupted = bool(status())  # read once: a signal between two reads would skip an evaluation
            is_last = is_interrupted or take("stop") or i == train.max_steps
            is_evaluated = (is_last or i % train.eval_interval == 0) and not is_interrupted
            is_saved = is_evaluated or is_last or take("save_checkpoint")
            bad = bad or (meter.flush() if is_saved else 0)
            if bad:
                meter.forget()
                state, position = roll_back(run, state, checkpoints, position, bad)
                i = position.step
                batches = loader.training_batches(samples, train, position, local)
            elif is_saved:
                with meter.paused():
                    if is_evaluated:
                        evaluate_and_show(run, compiled, state, i, status)
                    is_last = is_last or bool(status()) or run.is_over(i)
                    save = checkpoints.save_last if is_last else checkpoints.save
                    if not mesh.rank:
                        save(state, _info(run, i, position), run.losses())
                if is_last:
                    break
        return state


def roll_back(
    run: Run, state: TrainState, checkpoints: Checkpoints, position: Position, bad: int
) -> tuple[TrainState, Position]:
    """Return the last state saved before update `bad`, and a position in the data that skips that update's samples."""
    folder = parallel.from_first(checkpoints.folder)  # every process reads there
    step = rollback.step_to_return_to(run, Checkpoints(folder).steps(), position, bad)
    return restored(Checkpoints(folder).path(step), state), rollback.without(run, position, step, bad)


def evaluate(
    run: Run, compiled: Compiled, model: nn.Module, name: str, status: Callable[[], int]
) -> dict[str, Any] | None:
    """Return the totals of an evaluation, by source: of the samples in run.chosen[name]; summed in float64.

    Returns None after a signal.
    """
    by_source: dict[str, Any] = {}
    train = run.config.train
    for source, chosen in run.chosen[name].items():
        sums: dict[str, Any] = {}
        pending: list[Any] = []  # totals of the batch before, which the device may still compute
        samples = mixture.parts_of(run.data.samples[chosen.split])[source]
        local = parallel.local_samples(compiled.mesh, train.batch_size)
        with run.log.pass_bar(f"scoring {chosen.split} {source}".strip(), len(chosen.indices)) as show:
            batches = loader.evaluation_batches(samples, train.batch_size, local, train.group_by_length, chosen.indices)
            for i, batch in enumerate(batches):
                pending.append(compiled.totals(model, parallel.put_batch(compiled.mesh, batch)))
                if len(pending) > 1:
                    metrics.add(sums, _read(pending.pop(0)))
                show(i * train.batch_size)
                if status():
                    return None
        for totals in pending:
            metrics.add(sums, _read(totals))
        by_source[source] = sums | chosen.constants(samples)
    return by_source


def evaluate_and_show(run: Run, compiled: Compiled, state: TrainState, i: int, status: Callable[[], int]) -> None:
    """Score the validation split after update `i`, log the scores, and save samples; do nothing after a signal."""
    totals = evaluate(run, compiled, state.model, "validation", status)
    if totals is None:
        return
    batch = summary.shown_samples(run, 1)
    predictions = compiled.predict(state.model, parallel.put_batch(compiled.mesh, batch)).cpu().numpy()
    summary.log_scores(run, i, totals)
    run.log.samples(i, run.task.show(batch, predictions, run.data.tokenizer), run.config.log.samples)


def finish(run: Run, compiled: Compiled, state: TrainState, checkpoints: Checkpoints, status: Callable[[], int]) -> int:
    """Score the best checkpoint on validation and test, print the summary, and return the exit status.

    This is the only time that the test split is read.
    """
    last, saved = state.step, parallel.from_first(checkpoints.steps())
    tensors = list(state.model.parameters())
    sizes = sum(x.numel() for x in tensors), sum(x.numel() for x in tensors if x.requires_grad)
    totals: dict[str, Any] = {}
    if run.validation and run.ending and not status():
        if not compiled.mesh.rank:
            state = summary.best_state(run, last, saved, state, lambda i, like: restored(checkpoints.path(i), like))
        parallel.copy_from_first(compiled.mesh, state.model)
        totals = {name: evaluate(run, compiled, state.model, name, status) for name in run.ending}
    is_saved = summary.sum_up(run, last, saved, sizes, totals, checkpoints.summary(), bool(status()))
    return parallel.from_first(status() or (0 if is_saved else UNSAVED))


def _info(run: Run, i: int, position: Position) -> dict[str, Any]:
    return info(run, i, position, schedule.learning_rate(run.config.train, run.rewarmed)(i - 1))


def _read(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu().numpy() for name, value in metrics.items()}


def restored(path: Path, like: TrainState) -> TrainState:
    """Return `like`, changed in place to the state of a checkpoint. Raises UserError if it is damaged."""
    return checkpoint.with_snapshot(like, snapshots.read(path), str(path))
