"""What surrounds the training loop and knows no framework: the run folder, its words, its clock and its signals."""

import contextlib
import datetime
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jaxlm import config as configs
from jaxlm import log, metrics
from jaxlm.config import Config
from jaxlm.data import cache, prepare
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.samples import Batch
from jaxlm.errors import CLEANUPS, UserError
from jaxlm.log import RunLog

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
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
    validation: dict[int, metrics.Scores] = field(default_factory=dict)  # scores so far, by step


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

    def clean() -> None:
        remove_run_dir(run_dir, made)
        for path in cache.user_cache_dir(config.data.cache_dir).glob(f"*/*.{os.getpid()}.tmp"):
            _remove(path)
        run_log.console.show_cursor()  # which a progress bar hides

    if config.task not in tasks:
        raise UserError(f"task={config.task}: {program} has no such task; it has {', '.join(tasks)}")
    run_log = RunLog()
    log.check_loggers(config)
    run_dir, made = make_run_dir(config)
    CLEANUPS.append(clean)
    try:
        task_class = tasks[config.task]
        config, data = prepare.prepare(config, task_class.samples, task_class(config).embedded, run_log.bytes_bar)
        # Without its folder, which --config with this file could not use again.
        _write(run_dir / "config.toml", configs.dump(configs.replace(config, "run.dir", "")))
        tokenizers.save(data.tokenizer, run_dir / "tokenizer.json")
        run_log.open(run_dir, log.open_loggers(config, run_dir, settings(config)))
        used = task_class.settings
        unused = {name for task in tasks.values() for name in task.settings if name not in used}
        _announce(config, origins, data, run_dir, device, unused, run_log)
        yield Run(config, task_class(config), data, run_dir, run_log, started_s, program)
    except BaseException:
        clean()
        raise
    finally:
        CLEANUPS.remove(clean)


def make_run_dir(config: Config) -> tuple[Path, list[Path]]:
    """Make the run folder; return it, and the folders that were not there before, inner ones first.

    Raises UserError if it is in use or cannot be made.
    """
    try:
        if config.run.dir:
            path = Path(config.run.dir)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(
                    f"run.dir={path}: there is a run or another file already; give a new folder, or remove this one"
                )
            return path, _make(path)
        name = f"{config.task}-{datetime.date.today():%Y%m%d}"
        for n in range(1, 10_000):
            path = Path("runs") / f"{name}-{n}"
            with contextlib.suppress(FileExistsError):
                if made := _make(path):
                    return path, made
    except OSError as error:
        folder = config.run.dir or path
        raise UserError(
            f"run.dir={folder}: cannot be written ({error.strerror}); give another with --run.dir"
        ) from error
    raise UserError(f"runs/{name}-*: there are too many runs; give a folder with --run.dir")


def _make(path: Path) -> list[Path]:
    """Make a folder unless it is there, and return those that were not there before, inner ones first."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    if made:
        path.mkdir(parents=True)  # raises FileExistsError if another process has just made it
    return made


def remove_run_dir(path: Path, made: list[Path]) -> None:
    """Empty the folder of a run that did not start, and remove the folders made for it."""
    for child in path.iterdir():
        _remove(child)
    for folder in made:
        with contextlib.suppress(OSError):  # another run has begun beside it
            folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space, or give another folder with --run.dir"
        ) from error


def settings(config: Config) -> dict[str, Any]:
    """Return {dotted name: value} of every setting."""
    return {name: configs.get(config, name) for name in configs.SETTINGS}


class Meter:
    """Reads the metrics of updates one update late, and makes rows of them every train.log_interval updates.

    `read` copies metrics from the device and waits for them; `show` is told each update, and a text where there is one.
    """

    def __init__(self, run: Run, read: Callable[[Any], dict[str, Any]], show: Callable[[int, str], None]):
        self.run, self.read, self.show = run, read, show
        self.pending: tuple[int, Any] | None = None
        self.last_row = 0
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
            self.show(i, "")

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
        _check_finite(self.run, scores["loss"], i, self.last_row)
        self.last_row = i
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
        self.show(i, f"loss {_number('loss', row['loss'])}  rate {row['rate']:.2e}{speed}")

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
def interrupts(run_log: RunLog) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, which the yielded function returns; the second one ends the process at once.

    A thread looks out for them, because Python's own handlers have to wait while a step is compiled or computed.
    """
    seen = threading.Event()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        with receiver:
            while number := receiver.recv(1):
                if number[0] != signal.SIGINT:
                    continue
                if seen.is_set():
                    run_log.console.show_cursor()  # which a progress bar hides
                    print("interrupted again: ended at once", file=sys.stderr, flush=True)
                    os._exit(130)
                seen.set()
                run_log.say("interrupted: saving a checkpoint after this update; Ctrl-C again ends at once")

    threading.Thread(target=watch, daemon=True).start()
    handler_before = signal.signal(signal.SIGINT, lambda number, frame: None)
    receiver_before = signal.set_wakeup_fd(sender.fileno())
    try:
        yield seen.is_set
    finally:
        signal.set_wakeup_fd(receiver_before)
        signal.signal(signal.SIGINT, handler_before)
        sender.close()


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
            if Path(origin).parent == configs.presets_dir():
                origin = f"preset {origin}"
            run_log.say(f"  {name} = {configs.get(config, name)!r}  ({origin})")
    for note in data.notes:
        run_log.say(f"note: {note}")
    for line in configs.warnings(config, origins, unused):
        run_log.warn(line)


