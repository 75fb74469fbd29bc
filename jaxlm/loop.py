"""A run from settings to summary: `run` sets up, `fit` is the training loop, `finish` scores and prints the summary."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxlm import checkpoint, distill, optim, parallel, schedule, step
from jaxlm import config as configs
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import Config
from jaxlm.data import loader, metrics, mixture
from jaxlm.data.position import Position
from jaxlm.errors import UserError, slow
from jaxlm.io import storage
from jaxlm.ops import flash_attention
from jaxlm.params import layout, names
from jaxlm.runtime import backend, chips, processes, profile
from jaxlm.step import TrainState
from jaxlm.tasks import TASKS, Task, flops, parameters
from jaxlm.terminal import command
from jaxlm.training import rollback, run_dir, signals, summary
from jaxlm.training.meter import Meter
from jaxlm.training.resume import Start
from jaxlm.training.run import UNSAVED, Run, identity, identity_at_start, info, started
from jaxlm.training.teacher import Teacher
from jaxlm.weights import formats, snapshots


class Compiled(NamedTuple):
    """The jitted functions of a run, and their mesh, shardings and teacher."""

    mesh: Mesh
    update: Callable[..., Any]  # (state, batches, key, teacher) -> (state, metrics)
    totals: Callable[..., Any]  # (params, batch) -> totals, without dropout
    predict: Callable[..., Any]  # (params, batch) -> predictions, for the samples that are shown
    shardings: TrainState  # a sharding for each array of a state
    model: str  # class name of the model
    teacher: nnx.Module | None = None


def run(config: Config, origins: dict[str, str], start: Start, started_s: float) -> int:
    """Train with these settings; return the exit status. Raises UserError, and then leaves no run folder."""
    backend.configure(config)
    with contextlib.ExitStack() as stack:
        config = stack.enter_context(processes.joined(config, identity_at_start(config, start)))
        mesh = parallel.make_mesh(config)
        builds_caches = processes.is_first_here()  # one process a host; the others wait until it has built them
        if not builds_caches:
            processes.wait()
        with started(config, origins, start, TASKS, _describe(mesh, config), started_s, command("train")) as this:
            if builds_caches:
                processes.wait()
            processes.check_same(identity(this))
            this.validation.update(processes.from_first(list(this.validation.items())))  # JSON has no int keys
            folder = processes.shared(storage.checkpoints(this.dir, config.run.checkpoint_dir))
            fresh, compiled = build(this.config, this.task, mesh, this.rewarmed, this.teacher)
            if mesh.size > mesh.shape["data"]:
                this.log.say(parallel.table(mesh, jax.eval_shape(fresh).params, compiled.model))
            state = begin(this, fresh, compiled.shardings)
            # From here on, a signal saves a checkpoint before the process ends, and the run folder stays.
            status = parallel.any_process(mesh, stack.enter_context(signals.interrupts(this.log)))
        stack.enter_context(this)
        record = functools.partial(run_dir.record_saved, this.dir)
        keep = config.run.keep_checkpoints
        checkpoints = stack.enter_context(Checkpoints(folder, keep, this.log.warn, record))
        state = fit(this, compiled, state, checkpoints, status)
        return finish(this, compiled, state, checkpoints, status)


def build(
    config: Config, task: Task, mesh: Mesh, rewarmed: tuple[int, float] | None = None, teacher: Teacher | None = None
) -> tuple[Callable[[], TrainState], Compiled]:
    """Return a function that makes the initial state on the mesh, and the jitted functions of a task.

    `rewarmed` is the update at which a re-warmup begins, and the learning rate before it.
    """
    train = config.train
    rate = schedule.learning_rate(train, rewarmed)
    optimizer = optim.make_optimizer(train, rate, config.model.n_layers)
    rule = step.Rule(optimizer, rate, train.clip_norm, train.on_nonfinite == "skip", config.model)

    def fresh() -> TrainState:
        model = task.build_model(nnx.Rngs(train.seed))
        return step.init_state(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]), optimizer, config.model)

    abstract = nnx.eval_shape(lambda: task.build_model(nnx.Rngs(0)))
    graphdef, model = nnx.graphdef(abstract), type(abstract).__name__
    shardings = parallel.shardings(mesh, jax.eval_shape(fresh), model, config.model)
    everywhere = parallel.replicated(mesh)

    def with_model(function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with parameters as its first argument, in place of a model."""

        def call(params: Any, *args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                # Gradients get the shardings of the parameters.
                params = jax.lax.with_sharding_constraint(params, shardings.params)
                return function(nnx.merge(graphdef, params), *args)

        return call

    @with_model
    def loss(model: Any, batch: Any, key: Any, teacher: nnx.Module | None = None) -> Any:
        return task.loss(model, batch, key) if teacher is None else distill.loss(task, model, teacher, batch, key)

    def update(state: TrainState, batches: Any, key: Any, teacher: nnx.Module | None = None) -> tuple[TrainState, Any]:
        return step.train_step(rule, lambda *args: loss(*args, teacher), state, batches, key)

    # When profiling, CUDA graphs are off: a trace shows each as one opaque event.
    options = {"xla_gpu_enable_command_buffer": ""} if config.profile and jax.default_backend() == "gpu" else None
    compiled = Compiled(
        mesh=mesh,
        update=jax.jit(update, donate_argnums=0, out_shardings=(shardings, everywhere), compiler_options=options),
        totals=jax.jit(lambda params, batch: loss(params, batch, None), out_shardings=everywhere),
        predict=jax.jit(with_model(task.predict), out_shardings=everywhere),
        shardings=shardings,
        model=model,
        teacher=distill.model_of(teacher, task, mesh) if teacher else None,
    )
    return jax.jit(fresh, out_shardings=shardings), compiled


@slow("making or restoring the weights")
def begin(run: Run, fresh: Callable[[], TrainState], shardings: TrainState) -> TrainState:
    """Return the state that a run starts with, and print which parts are restored.

    `fresh` makes the initial values, placed by `shardings`; it is called only if some part is not restored.
    """
    start = run.start
    if start.path is None:
        return fresh()
    state: Any = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(fresh), shardings
    )
    if start.parts != layout.PARTS:
        state = fresh()
    step = start.position().step
    if start.is_student:
        assert run.teacher is not None, "the student starts from layers of its teacher"
        weights = run.teacher.every_layer(run.config.model.n_layers)
        tree = names.to_jax(names.check(weights, parameters.shapes(run.config), str(start.path)))
        state = checkpoint.with_parts(state, jax.device_put(tree, shardings.params), step)
    elif (
        start.form == formats.RUN and configs.is_whole(start.settings()) and configs.is_whole(configs.flat(run.config))
    ):
        state = checkpoint.restore(start.path, state, start.parts, step, is_checked=True)
    else:
        parts = snapshots.parts_of_file(start.path, run.config, start.parts, start.kind == "base")
        state = jax.device_put(checkpoint.with_parts(state, parts, step), shardings)
    trees = {"optimizer": checkpoint.parts_of(state)["optimizer"], **state.params}
    sizes = {name: [x.size for x in jax.tree.leaves(tree)] for name, tree in trees.items()}
    run.log.say(summary.start_table(start, sizes))
    return state


