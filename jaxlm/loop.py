"""A run from settings to summary: `run` sets up, `fit` is the training loop, `finish` scores and sums up."""

import contextlib
import datetime
import functools
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.table import Table

from jaxlm import checkpoint, log, optim, parallel, schedule, step
from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data import cache, loader, prepare
from jaxlm.data import tokenizer as tokenizers
from jaxlm.errors import UserError
from jaxlm.log import RunLog
from jaxlm.step import TrainState
from jaxlm.tasks import TASKS, Task

N_SHOWN = 4  # validation samples of the debug dump
FILE_CHECK_S = 1.0  # between looks for the files `stop` and `save_checkpoint`


class Compiled(NamedTuple):
    """What runs on the devices."""

    update: Callable[..., Any]  # (state, batches, key) -> (state, metrics)
    totals: Callable[..., Any]  # (params, batch) -> totals, without dropout
    predict: Callable[..., Any]  # (params, batch) -> what the task shows


@dataclass(frozen=True)
class Run:
    """All that stays the same during a run."""

    config: Config
    task: Task
    data: prepare.Data
    dir: Path
    log: RunLog
    mesh: Mesh
    compiled: Compiled
    started_s: float


def run(config: Config, origins: dict[str, str], started_s: float) -> int:
    """Train as the settings say; return the exit status. Raises UserError, and then leaves no run folder."""
    run_log = RunLog()
    _configure_jax(config)
    run_dir = make_run_dir(config)
    try:
        task_class = TASKS[config.task]
        config, data = prepare.prepare(config, task_class.samples, task_class(config).embedded, run_log.bytes_bar)
        mesh = parallel.make_mesh(config.train.batch_size)
        (run_dir / "config.toml").write_text(configs.dump(config), encoding="utf-8")
        tokenizers.save(data.tokenizer, run_dir / "tokenizer.json")
        run_log.open(run_dir, log.open_loggers(config, run_dir, _settings(config)))
        _announce(config, origins, data, run_dir, mesh, run_log)
        task = task_class(config)
        state, compiled = build(config, task, mesh)
    except BaseException:
        remove_run_dir(run_dir)
        raise
    this = Run(config, task, data, run_dir, run_log, mesh, compiled, started_s)
    with contextlib.closing(run_log), checkpoint.Checkpoints(run_dir / "checkpoints") as checkpoints:
        state, is_interrupted = fit(this, state, checkpoints)
        finish(this, state, checkpoints, is_interrupted)
    return 130 if is_interrupted else 0


def build(config: Config, task: Task, mesh: Mesh) -> tuple[TrainState, Compiled]:
    """Return the state before the first update, on the mesh, and the compiled functions of a task."""

    def start() -> TrainState:
        model = task.build_model(nnx.Rngs(config.train.seed))
        return step.init_state(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]), optimizer)

    def with_model(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *args: function(nnx.merge(graphdef, params), *args)

    optimizer = optim.adamw(config.train)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: task.build_model(nnx.Rngs(0))))
    loss = with_model(task.loss)
    update = functools.partial(
        step.train_step, loss, optimizer, schedule.learning_rate(config.train), config.train.clip_norm
    )
    compiled = Compiled(
        update=jax.jit(update, donate_argnums=0),
        totals=jax.jit(lambda params, batch: loss(params, batch, None)),
        predict=jax.jit(with_model(task.predict)),
    )
    return jax.jit(start, out_shardings=parallel.replicated(mesh))(), compiled


def fit(run: Run, state: TrainState, checkpoints: checkpoint.Checkpoints) -> tuple[TrainState, bool]:
    """Train until train.max_steps, the file `stop` or Ctrl-C; return the state, and whether it was Ctrl-C."""
    train = run.config.train
    batches = loader.training_batches(run.data.samples["train"], train.batch_size, train.accumulate, train.seed)
    key = jax.random.key(train.seed)
    watch = _FileWatch(run.dir)
    meter = _Meter(run)
    run.log.say("compiling the first update ...")
    with _interrupts() as is_interrupted, run.log.training_bar(train.max_steps) as show:
        for i in range(1, train.max_steps + 1):
            batch = next(batches)
            state, metrics = run.compiled.update(state, parallel.put_batch(run.mesh, batch, axis=1), key)
            # Metrics of the update before are read only now that this one is under way: the device never waits.
            meter.add(i, metrics, batch, show)

            is_stopped = is_interrupted() or watch.take("stop")
            is_last = is_stopped or i == train.max_steps
            if not is_interrupted() and (is_last or i % train.eval_interval == 0):
                meter.flush(show)
                with meter.paused():
                    checkpoints.save(state, _info(run, i), evaluate_and_show(run, state, i))
            elif is_last or watch.take("save_checkpoint"):
                meter.flush(show)
                with meter.paused():
                    checkpoints.save(state, _info(run, i))
            if is_last:
                break
        return state, is_interrupted()


