"""A run from settings to summary: `run` sets up, `fit` is the training loop, `finish` scores and sums up."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxlm import optim, parallel, schedule, step
from jaxlm import run as runs
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import Config
from jaxlm.data import cache, loader
from jaxlm.data import tokenizer as tokenizers
from jaxlm.run import Run
from jaxlm.step import TrainState
from jaxlm.tasks import TASKS, Task


class Compiled(NamedTuple):
    """What runs on the devices."""

    mesh: Mesh
    update: Callable[..., Any]  # (state, batches, key) -> (state, metrics)
    totals: Callable[..., Any]  # (params, batch) -> totals, without dropout
    predict: Callable[..., Any]  # (params, batch) -> what the task shows


def run(config: Config, origins: dict[str, str], started_s: float) -> int:
    """Train as the settings say; return the exit status. Raises UserError, and then leaves no run folder."""
    _configure_jax(config)
    mesh = parallel.make_mesh(config.train.batch_size)
    device = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    with contextlib.ExitStack() as stack:
        with runs.started(config, origins, TASKS, device, started_s) as this:
            state, compiled = build(this.config, this.task, mesh)
            # From here on Ctrl-C does not raise, and the run folder stays.
            is_interrupted = stack.enter_context(runs.interrupts(this.log))
        stack.enter_context(contextlib.closing(this.log))
        checkpoints = stack.enter_context(Checkpoints(this.dir / "checkpoints"))
        state = fit(this, compiled, state, checkpoints, is_interrupted)
        finish(this, compiled, state, checkpoints, is_interrupted)
        return 130 if is_interrupted() else 0


def build(config: Config, task: Task, mesh: Mesh) -> tuple[TrainState, Compiled]:
    """Return the state before the first update, on the mesh, and the compiled functions of a task."""

    def start() -> TrainState:
        model = task.build_model(nnx.Rngs(config.train.seed))
        return step.init_state(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]), optimizer)

    def with_model(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *args: function(nnx.merge(graphdef, params), *args)

    rate = schedule.learning_rate(config.train)
    optimizer = optim.adamw(config.train, rate)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: task.build_model(nnx.Rngs(0))))
    loss = with_model(task.loss)
    update = functools.partial(step.train_step, loss, optimizer, rate, config.train.clip_norm)
    compiled = Compiled(
        mesh=mesh,
        update=jax.jit(update, donate_argnums=0),
        totals=jax.jit(lambda params, batch: loss(params, batch, None)),
        predict=jax.jit(with_model(task.predict)),
    )
    return jax.jit(start, out_shardings=parallel.replicated(mesh))(), compiled


def fit(
    run: Run, compiled: Compiled, state: TrainState, checkpoints: Checkpoints, is_interrupted: Callable[[], bool]
) -> TrainState:
    """Train until train.max_steps, the file `stop` or Ctrl-C; return the state."""
    train = run.config.train
    batches = loader.training_batches(run.data.samples["train"], train.batch_size, train.accumulate, train.seed)
    key = jax.random.key(train.seed)
    watch = runs.FileWatch(run.dir)
    run.log.say("compiling the first update ...")
    with run.log.training_bar(train.max_steps) as show:
        meter = runs.Meter(run, jax.device_get, show)
        for i in range(1, train.max_steps + 1):
            batch = next(batches)
            state, metrics = compiled.update(state, parallel.put_batch(compiled.mesh, batch, axis=1), key)
            # Metrics of the update before are read only now that this one is under way: the device never waits.
            meter.add(i, metrics, batch)

            is_last = is_interrupted() or watch.take("stop") or i == train.max_steps
            is_evaluated = (is_last or i % train.eval_interval == 0) and not is_interrupted()
            if is_evaluated or is_last or watch.take("save_checkpoint"):
                meter.flush()
                with meter.paused():
                    loss = evaluate_and_show(run, compiled, state, i, is_interrupted) if is_evaluated else None
                    checkpoints.save(state, _info(run, i), loss)
            if is_last or is_interrupted():
                break
        return state


def evaluate(
    run: Run, compiled: Compiled, params: Any, split: str, is_interrupted: Callable[[], bool]
) -> dict[str, Any] | None:
    """Return the totals over every sample of a split, once each, summed in float64 on the host; None after Ctrl-C."""
    sums: dict[str, Any] = {}
    ahead: list[Any] = []
    samples = run.data.samples[split]
    for batch in loader.evaluation_batches(samples, run.config.train.batch_size):
        ahead.append(compiled.totals(params, parallel.put_batch(compiled.mesh, batch)))
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
    totals = evaluate(run, compiled, state.params, "validation", is_interrupted)
    if totals is None:
        return None
    scores = runs.tell_scores(run, i, totals)
    batch = runs.shown_samples(run, compiled.mesh.size)
    predictions = np.asarray(compiled.predict(state.params, parallel.put_batch(compiled.mesh, batch)))
    run.log.samples(i, run.task.show(batch, predictions, run.data.tokenizer), run.config.log.samples)
    return scores["loss"]


def finish(
    run: Run, compiled: Compiled, state: TrainState, checkpoints: Checkpoints, is_interrupted: Callable[[], bool]
) -> None:
    """Score the test part with the best checkpoint, for the only time, and print the summary."""
    last, best = int(state.step), checkpoints.best_step()
    n_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    totals = None
    if best is not None and runs.has_test(run) and not is_interrupted():
        state = checkpoints.restore(best, state)
        totals = evaluate(run, compiled, state.params, "test", is_interrupted)
    runs.sum_up(run, last, best, n_parameters, totals, is_interrupted())


def _configure_jax(config: Config) -> None:
    folder = cache.user_cache_dir(config.data.cache_dir) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Short compiles, too: together they are most of the time to the first update of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if config.train.precision == "float32":
        # GPUs and TPUs round the inputs of float32 products otherwise.
        jax.config.update("jax_default_matmul_precision", "highest")


def _info(run: Run, i: int) -> dict[str, Any]:
    return {
        "step": i,
        "task": run.config.task,
        "rate": float(schedule.learning_rate(run.config.train)(i - 1)),
        "config": runs.settings(run.config),
        "tokenizer": tokenizers.fingerprint(run.data.tokenizer),
    }


def _add(sums: dict[str, Any], totals: Any) -> None:
    for name, value in jax.device_get(totals).items():
        sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)