def fit(
    run: Run, compiled: Compiled, state: TrainState, checkpoints: Checkpoints, status: Callable[[], int]
) -> TrainState:
    """Train until the run is over, a signal, or a file `stop` in the run folder; return the state.

    `status` returns the exit status so far: 0, or another number after a signal to any process.
    """
    train, samples, mesh = run.config.train, run.data.samples["train"], compiled.mesh
    position = run.start.position()
    local = parallel.local_samples(mesh, train.batch_size)
    batches = loader.training_batches(samples, train, position, local)
    key = jax.jit(lambda: jax.random.key(train.seed), out_shardings=parallel.replicated(mesh))()
    take = parallel.any_process(mesh, signals.FileWatch(run.dir).take)
    i = position.step
    if i and (i % train.eval_interval == 0 or i == train.max_steps) and i not in run.validation:
        evaluate_and_show(run, compiled, state, i, status)  # a signal ended the run before this evaluation
    if run.is_over(i) and i not in checkpoints.steps():  # no updates left, but a new run folder
        checkpoints.save_last(state, _info(run, i, position), run.losses())
    run.log.say("compiling the first update ...")
    tracer = profile.Tracer(run.dir / "trace", run.config.profile, run.log.say, run.log.warn)
    with run.log.training_bar(train.max_steps) as show, contextlib.closing(tracer):
        meter = Meter(run, jax.device_get, show, chips.peak_flops(parallel.device_kind(mesh), mesh.size))
        while not run.is_over(i):
            tracer.begin()
            with jax.profiler.TraceAnnotation(profile.DATA):
                batch, i = next(batches), i + 1
            on_devices = parallel.put_batch(mesh, batch, axis=1)
            state, metrics = compiled.update(state, on_devices, key, compiled.teacher)
            tracer.end(metrics, compiled.update, state, on_devices, key, compiled.teacher)
            A, _, T = batch["tokens"].shape
            n_flops = A * train.batch_size * flops.flops_per_sample(run.config, T)
            n_positions = sum(batch[name].size for name in ("tokens", "pair_tokens") if name in batch)
            real = processes.mean(samples.n_tokens(batch) / n_positions)
            # Reads the metrics of the previous update, so that the device never waits for the host. `bad` is the update
            # that had a NaN or infinity in its loss or gradient, or 0.
            bad = meter.add(i, metrics, real, n_positions * train.batch_size // len(local), n_flops)

            is_interrupted = bool(status())  # read once: a signal between two reads would skip an evaluation
            is_last = is_interrupted or bool(take("stop")) or i == train.max_steps
            is_evaluated = (is_last or i % train.eval_interval == 0) and not is_interrupted
            is_saved = is_evaluated or is_last or bool(take("save_checkpoint"))
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
                    save(state, _info(run, i, position), run.losses())
                if is_last:
                    break
        return state


def roll_back(
    run: Run, state: TrainState, checkpoints: Checkpoints, position: Position, bad: int
) -> tuple[TrainState, Position]:
    """Return the last state saved before update `bad`, and a position in the data that skips that update's samples."""
    checkpoints.wait()
    step = rollback.step_to_return_to(run, checkpoints.steps(), position, bad)
    return checkpoints.restore(step, state), rollback.without(run, position, step, bad)


def evaluate(run: Run, compiled: Compiled, params: Any, name: str, status: Callable[[], int]) -> dict[str, Any] | None:
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
                pending.append(compiled.totals(params, parallel.put_batch(compiled.mesh, batch)))
                if len(pending) > 1:
                    metrics.add(sums, jax.device_get(pending.pop(0)))
                show(i * train.batch_size)
                if status():
                    return None
        for totals in pending:
            metrics.add(sums, jax.device_get(totals))
        by_source[source] = sums | chosen.constants(samples)
    return by_source


def evaluate_and_show(run: Run, compiled: Compiled, state: TrainState, i: int, status: Callable[[], int]) -> None:
    """Score the validation split after update `i`, log the scores, and save samples; do nothing after a signal."""
    totals = evaluate(run, compiled, state.params, "validation", status)
    if totals is None:
        return
    batch = summary.shown_samples(run, compiled.mesh.size)
    local = parallel.local_samples(compiled.mesh, len(batch["tokens"]))
    on_devices = parallel.put_batch(compiled.mesh, {name: x[local] for name, x in batch.items()})
    predictions = np.asarray(compiled.predict(state.params, on_devices))
    summary.log_scores(run, i, totals)
    run.log.samples(i, run.task.show(batch, predictions, run.data.tokenizer), run.config.log.samples)


def finish(run: Run, compiled: Compiled, state: TrainState, checkpoints: Checkpoints, status: Callable[[], int]) -> int:
    """Score the best checkpoint on validation and test, print the summary, and return the exit status.

    This is the only time that the test split is read.
    """
    last, saved = int(state.step), checkpoints.steps()
    first, _, _ = optim.moments(state.opt_state)
    n_all, n_trained = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, first))
    totals: dict[str, Any] = {}
    if run.validation and run.ending and not status():
        state = summary.best_state(run, last, saved, state, checkpoints.restore)
        totals = {name: evaluate(run, compiled, state.params, name, status) for name in run.ending}
    is_saved = summary.sum_up(run, last, saved, (n_all, n_trained), totals, checkpoints.summary(), bool(status()))
    return status() or (0 if is_saved else UNSAVED)


def _describe(mesh: Mesh, config: Config) -> str:
    """Return devices, mesh, and attention if it is fused or a setting prevents it. Raises UserError if it must fuse."""
    model, dtype, attention = config.model, TASKS[config.task](config).dtype, "; fused attention"
    is_causal = parameters.model_kind(config.task) == "causal" or model.pooling == "last"
    is_packed = config.data.pack == "documents"
    for window in {model.window_of(i) for i in range(model.n_layers)}:
        why = flash_attention.hindrance(model, dtype, model.seq_len, is_packed, window, is_causal)
        if why and model.attention == "fused":
            raise UserError(f"model.attention=fused: {why}; or set model.attention=auto")
        if why:
            attention = f"; plain attention, since {why}" if "data.pack" in why else ""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    in_processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {parallel.device_kind(mesh)}{in_processes}" + (f" ({axes})" if axes else "") + attention


def _info(run: Run, i: int, position: Position) -> dict[str, Any]:
    rate = float(schedule.learning_rate(run.config.train, run.rewarmed)(i - 1))
    return {"format": checkpoint.FORMAT, **info(run, i, position, rate)}
