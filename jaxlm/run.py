"""What surrounds the training loop and knows no framework: the run folder, its words, its clock and its signals."""

import contextlib
import datetime
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.table import Table

from jaxlm import config as configs
from jaxlm import log, metrics
from jaxlm.config import Config
from jaxlm.data import prepare
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.samples import Batch
from jaxlm.errors import UserError
from jaxlm.log import RunLog

N_SHOWN = 4  # validation samples of the debug dump
FILE_CHECK_S = 1.0  # between looks for the files `stop` and `save_checkpoint`


@dataclass(frozen=True)
class Run:
    """All that stays the same during a run. `task` is of a class like tasks.Task, of either framework."""

    config: Config
    task: Any
    data: prepare.Data
    dir: Path
    log: RunLog
    started_s: float
    program: str  # the command that started it, without settings


@contextlib.contextmanager
def started(
    config: Config,
    origins: dict[str, str],
    tasks: dict[str, Any],
    device: str,
    started_s: float,
    program: str = "python -m jaxlm.train",
) -> Iterator[Run]:
    """Make the run folder, prepare the data, and tell what is about to run; `tasks` are the task classes by name.

    Raises UserError for bad input. Then, or if anything inside the `with` block raises, the run folder is removed.
    """
    run_log = RunLog()
    run_dir = make_run_dir(config)
    try:
        task_class = tasks[config.task]
        config, data = prepare.prepare(config, task_class.samples, task_class(config).embedded, run_log.bytes_bar)
        (run_dir / "config.toml").write_text(configs.dump(config), encoding="utf-8")
        tokenizers.save(data.tokenizer, run_dir / "tokenizer.json")
        run_log.open(run_dir, log.open_loggers(config, run_dir, settings(config)))
        used = task_class.settings
        unused = {name for task in tasks.values() for name in task.settings if name not in used}
        _announce(config, origins, data, run_dir, device, unused, run_log)
        yield Run(config, task_class(config), data, run_dir, run_log, started_s, program)
    except BaseException:
        remove_run_dir(run_dir)
        raise


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


def settings(config: Config) -> dict[str, Any]:
    """Return {dotted name: value} of every setting."""
    return {name: configs.get(config, name) for name in configs.SETTINGS}


class Meter:
    """Reads the metrics of updates one update late, and makes rows of them every train.log_interval updates.

    `read` copies metrics from the device and waits for them; `show` is told the update and a text about it.
    """

    def __init__(self, run: Run, read: Callable[[Any], dict[str, Any]], show: Callable[[int, str], None]):
        self.run, self.read, self.show = run, read, show
        self.pending: tuple[int, Any] | None = None
        self.tokens = 0
        self.clock_s = time.monotonic()

    def add(self, i: int, metrics: Any, batch: dict[str, np.ndarray]) -> None:
        """Read the update before `i`, and keep the metrics of `i` for the next call."""
        self.flush()
        self.pending = (i, metrics)
        if i == 1:
            # The first update includes the compile, so it is waited for, shown at once, and not timed.
            self.flush()
            self.tokens, self.clock_s = 0, time.monotonic()
        else:
            self.tokens += self.run.data.samples["train"].n_tokens(batch)

    def flush(self) -> None:
        """Read what is pending; log it if its turn has come."""
        if self.pending is None:
            return
        (i, metrics), self.pending = self.pending, None
        train = self.run.config.train
        if i != 1 and i % train.log_interval and i != train.max_steps:
            return
        metrics = self.read(metrics)
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
        self.show(i, f"loss {row['loss']:.3f}  rate {row['rate']:.2e}{speed}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take what happens inside out of the speed."""
        paused_s = time.monotonic()
        yield
        self.clock_s += time.monotonic() - paused_s


class FileWatch:
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
def interrupts() -> Iterator[Callable[[], bool]]:
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


def _announce(
    config: Config,
    origins: dict[str, str],
    data: prepare.Data,
    run_dir: Path,
    device: str,
    unused: set[str],
    run_log: RunLog,
) -> None:
    """Print what is about to run, and where each value that is no default came from."""
    run_log.say(f"run     {run_dir}")
    run_log.say(f"data    {data.source.description}")
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in data.samples.items())
    run_log.say(f"samples {sizes}; of {config.model.seq_len} tokens, vocabulary {config.model.vocab_size:,}")
    run_log.say(f"device  {device}")
    for name, origin in origins.items():
        if configs.get(config, name) != configs.get(Config(), name):
            run_log.say(f"  {name} = {configs.get(config, name)!r}  ({origin})")
    for note in data.notes:
        run_log.say(f"note: {note}")
    for line in configs.warnings(config, origins, unused):
        run_log.warn(line)


def _number(x: float) -> str:
    return f"{x:.4f}" if abs(x) < 100 else f"{x:,.0f}"


def tell_scores(run: Run, i: int, totals: Any) -> metrics.Scores:
    """Log and print the scores of the validation part after update `i`, and return them."""
    scores = run.task.scores(totals)
    run.log.row(i, "validation", scores)
    run.log.say(f"step {i}  validation: " + "  ".join(f"{name} {_number(x)}" for name, x in scores.items()))
    if warning := run.task.warning(totals):
        run.log.warn(warning)
    return scores


def shown_samples(run: Run, multiple: int) -> Batch:
    """Return the validation samples of the debug dump, spread over the part; their number is one of `multiple`."""
    samples = run.data.samples["validation"]
    n_rows = -(-N_SHOWN // multiple) * multiple
    indices = np.linspace(0, len(samples) - 1, n_rows).astype(int)
    return samples.batch(indices, np.zeros_like(indices))


def sum_up(run: Run, best: int | None, n_parameters: int, evaluate: Callable[[str], Any], is_interrupted: bool) -> None:
    """Score the best checkpoint, the test part for the only time, and print the summary.

    `evaluate` returns the totals of a split; it is not called after an interrupt or if nothing was evaluated.
    """
    columns: dict[str, metrics.Scores] = {}
    for split in ("validation", "test") if best is not None and not is_interrupted else ():
        samples = run.data.samples[split]
        if len(samples) and not (split == "test" and run.data.source.test_refusal):
            totals = evaluate(split)
            columns[split] = run.task.scores(totals)
            columns[f"{split} baseline"] = run.task.baseline(samples)
            if warning := run.task.warning(totals):
                run.log.warn(f"{split}: {warning}")
    if best is not None and "test" in columns:
        run.log.row(best, "test", columns["test"])

    seconds = int(time.monotonic() - run.started_s)
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
        return f"{run.program} --config {run.dir / 'config.toml'} --run.dir NEW_FOLDER --train.max-steps 10000"
    own = "reviews.tsv" if run.task.samples.is_labelled else "your_text.txt"
    return f"{run.program} --task {run.config.task} --data.path {own}"