def evaluate(run: Run, params: Any, split: str) -> dict[str, Any]:
    """Return the totals over every sample of a split, once each, summed in float64 on the host."""
    sums: dict[str, Any] = {}
    ahead: list[Any] = []
    samples = run.data.samples[split]
    for batch in loader.evaluation_batches(samples, run.config.train.batch_size):
        ahead.append(run.compiled.totals(params, parallel.put_batch(run.mesh, batch)))
        if len(ahead) > 1:
            _add(sums, ahead.pop(0))
    for totals in ahead:
        _add(sums, totals)
    return sums | samples.constants


def evaluate_and_show(run: Run, state: TrainState, i: int) -> float:
    """Score the validation part after update `i`, log it, and dump samples; return the loss."""
    totals = evaluate(run, state.params, "validation")
    scores = run.task.scores(totals)
    run.log.row(i, "validation", scores)
    run.log.say(f"step {i}  validation: " + "  ".join(f"{name} {_number(x)}" for name, x in scores.items()))
    if warning := run.task.warning(totals):
        run.log.warn(warning)

    samples = run.data.samples["validation"]
    # Spread over the part; filled up so that every device has a share.
    n_rows = -(-N_SHOWN // run.mesh.size) * run.mesh.size
    indices = np.linspace(0, len(samples) - 1, n_rows).astype(int)
    batch = samples.batch(indices, np.zeros_like(indices))
    predictions = np.asarray(run.compiled.predict(state.params, parallel.put_batch(run.mesh, batch)))
    run.log.samples(i, run.task.show(batch, predictions, run.data.tokenizer), run.config.log.samples)
    return scores["loss"]


def finish(run: Run, state: TrainState, checkpoints: checkpoint.Checkpoints, is_interrupted: bool) -> None:
    """Score the test part once, with the best checkpoint, and print the summary."""
    best = checkpoints.best_step()
    columns: dict[str, dict[str, float]] = {}
    if best is not None and not is_interrupted:
        state = checkpoints.restore(best, state)
        for split in ("validation", "test"):
            samples = run.data.samples[split]
            if len(samples) and not (split == "test" and run.data.source.test_refusal):
                totals = evaluate(run, state.params, split)
                columns[split] = run.task.scores(totals)
                columns[f"{split} baseline"] = run.task.baseline(samples)
                if warning := run.task.warning(totals):
                    run.log.warn(f"{split}: {warning}")
        if "test" in columns:
            run.log.row(best, "test", columns["test"])
    _summarize(run, state, best, columns, is_interrupted)


def make_run_dir(config: Config) -> Path:
    """Make the run folder and return it. Raises UserError if it is in use or cannot be made."""
    try:
        if config.run.dir:
            path = Path(config.run.dir)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(
                    f"run.dir={path}: there is a run or another file already; give a new folder, or remove this one"
                )
            path.mkdir(parents=True, exist_ok=True)
            return path
        name = f"{config.task}-{datetime.date.today():%Y%m%d}"
        for n in range(1, 10_000):
            path = Path("runs") / f"{name}-{n}"
            with contextlib.suppress(FileExistsError):
                path.mkdir(parents=True)
                return path
    except OSError as error:
        folder = config.run.dir or path
        raise UserError(
            f"run.dir={folder}: cannot be written ({error.strerror}); give another with --run.dir"
        ) from error
    raise UserError(f"runs/{name}-*: there are too many runs; give a folder with --run.dir")


def remove_run_dir(path: Path) -> None:
    """Remove the folder of a run that did not start, and the folder `runs` if that leaves it empty."""
    shutil.rmtree(path, ignore_errors=True)
    if path.parent.name == "runs":
        with contextlib.suppress(OSError):
            path.parent.rmdir()


class _Meter:
    """Reads the metrics of updates one update late, and makes rows of them every train.log_interval updates."""

    def __init__(self, run: Run):
        self.run = run
        self.pending: tuple[int, Any] | None = None
        self.tokens = 0
        self.clock_s = time.monotonic()

    def add(self, i: int, metrics: Any, batch: dict[str, np.ndarray], show: Callable[[int, str], None]) -> None:
        self.flush(show)
        self.pending = (i, metrics)
        if i == 1:
            # Waits once: the first update includes the compile, so it is shown at once and not timed.
            jax.block_until_ready(metrics)
            self.flush(show)
            self.tokens, self.clock_s = 0, time.monotonic()
        else:
            self.tokens += self.run.data.samples["train"].n_tokens(batch)

    def flush(self, show: Callable[[int, str], None]) -> None:
        """Read what is pending; log it if its turn has come."""
        if self.pending is None:
            return
        (i, metrics), self.pending = self.pending, None
        train = self.run.config.train
        if i != 1 and i % train.log_interval and i != train.max_steps:
            return
        metrics = jax.device_get(metrics)
        scores = self.run.task.scores(metrics)
        if not math.isfinite(scores["loss"]):
            raise UserError(
                f"the loss is {scores['loss']} at step {i} (rows are {train.log_interval} steps apart); "
                f"the checkpoints in {self.run.dir} are kept: lower train.learning_rate"
            )
        row: dict[str, float] = {name: scores[name] for name in ("loss", "accuracy") if name in scores}
        row |= {"rate": float(metrics["rate"]), "grad_norm": float(metrics["grad_norm"])}
        if i == 1:
            seconds = time.monotonic() - self.run.started_s
            self.run.log.say(f"first update done {seconds:.1f} s after the start")
            speed = ""
        else:
            row["tokens_per_s"] = self.tokens / max(time.monotonic() - self.clock_s, 1e-9)
            speed = f"  {row['tokens_per_s']:,.0f} tokens/s"
            self.tokens, self.clock_s = 0, time.monotonic()
        self.run.log.row(i, "train", row)
        show(i, f"loss {row['loss']:.3f}  rate {row['rate']:.2e}{speed}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take what happens inside out of the speed."""
        paused_s = time.monotonic()
        yield
        self.clock_s += time.monotonic() - paused_s


class _FileWatch:
    """Looks for files that a person puts into the run folder to tell a run something."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.looked_s: dict[str, float] = {}

    def take(self, name: str) -> bool:
        """Return whether the file is there, and remove it; looks at most once a second."""
        now = time.monotonic()
        if now - self.looked_s.get(name, 0.0) < FILE_CHECK_S:
            return False
        self.looked_s[name] = now
        if not (self.folder / name).exists():
            return False
        (self.folder / name).unlink(missing_ok=True)
        return True


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, which the yielded function returns; the second one ends at once."""
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def _configure_jax(config: Config) -> None:
    folder = cache.user_cache_dir(config.data.cache_dir) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Short compiles, too: together they are most of the time to the first update of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if config.train.precision == "float32":
        # GPUs and TPUs round the inputs of float32 products otherwise.
        jax.config.update("jax_default_matmul_precision", "highest")


def _announce(
    config: Config, origins: dict[str, str], data: prepare.Data, run_dir: Path, mesh: Mesh, run_log: RunLog
) -> None:
    """Print what is about to run, and where each value that is no default came from."""
    devices = jax.devices()
    run_log.say(f"run     {run_dir}")
    run_log.say(f"data    {data.source.description}")
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in data.samples.items())
    run_log.say(f"samples {sizes}; of {config.model.seq_len} tokens, vocabulary {config.model.vocab_size:,}")
    run_log.say(f"device  {len(devices)} x {devices[0].device_kind}")
    for name, origin in origins.items():
        if configs.get(config, name) != configs.get(Config(), name):
            run_log.say(f"  {name} = {configs.get(config, name)!r}  ({origin})")
    for note in data.notes:
        run_log.say(f"note: {note}")
    used = TASKS[config.task].settings
    unused = {name for task in TASKS.values() for name in task.settings if name not in used}
    for line in configs.warnings(config, origins, unused):
        run_log.warn(line)


def _info(run: Run, i: int) -> dict[str, Any]:
    return {
        "step": i,
        "task": run.config.task,
        "rate": float(schedule.learning_rate(run.config.train)(i - 1)),
        "config": _settings(run.config),
        "tokenizer": tokenizers.fingerprint(run.data.tokenizer),
    }


def _settings(config: Config) -> dict[str, Any]:
    return {name: configs.get(config, name) for name in configs.SETTINGS}


def _add(sums: dict[str, Any], totals: Any) -> None:
    for name, value in jax.device_get(totals).items():
        sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)


