"""What surrounds the training loop and knows no framework: the run folder, its words, its clock and its signals."""

import contextlib
import datetime
import fcntl
import functools
import importlib.metadata
import itertools
import json
import math
import os
import shlex
import signal
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from rich.table import Table

from jaxlm import checksums, environment, formats, history, log, metrics, storage, temporary
from jaxlm import config as configs
from jaxlm import start as starts
from jaxlm import teacher as teachers
from jaxlm.config import Config
from jaxlm.data import cache, prepare, sources
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.position import Position
from jaxlm.data.samples import Batch
from jaxlm.errors import CLEANUPS, UserError, signals, slow
from jaxlm.log import RunLog
from jaxlm.start import DAMAGED, LOCK, SAVED, Start
from jaxlm.teacher import Teacher

N_SHOWN = 4  # validation samples of the debug dump
N_CLASSES = 30  # that are shown at the start
MOST_ROLLBACKS = 10  # to one checkpoint
SPIKE, SPIKE_WINDOW = 10, 50  # a gradient norm so many times the median of so many updates is told
UNSAVED = 1  # exit status of a run whose last state could not be saved
FILE_CHECK_S = 1.0  # between looks for the files `stop` and `save_checkpoint`
T = TypeVar("T")
# All that a run without a checkpoint writes into its folder; what else is there is the user's.
OWN = (
    *(*history.FILES, "config.toml", "tokenizer.json", "log.txt", environment.FILE, history.BASELINE, SAVED),
    *("tensorboard", "wandb", "trace", "stop", "save_checkpoint"),
)


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
    start: Start = Start()
    rewarmed: tuple[int, float] | None = None  # the update at which a re-warmup begins, and the rate before it
    lock: TextIO | contextlib.ExitStack | None = None  # of the run folder and its checkpoints, until this is closed
    validation: dict[int, metrics.Scores] = field(default_factory=dict)  # scores so far, by step
    skipped: list[int] = field(default_factory=list)  # updates that were no numbers and were not made
    undo: list[Callable[[], None]] = field(default_factory=list)  # what removes the folder; empty from update 1 on

    @functools.cached_property
    @slow("reading the teacher")
    def teacher(self) -> Teacher | None:
        """The model to learn from, read at first use: by all processes at a time, as Orbax wants it."""
        if self.start.teacher is None:
            return None
        is_same = self.start.kind == "resume"
        return teachers.load(self.start.teacher, self.start.info.get("teacher", "") if is_same else "")

    @functools.cached_property
    @slow("scoring the baselines")
    def baselines(self) -> dict[str, metrics.Scores]:
        """The scores of the best guess that looks at no input, of each split that is scored."""
        splits = ("validation", *(["test"] if has_test(self) else []))
        return {split: self.task.baseline(self.data.samples[split]) for split in splits}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close the loggers, and let go of the run folder; remove it after an error before the first update."""
        if exception[0] is not None and self.undo:
            self.undo[0]()
        else:
            self.log.close()
        if self.lock is not None:
            self.lock.close()

    def losses(self) -> dict[int, float]:
        """Return the validation losses so far, by step."""
        return {step: scores["loss"] for step, scores in self.validation.items()}


@contextlib.contextmanager
def started(
    config: Config,
    origins: dict[str, str],
    start: Start,
    tasks: dict[str, Any],
    device: str,
    started_s: float,
    program: str = "python -m jaxlm.train",
) -> Iterator[Run]:
    """Make the run folder, prepare the data, and tell what is about to run; `tasks` are the task classes by name.

    Raises UserError for bad input. Then, or if anything inside the `with` block raises, or in that of the Run before
    its first update, the run folder is removed; one in which a run goes on stays as it was, but for rows past its
    checkpoint.
    """

    def clean() -> None:
        if made or not start.is_retry and not start.run_dir:
            remove_run_dir(run_dir, made)
            for path in place_made:
                storage.remove(path) if path.name == LOCK else _remove_empty([path])
        elif is_emptied:
            empty_run_dir(run_dir)
        temporary.remove(cache.user_cache_dir(config.data.cache_dir), temporary.is_own)
        run_log.console.show_cursor()  # which a progress bar hides

    if config.task not in tasks:
        raise UserError(f"task={config.task}: {program} has no such task; it has {', '.join(tasks)}")
    run_log = RunLog()
    log.check_loggers(config)
    run_dir, made = make_run_dir(config, start)
    is_emptied = False
    place = storage.checkpoints(run_dir, config.run.checkpoint_dir)
    place_made: list[Path] = []
    held = contextlib.ExitStack()
    try:
        held.enter_context(lock(run_dir))  # before anything in the folder is touched, which may be another process's
    except UserError:
        _remove_empty(made)
        raise
    CLEANUPS.append(clean)
    try:
        place_made += _lock_checkpoints(held, run_dir, config.run.checkpoint_dir)
        task_class = tasks[config.task]
        config, data = prepare.prepare(
            config, task_class.samples, task_class(config).embedded, run_log.bytes_bar, start.known_classes()
        )
        start.check(data)
        if start.teacher:
            start.teacher.check(data)
        _set_aside(start, place, run_dir, run_log)
        if start.is_retry:
            is_emptied = True
            empty_run_dir(run_dir)
        if not start.run_dir:
            _write(run_dir / SAVED, _saved(0))
        else:
            record_saved(run_dir, start.position().step)
        _write_settings(run_dir, config, data)
        loggers = log.open_loggers(config, run_log, run_dir, configs.flat(config), start.position().step)
        run_log.open(run_dir, loggers)
        validation = history.restore(start, run_dir, run_log.warn)
        used = task_class.settings
        unused = {name for task in tasks.values() for name in task.settings if name not in used}
        rewarmed = start.rewarmed(config.train)
        _announce(config, origins, start, rewarmed, data, run_dir, device, unused, run_log)
        run_log.append(environment.FILE, json.dumps(environment.describe(start.position().step, device)) + "\n")
        task = task_class(config, data.source.classes)
        this = Run(config, task, data, run_dir, run_log, started_s, program, start, rewarmed, held, validation)
        this.undo.append(clean)
        _write(run_dir / history.BASELINE, _recorded(this))
        yield this
    except BaseException:
        clean()
        held.close()
        raise
    finally:
        CLEANUPS.remove(clean)


def make_run_dir(config: Config, start: Start) -> tuple[Path, list[Path]]:
    """Make the run folder; return it, and the folders that were not there before, inner ones first.

    Raises UserError if it is in use or cannot be made.
    """
    if config.run.checkpoint_dir and not start.run_dir:
        if checksums.finished_in(storage.path(config.run.checkpoint_dir)):
            raise UserError(
                f"run.checkpoint_dir={config.run.checkpoint_dir}: there are checkpoints of a run already; "
                "go on with it by --resume auto, or give a new folder"
            )
    try:
        if config.run.dir:
            path = Path(config.run.dir)
            if start.run_dir or (start.is_retry and path.is_dir() and _is_of_a_run(path)):
                return path, _make(path)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                is_run = path.is_dir() and _is_of_a_run(path)
                mend = "go on with it by --resume auto, or give a new folder" if is_run else "give a new folder"
                raise UserError(f"run.dir={path}: there is a run or another file already; {mend}, or remove this one")
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


def _is_of_a_run(path: Path) -> bool:
    return (path / LOCK).exists()


def lock(run_dir: Path) -> TextIO:
    """Return the lock of a run folder; the system lets go of it when it is closed or the process ends, however it does.

    Raises UserError, with the host and the process that has it, if it is taken.
    """
    try:
        return _lock(run_dir, "run.dir")
    except OSError as error:
        raise UserError(
            f"run.dir={run_dir}: cannot be written ({error.strerror}); give another with --run.dir"
        ) from error


def _lock(folder: Path, setting: str) -> TextIO:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{setting}={folder}: {owner} works in it; wait for it or stop it, or give another folder"
            ) from error
        file.truncate(0)
        with contextlib.suppress(OSError):  # on a full disk, it is locked without a name
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        stack.pop_all()
        return file


def _lock_checkpoints(held: contextlib.ExitStack, run_dir: Path, named: str) -> list[Path]:
    """Lock the folder of checkpoints `named`, where the disk allows it; return what was made: its lock, and folders.

    Raises UserError if another run works in it: each would remove what the other has not yet finished.
    """
    made: list[Path] = []
    if named and not storage.is_remote(named):
        folder = Path(named)
        with contextlib.suppress(OSError):  # a disk without locks, or one that cannot be written: the first save warns
            made = _make(folder)
            if not folder.samefile(run_dir):
                made = made if (folder / LOCK).exists() else [folder / LOCK, *made]
                held.enter_context(_lock(folder, "run.checkpoint_dir"))
    return made


def empty_run_dir(path: Path) -> None:
    """Remove what a run without a checkpoint has left; the user's own files stay."""
    for name in OWN:
        storage.remove(path / name)