def _check_finite(run: Run, loss: float, step: int, last_finite: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"train.learning_rate={run.config.train.learning_rate}: the loss is {loss} at step {step}, and was finite "
            f"at step {last_finite}; lower the rate, or raise train.warmup_steps ({run.dir} is kept)"
        )


def _number(name: str, x: float) -> str:
    return f"{x:,.1f}" if name == "perplexity" else f"{x:.4f}"


def tell_scores(run: Run, i: int, totals: Any) -> metrics.Scores:
    """Log and print the scores of the validation part after update `i`, and return them."""
    scores = run.task.scores(totals)
    _check_finite(run, scores["loss"], i, max(run.validation, default=0))
    run.validation[i] = scores
    run.log.row(i, "validation", scores)
    run.log.say(f"step {i}  validation: " + "  ".join(f"{name} {_number(name, x)}" for name, x in scores.items()))
    if warning := run.task.warning(totals):
        run.log.warn(warning)
    return scores


def shown_samples(run: Run, multiple: int) -> Batch:
    """Return the validation samples of the debug dump, spread over the part; their number is one of `multiple`."""
    samples = run.data.samples["validation"]
    n_rows = -(-N_SHOWN // multiple) * multiple
    indices = np.linspace(0, len(samples) - 1, n_rows).astype(int)
    return samples.batch(indices, np.zeros_like(indices))


def has_test(run: Run) -> bool:
    """Return whether there is a test part, with labels."""
    return len(run.data.samples["test"]) > 0 and not run.data.source.test_refusal


def sum_up(run: Run, last: int, best: int | None, n_parameters: int, test_totals: Any, is_interrupted: bool) -> None:
    """Print the summary of a run that ended after update `last`.

    `test_totals` are those of the checkpoint of step `best`; None if it was not tested.
    """
    n_updates = run.config.train.max_steps
    seconds = int(time.monotonic() - run.started_s)
    ending = "interrupted" if is_interrupted else "finished" if last == n_updates else "stopped"
    run.log.say("")
    run.log.say(
        f"{run.config.task} {ending} after {seconds // 60} min {seconds % 60} s: {last:,} of {n_updates:,} updates of "
        f"{n_parameters:,} parameters, on {run.data.source.description}"
    )
    if best is None:
        run.log.say("There are no scores: the run ended before its first evaluation.")
    else:
        _tell_result(run, best, test_totals)
    run.log.say(f"\nEverything is in {run.dir}:")
    kept = {None: f"step {last}", last: f"step {last}, the best and the last"}
    for name, what in (
        ("checkpoints", kept.get(best, f"step {best}, the best, and step {last}, the last")),
        ("config.toml", "all settings; a new run of the same: --config with this file"),
        ("metrics.jsonl", "scores by step, one JSON object a line"),
        ("samples.txt", "what the model made of some validation samples, by step"),
        ("log.txt", "what is printed here; tokenizer.json is the tokenizer"),
    ):
        run.log.say(f"  {name:<14} {what}")
    run.log.say(f"Next, {_next_command(run)}")


def _tell_result(run: Run, best: int, test_totals: Any) -> None:
    """Print the scores of the best checkpoint beside the baseline, and log those of the test part."""
    scores = {"validation": run.validation[best]}
    if test_totals is not None:
        scores["test"] = run.task.scores(test_totals)
        run.log.row(best, "test", scores["test"])
        if warning := run.task.warning(test_totals):
            run.log.warn(f"test: {warning}")
    baselines = {split: run.task.baseline(run.data.samples[split]) for split in scores}
    title = f"scores of step {best}, the best by validation loss; baseline: {run.task.baseline_name}"
    table = Table("", *(column for split in scores for column in (split, "baseline")), title=title, title_style="")
    for name in scores["validation"]:
        pairs = ((scores[split][name], baselines[split][name]) for split in scores)
        better = "lower" if name in LOWER_IS_BETTER else "higher"
        table.add_row(f"{name} ({better} is better)", *(_number(name, x) for pair in pairs for x in pair))
    run.log.say(table)
    if not scores["validation"]["loss"] < baselines["validation"]["loss"]:
        run.log.say("The model is no better than the baseline yet: it needs more updates, or other settings.")
    if run.data.source.test_refusal:
        run.log.say(run.data.source.test_refusal)


def _next_command(run: Run) -> str:
    again = f"{run.program} --config {shlex.quote(str(run.dir / 'config.toml'))}"
    if run.config.data.path or run.config.data.hub:
        return f"train for longer: {again} --train.max-steps {2 * run.config.train.max_steps}"
    own = "reviews.tsv" if run.task.samples.is_labelled else "your_text.txt"
    return f"train on a file of yours: {run.program} --task {run.config.task} --data.path {own}"