def _number(x: float) -> str:
    return f"{x:.4f}" if abs(x) < 100 else f"{x:,.0f}"


def _summarize(
    run: Run, state: TrainState, best: int | None, columns: dict[str, dict[str, float]], is_interrupted: bool
) -> None:
    seconds = int(time.monotonic() - run.started_s)
    n_parameters = sum(x.size for x in jax.tree.leaves(state.params))
    ending = "interrupted" if is_interrupted else "finished"
    run.log.say("")
    run.log.say(
        f"{run.config.task} {ending} after {seconds // 60} min {seconds % 60} s: "
        f"{n_parameters / 1e6:.1f} M parameters, on {run.data.source.description}"
    )
    if columns:
        table = Table("score", *columns, title=f"best checkpoint, step {best}; baseline: {run.task.baseline_name}")
        for name in columns["validation"]:
            table.add_row(name, *(_number(column[name]) for column in columns.values()))
        run.log.say(table)
    if run.data.source.test_refusal:
        run.log.say(run.data.source.test_refusal)
    run.log.say(f"run folder: {run.dir} (config.toml, tokenizer.json, metrics.jsonl, samples.txt, checkpoints)")
    run.log.say(f"samples:    tail -n 20 {run.dir / 'samples.txt'}")
    run.log.say(f"next:       {_next_command(run)}")


def _next_command(run: Run) -> str:
    if run.config.data.path or run.config.data.hub:
        return f"python -m jaxlm.train --config {run.dir / 'config.toml'} --run.dir NEW_FOLDER --train.max-steps 10000"
    own = "reviews.tsv" if run.task.samples.is_labelled else "your_text.txt"
    return f"python -m jaxlm.train --task {run.config.task} --data.path {own}"