def _set_aside(start: Start, folder: Path, run_dir: Path, run_log: RunLog) -> None:
    """Give damaged checkpoints of the run that goes on another name; and those without their checksums.

    Of the latter, a save of this run that was killed is left out: it is later than the last that was recorded.
    """
    saved = starts.last_saved(run_dir) if (run_dir / SAVED).is_file() else sys.maxsize
    lost = [x for x in storage.children(folder) if x.name.isdecimal() and int(x.name) <= saved]
    lost_why = f"{checksums.FILE} is missing"
    for path, what in (*start.damaged, *((x, lost_why) for x in lost if checksums.is_cut_short(x))):
        if storage.absolute(path.parent) == storage.absolute(folder):
            names = (path.with_name(f"{path.name}{DAMAGED}{n or ''}") for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            try:
                path.rename(aside)
            except Exception as error:  # of a disk or a network that fails
                raise UserError(
                    f"{path}: damaged: {what}, and cannot be set aside ({formats.reason(error)}); move or remove it"
                ) from error
            what += f"; it is set aside as {aside.name}"
        run_log.warn(f"{path}: damaged: {what}")


def _make(path: Path) -> list[Path]:
    """Make a folder unless it is there, and return those that were not there before, inner ones first."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    if made:
        path.mkdir(parents=True)  # raises FileExistsError if another process has just made it
    return made


def remove_run_dir(path: Path, made: list[Path]) -> None:
    """Empty the folder of a run that did not start, and remove the folders made for it."""
    empty_run_dir(path)
    storage.remove(path / LOCK)
    _remove_empty([path / "checkpoints", *made])


def record_saved(run_dir: Path, step: int) -> None:
    """Record the step of the last whole checkpoint in a run folder: the run does not begin anew if none is found."""
    with contextlib.suppress(OSError, UserError):  # of a full disk; the next save tries again
        _write(run_dir / SAVED, _saved(step))


def _saved(step: int) -> str:
    return json.dumps({"step": step}) + "\n"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # another run has begun beside it
            folder.rmdir()


def _write_settings(run_dir: Path, config: Config, data: prepare.Data) -> None:
    """Write what it takes to use the checkpoints of a run. Raises UserError if it cannot be written."""
    _write(run_dir / "config.toml", configs.dump(config))
    _write(run_dir / "tokenizer.json", data.tokenizer.to_str())


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_bytes() == text.encode():  # a run goes on, maybe on a full disk
        return
    try:
        temporary.replace_text(path, text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space, or give another folder with --run.dir"
        ) from error


def _recorded(run: Run) -> str:
    """Return the JSON of baseline.json."""
    scores = {
        split: {name: x if math.isfinite(x) else None for name, x in baseline.items()}
        for split, baseline in run.baselines.items()
    }
    told = {"name": run.task.baseline_name, "lower_is_better": run.task.lower_is_better, **scores}
    return json.dumps(told, indent=2) + "\n"


class Meter:
    """Reads the metrics of updates one update late, and makes rows of them every train.log_interval updates.

    `read` copies metrics from the device and waits for them; `show` is told each update, and a text where there is one.
    `peak_flops` is what the devices together can do in a second; 0: not known.
    """

    def __init__(
        self,
        run: Run,
        read: Callable[[Any], dict[str, Any]],
        show: Callable[[int, str], None],
        peak_flops: float = 0.0,
    ):
        self.run, self.read, self.show, self.peak_flops = run, read, show, peak_flops
        self.pending: tuple[int, Any] | None = None
        self.is_first = True
        self.last_finite = 0
        self.norms: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.tokens, self.flops = 0, 0
        self.clock_s = time.monotonic()

    def add(self, i: int, metrics: Any, n_tokens: int, n_flops: int) -> int:
        """Read the update before `i`, and keep the metrics of `i` for the next call; return what `flush` does.

        Update `i` is of `n_tokens` that are no padding.
        """
        bad = self.flush()
        self.pending = (i, metrics)
        if self.is_first:
            # The first update includes the compile, so it is waited for, shown at once, and not timed.
            bad = self.flush()
            self.tokens, self.flops, self.clock_s, self.is_first = 0, 0, time.monotonic(), False
        else:
            self.tokens += n_tokens
            self.flops += n_flops
            self.show(i, "")
        return bad

    def flush(self) -> int:
        """Read what is pending, and log it if its turn has come.

        Returns the update from which the run has to be rolled back because its loss or gradient is no number, else 0.
        """
        if self.pending is None:
            return 0
        (i, metrics), self.pending = self.pending, None
        train = self.run.config.train
        metrics = self.read(metrics)
        self.run.undo.clear()
        scores, norm = self.run.task.scores(metrics), float(metrics["grad_norm"])
        is_finite = math.isfinite(scores["loss"]) and math.isfinite(norm)
        if not is_finite:
            if train.on_nonfinite == "rollback":
                return i
            self._not_finite(i, scores["loss"], norm)
        else:
            self.last_finite = i
            self._watch_norm(i, norm)
        if self.is_first:
            seconds = time.monotonic() - self.run.started_s
            self.run.log.say(f"first update done {seconds:.1f} s after the start")
        if i == 1 or i % train.log_interval == 0 or i == train.max_steps:
            self._log(i, scores, float(metrics["rate"]), norm)
        return 0

    def forget(self) -> None:
        """Drop what is pending: the run is rolled back."""
        self.pending = None
        self.norms.clear()

    def _log(self, i: int, scores: metrics.Scores, rate: float, norm: float) -> None:
        row: dict[str, float] = {name: scores[name] for name in ("loss", "accuracy") if name in scores}
        row |= {"rate": rate, "grad_norm": norm}
        speed = ""
        if not self.is_first:
            seconds = max(time.monotonic() - self.clock_s, 1e-9)
            row["tokens_per_s"] = self.tokens / seconds
            speed = f"  {row['tokens_per_s']:,.0f} tokens/s"
            if self.peak_flops:
                row["mfu"] = self.flops / seconds / self.peak_flops
                speed += f"  {row['mfu']:.1%} of peak flops"
            self.tokens, self.flops, self.clock_s = 0, 0, time.monotonic()
        self.run.log.row(i, "train", row)
        self.show(i, f"loss {metrics.number('loss', row['loss'])}  rate {row['rate']:.2e}{speed}")

    def _not_finite(self, i: int, loss: float, norm: float) -> None:
        """Tell of an update that is no number. Raises UserError if the run is to stop."""
        if self.run.config.train.on_nonfinite == "stop":
            raise diverged(self.run, loss if not math.isfinite(loss) else norm, i, self.last_finite)
        self.run.skipped.append(i)
        self.run.log.warn(f"step {i}: the loss is {loss} and the gradient norm {norm}: this update is skipped")

    def _watch_norm(self, i: int, norm: float) -> None:
        if len(self.norms) == SPIKE_WINDOW and norm > SPIKE * (usual := statistics.median(self.norms)) > 0:
            self.run.log.warn(
                f"step {i}: the gradient norm, {norm:.3g}, is {norm / usual:,.0f} times the median of the last "
                f"{SPIKE_WINDOW} updates"
            )
        self.norms.append(norm)

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
        self.stuck: set[str] = set()  # files that cannot be removed

    def take(self, name: str) -> bool:
        """Return whether the file is there, and remove it; looks at most once a second."""
        now = time.monotonic()
        if now - self.looked_s.get(name, 0.0) < FILE_CHECK_S:
            return False
        self.looked_s[name] = now
        path = self.folder / name
        if name in self.stuck or not os.path.lexists(path):
            return False
        try:
            path.unlink(missing_ok=True)
        except OSError:  # a folder, or a disk that can only be read: it counts once
            self.stuck.add(name)
        return True


@contextlib.contextmanager
def interrupts(run_log: RunLog) -> Iterator[Callable[[], int]]:
    """Turn the first SIGINT or SIGTERM into an exit status, which the yielded function returns; 0 before.

    The second one ends the process at once. A reader of the output that has gone counts as a signal, SIGPIPE.
    """
    status = 0

    def tell(number: int) -> None:
        nonlocal status
        if status:
            run_log.console.show_cursor()  # which a progress bar hides
            print("interrupted again: ended at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        status = 128 + number
        run_log.say("interrupted: saving a checkpoint after this update; once more ends at once")

    run_log.console.reader_gone = lambda: None if status else tell(signal.SIGPIPE)
    with signals(tell):
        yield lambda: status


def _announce(
    config: Config,
    origins: dict[str, str],
    start: Start,
    rewarmed: tuple[int, float] | None,
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
    if data.source.classes:
        labels = data.samples["train"].split.labels  # type: ignore[union-attr]
        counts = np.bincount(labels, minlength=len(data.source.classes))
        shown = [f"{name} ({n:,})" for name, n in zip(data.source.classes, counts, strict=True)]
        run_log.say(f"classes {sources.listed(shown, N_CLASSES)}")
    run_log.say(f"device  {device}")
    if start.teacher:
        n = start.teacher.config().model.n_layers
        run_log.say(f"teacher {start.teacher.path}, {n} layers; the loss of train is the weighted one of distill.*")
    if start.kind == "resume":
        step = start.info["step"]
        run_log.say(f"resumes {start.path}, after {step:,} updates and {start.info['sample_iter']:,} samples")
        for name, old, new in start.changes(config):
            run_log.say(f"  {name} = {new!r}, was {old!r}")
        if rewarmed:
            run_log.say(f"  the rate re-warms from {rewarmed[1]:.3e} for {config.train.rewarmup_steps} updates")
    for name, origin in origins.items():
        is_stored = start.kind == "resume" and origin == str(start.path)
        if configs.get(config, name) != configs.get(Config(), name) and not is_stored and name != "resume":
            if Path(origin).parent == configs.presets_dir():
                origin = f"preset {origin}"
            run_log.say(f"  {name} = {configs.get(config, name)!r}  ({origin})")
    for note in data.notes:
        run_log.say(f"note: {note}")
    for line in configs.warnings(config, origins, unused):
        run_log.warn(line)


def diverged(run: Run, value: float, step: int, last_finite: int) -> UserError:
    """Return the error that ends a run whose loss or gradient is no number; `last_finite` is 0 if none is known."""
    before = f"and was finite at step {last_finite}; lower the rate, raise train.warmup_steps"
    if not last_finite:
        before = "and was never finite before; see whether the weights at the start are, lower the rate"
    return UserError(
        f"train.learning_rate={run.config.train.learning_rate}: the loss or gradient is {value} at step {step}, "
        f"{before}, or see train.on_nonfinite ({run.dir} is kept)"
    )


def tell_scores(run: Run, i: int, totals: Any) -> None:
    """Log and print the scores of the validation part after update `i`, and keep them."""
    scores = run.task.scores(totals)
    if not math.isfinite(scores["loss"]):
        raise diverged(run, scores["loss"], i, max((at for at in run.validation if at < i), default=0))
    run.validation[i] = scores
    run.log.row(i, "validation", scores)
    shown = "  ".join(f"{name} {metrics.number(name, x)}" for name, x in scores.items())
    run.log.say(f"step {i}  validation: {shown}")
    if warning := run.task.warning(totals):
        run.log.warn(warning)


def shown_samples(run: Run, multiple: int) -> Batch:
    """Return the validation samples of the debug dump, spread over the part; their number is one of `multiple`."""
    samples = run.data.samples["validation"]
    n_rows = -(-N_SHOWN // multiple) * multiple
    indices = np.linspace(0, len(samples) - 1, n_rows).astype(int)
    return samples.batch(indices, np.zeros_like(indices))


def info(run: Run, i: int, position: Position, rate: float) -> dict[str, Any]:
    """Return what a checkpoint after update `i`, made with `rate`, tells of itself."""
    return {
        "step": i,
        "task": run.config.task,
        "rate": rate,
        "sample_iter": position.after(i - 1, run.config.train),
        "config": configs.flat(run.config),
        "tokenizer": tokenizers.fingerprint(run.data.tokenizer),
        "data": run.data.source.fingerprint,
        "classes": run.data.source.classes,
        "teacher": run.teacher.fingerprint if run.teacher else "",
        "rewarmed": run.rewarmed,
        "skipped": position.skipped,
        "version": importlib.metadata.version("jaxlm"),
    }


def identity(run: Run) -> dict[str, Any]:
    """Return what has to be the same in all processes of a run, once there are data."""
    return {
        "the data": run.data.source.fingerprint,
        "the tokenizer": tokenizers.fingerprint(run.data.tokenizer),
        "the teacher": run.teacher.fingerprint if run.teacher else "",
        "model.vocab_size": run.config.model.vocab_size,
    } | {f"the number of {split} samples": len(samples) for split, samples in run.data.samples.items()}


def step_to_roll_back_to(run: Run, saved: list[int], position: Position, bad: int) -> int:
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


def best_step(run: Run, last: int, saved: Iterable[int]) -> int | None:
    """Return the step with the lowest validation loss among those saved and the last one; None if none has one."""
    return starts.best({*saved, last}, run.losses())


def best_state(run: Run, last: int, saved: list[int], state: T, restore: Callable[[int, T], T]) -> T:
    """Return the state of `best_step`: restored, or that of the last update, `state`, where it is not saved.

    A checkpoint that is found damaged is removed from `saved`, and the next best is taken.
    """
    while (best := best_step(run, last, saved)) in saved:
        try:
            return restore(best, state)
        except UserError as error:
            run.log.warn(str(error))
            saved.remove(best)
    return state


def has_test(run: Run) -> bool:
    """Return whether there is a test part, with labels."""
    return len(run.data.samples["test"]) > 0 and not run.data.source.test_refusal


def sum_up(
    run: Run,
    last: int,
    saved: list[int],
    sizes: tuple[int, int],
    test_totals: Any,
    saves: str,
    is_interrupted: bool,
) -> bool:
    """Print the summary of a run that ended after update `last`; return whether that state is saved.

    `saved` are the steps that are on the disk, and `saves` is a line on them. `sizes` are the numbers of all
    parameters, and of those that are trained. `test_totals` are those of `best_step`; None if it was not tested.
    """
    n_updates = run.config.train.max_steps
    seconds = int(time.monotonic() - run.started_s)
    n_parameters, n_trained = sizes
    share = f", {n_trained:,} of them trained" if n_trained < n_parameters else ""
    ending = "interrupted" if is_interrupted else "finished" if last == n_updates else "stopped"
    run.log.say("")
    run.log.say(
        f"{run.config.task} {ending} after {seconds // 60} min {seconds % 60} s: {last:,} of {n_updates:,} updates of "
        f"{n_parameters:,} parameters{share}, on {run.data.source.description}"
    )
    folder = run.config.run.checkpoint_dir or run.dir / "checkpoints"
    best, lowest = best_step(run, last, saved), starts.best(run.validation, run.losses())
    if lowest is None:
        run.log.say("There are no scores: the run ended before its first evaluation.")
    else:
        _tell_result(run, lowest if best is None else best, test_totals)
        if lowest not in saved:
            loss = metrics.number("loss", run.losses()[lowest])
            run.log.say(f"Step {lowest:,} has the lowest validation loss, {loss}, but no checkpoint in {folder}.")
    if run.skipped:
        run.log.say(f"{len(run.skipped)} updates were skipped, since they were no numbers: {_some(run.skipped)}")
    run.log.say(saves)
    if saved:
        try:
            _write_settings(run.dir, run.config, run.data)  # someone may have removed them
        except UserError as error:
            run.log.warn(str(error))
    run.log.flush()
    files = [
        ("config.toml", "all settings; a new run of the same: --config with this file"),
        ("tokenizer.json", "the tokenizer"),
        ("metrics.jsonl", "scores by step, one JSON object a line"),
        ("samples.txt", "what the model made of some validation samples, by step"),
        ("log.txt", "what is printed here"),
    ]
    files = [(name, what) for name, what in files if (run.dir / name).is_file()]
    if saved:
        files.insert(0, (run.config.run.checkpoint_dir or "checkpoints", _steps(saved, best, last)))
    run.log.say(f"\nEverything is in {run.dir}:" if files else f"\nNothing is left in {run.dir}.")
    unwritten = run.log.unwritten()
    for name, what in files:
        run.log.say(f"  {name:<14} {what}" + (f"; {unwritten[name]}" if name in unwritten else ""))
    where = shlex.quote(str(run.dir))
    if saved:
        run.log.say(f"Use it: python -m jaxlm.predict --checkpoint {where}; see it: python -m jaxlm.report {where}")
    if last in saved:
        go_on = f"go on with it: {run.program} --resume {where}"
        run.log.say(f"Next, {go_on if last < n_updates else _next_command(run)}")
        return True
    settings = f" --config {shlex.quote(str(run.dir / 'config.toml'))}" if (run.dir / "config.toml").is_file() else ""
    elsewhere = f"{run.program}{settings} --run.dir NEW --run.checkpoint-dir FOLDER"
    if saved:
        elsewhere = f"{run.program} --resume {where} --run.dir NEW, which goes on from step {saved[-1]:,}"
    run.log.warn(
        f"{folder}: the weights of step {last:,} are not saved; free some space, or save elsewhere: {elsewhere}",
        "error",
    )
    return False


def _steps(saved: list[int], best: int | None, last: int) -> str:
    """Return a list of the steps that are on the disk, with the best and the last marked."""
    notes = {last: ["the last"]}
    if best is not None:
        notes[best] = ["the best"] if best != last else ["the best and the last"]
    texts = [", ".join([f"step {step}", *notes.get(step, [])]) for step in saved]
    return ", and ".join(texts) if len(texts) == 2 else "; ".join(texts)


def _tell_result(run: Run, best: int, test_totals: Any) -> None:
    """Print the scores of the best checkpoint beside the baseline, and log those of the test part."""
    scores = {"validation": run.validation[best]}
    if test_totals is not None:
        scores["test"] = run.task.scores(test_totals)
        run.log.row(best, "test", scores["test"])
        if warning := run.task.warning(test_totals):
            run.log.warn(f"test: {warning}")
    baselines = run.baselines
    title = f"scores of step {best}, the best by validation loss"
    if min(run.losses().values()) < run.losses()[best]:
        title += " of those that are left"
    title += f"; baseline: {run.task.baseline_name}"
    table = Table("", *(column for split in scores for column in (split, "baseline")), title=title, title_style="")
    for name in baselines["validation"]:
        if any(name not in x for x in scores.values()):  # of a checkpoint whose row in the log was lost
            continue
        pairs = ((scores[split][name], baselines[split][name]) for split in scores)
        better = "lower" if name in run.task.lower_is_better else "higher"
        table.add_row(f"{name} ({better} is better)", *(metrics.number(name, x) for pair in pairs for x in pair))
    run.log.say(table)
    if not baselines["validation"]["loss"] > 0:
        run.log.say("The baseline is never wrong on validation, whose samples have one answer: scores say little.")
    elif not scores["validation"]["loss"] < baselines["validation"]["loss"]:
        run.log.say("The model is no better than the baseline by loss: try more updates, or other settings.")
    if run.data.source.test_refusal:
        run.log.say(run.data.source.test_refusal)


def _some(steps: list[int], most: int = 10) -> str:
    return ", ".join(map(str, steps[:most])) + (" ..." if len(steps) > most else "")


def _next_command(run: Run) -> str:
    again = f"{run.program} --config {shlex.quote(str(run.dir / 'config.toml'))}"
    if run.config.run.checkpoint_dir:
        again += " --run.checkpoint-dir NEW"
    if run.config.data.path or run.config.data.hub:
        return f"train for longer: {again} --train.max-steps {2 * run.config.train.max_steps}"
    own = {"text": "your_text.txt", "labels": "reviews.tsv", "pairs": "questions.jsonl"}[run.task.samples.reads]
    return f"train on a file of yours: {run.program} --task {run.config.task} --data.path {own}"
