"""Console output, log files and progress bars of a run; TensorBoard and Weights & Biases."""

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import socket
import stat
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.errors import SLOW_S, UserError
from jaxlm.io.console import Console
from jaxlm.terminal import shown

LEAST_BAR = 8  # columns of a progress bar in a narrow terminal; more text beside it is cut
PLAIN_INTERVAL_S = 5  # between progress lines of training, without a terminal
PASS_INTERVAL_S = 30  # between progress lines of a pass over data, without a terminal
MOST_WAITING = 32 << 20  # bytes buffered for one file that cannot be written


class TensorBoard:
    """Writes an event file. On a full disk, tensorboardX's own writer stops for good or blocks."""

    def __init__(self, append: Callable[[str, bytes], None], last_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.append = append
        self.name = f"tensorboard/events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.header = [Event(file_version="brain.Event:2")]
        if last_step:  # makes TensorBoard drop later steps, which the run logged before it resumed
            self.header.append(Event(step=last_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, split: str, scores: dict[str, float]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        event = Event(step=step)
        event.summary.value.extend(summary.scalar(f"{split}/{name}", x).value[0] for name, x in scores.items())
        for record in (*self.header, event):
            record.wall_time = time.time()
            self.append(self.name, _framed(record.SerializeToString()))
        self.header = []

    def close(self) -> None: ...


def _framed(data: bytes) -> bytes:
    """Return a record of an event file: length and data, each with its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


class WeightsAndBiases:
    """Logs a run to a Weights & Biases project."""

    def __init__(self, project: str, run_dir: Path, settings: dict[str, Any]):
        import wandb

        try:
            self.run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=settings)
        except wandb.errors.Error as error:  # no account, no network
            raise UserError(f"log.wandb={project}: {error}; or set WANDB_MODE=offline") from error
        # An axis of our own: wandb's step must not decrease, but test scores, logged last, belong to an earlier step.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, split: str, scores: dict[str, float]) -> None:
        self.run.log({f"{split}/{name}": value for name, value in scores.items()} | {"step": step})

    def close(self) -> None:
        self.run.finish()


Logger = TensorBoard | WeightsAndBiases


class GrowingFile:
    """A file to append to. If it cannot be written, text waits in memory for the next attempt.

    At most MOST_WAITING bytes wait; then the oldest pieces are dropped and counted.
    """

    def __init__(self, path: Path):
        self.path = path
        self.waiting: deque[tuple[int, bytes]] = deque()  # (update, piece)
        self.n_bytes = self.n_dropped = 0
        self.reason = "too many"  # why the last write failed
        with contextlib.suppress(OSError):  # an unreadable file may still be writable
            if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):  # an incomplete line of a killed process
                self.add(0, b"\n")

    def add(self, step: int, piece: bytes) -> None:
        """Queue a piece of text that belongs to update `step`."""
        self.waiting.append((step, piece))
        self.n_bytes += len(piece)
        while self.n_bytes > MOST_WAITING:
            self.n_bytes -= len(self.waiting.popleft()[1])
            self.n_dropped += 1

    def drop_after(self, step: int) -> None:
        """Drop queued pieces of later updates."""
        self.waiting = deque(x for x in self.waiting if x[0] <= step)
        self.n_bytes = sum(len(piece) for _, piece in self.waiting)

    def flush(self) -> bool:
        """Write the queued pieces, each completely or not at all; return whether all are written."""
        try:
            if self.waiting:
                self._write()
        except OSError as error:
            self.reason = error.strerror or type(error).__name__
        return not self.waiting

    def _write(self) -> None:
        if self.path.parent.name == "tensorboard":
            self.path.parent.mkdir(exist_ok=True)
        # Without O_NONBLOCK, a named pipe without a reader would block the run.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            while self.waiting:
                _write_whole(file, self.waiting[0][1])
                self.n_bytes -= len(self.waiting.popleft()[1])
        finally:
            os.close(file)

    def unwritten(self) -> str:
        """Return how many pieces are not written, and why; "" if all are."""
        n = len(self.waiting) + self.n_dropped
        return f"{n:,} {'entry' if n == 1 else 'entries'} not written ({self.reason})" if n else ""


def _write_whole(file: int, piece: bytes) -> None:
    before = os.fstat(file)
    try:
        while piece:
            piece = piece[os.write(file, piece) :]
    except OSError:
        if stat.S_ISREG(before.st_mode):
            os.ftruncate(file, before.st_size)
        raise


class RunLog:
    """The console and the log files of a run: log.txt, metrics.jsonl, samples.txt. Thread-safe.

    A write error, such as a full disk, never ends a run: it causes one warning, and text waits in memory.
    """

    def __init__(self, stderr: bool = False) -> None:
        self.console = Console(stderr=stderr)
        self.loggers: list[Logger] = []
        self.run_dir: Path | None = None
        self.files: dict[str, GrowingFile] = {}
        self.warned: set[str] = set()  # write errors that were reported
        self.lock = threading.RLock()
        self.has_bar = False

    def open(self, run_dir: Path, loggers: list[Logger]) -> None:
        """Also write to the run folder from now on."""
        self.run_dir, self.loggers = run_dir, loggers

    def close(self) -> None:
        """Close the loggers, write queued text, and warn of files that are incomplete."""
        self._to_loggers(lambda logger: logger.close())
        self.flush()
        for name, what in self.unwritten().items():
            self.warn(f"{self.files[name].path}: {what}")

    def append(self, name: str, piece: str | bytes, step: int = 0) -> None:
        """Append to a file of the run folder, now or as soon as possible; the piece belongs to update `step`."""
        assert self.run_dir is not None, "open() comes first"
        with self.lock:
            if name not in self.files:
                self.files[name] = GrowingFile(self.run_dir / name)
            data = piece if isinstance(piece, bytes) else piece.encode("utf-8", "backslashreplace")
            self.files[name].add(step, data)
            self.flush()

    def flush(self) -> None:
        """Write queued text, and warn once of each kind of write error."""
        with self.lock:
            for file in list(self.files.values()):
                if not file.flush() and file.reason not in self.warned:
                    self.warned.add(file.reason)
                    self.warn(
                        f"{file.path}: cannot be written ({file.reason}); the run continues, and keeps metrics, lines "
                        "and samples in memory until it can write its files"
                    )

    def drop_after(self, step: int, names: Sequence[str]) -> None:
        """Drop queued text of later updates for some files."""
        with self.lock:
            for name in names:
                if name in self.files:
                    self.files[name].drop_after(step)

    def unwritten(self) -> dict[str, str]:
        """Return how many entries of each incomplete file are missing, and why."""
        return {name: what for name, file in self.files.items() if (what := file.unwritten())}

    def say(self, *parts: Any) -> None:
        """Print to the terminal (rich renderables or text) and to log.txt."""
        self.console.print(*parts)
        self._append_to_log(*parts)

    def warn(self, text: str, kind: str = "warning") -> None:
        """Print a warning, or a line of another kind, on stderr and to log.txt."""
        text = f"{kind}: {text}"
        self._append_to_log(text)
        if self.has_bar:  # the console redraws the bar below the line
            self.console.print(text, style="yellow")
        else:
            with contextlib.suppress(BrokenPipeError):  # it is in log.txt
                Console(stderr=True).print(text)

    def row(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Append one object to metrics.jsonl, and pass it to the loggers. NaN and infinity become null."""
        row = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        self.append("metrics.jsonl", json.dumps({"step": step, "split": split, **row}) + "\n", step)
        self._to_loggers(lambda logger: logger.log(step, split, scores))

    def samples(self, step: int, text: str, to_terminal: bool) -> None:
        """Append the samples of an evaluation to samples.txt, with control characters escaped."""
        text = f"--- step {step} ---\n{shown(text)}\n"
        self.append("samples.txt", text + "\n", step)
        if to_terminal:
            self.console.print(text)

    def _to_loggers(self, call: Callable[[Logger], None]) -> None:
        """Call each logger; remove one that fails."""
        for logger in list(self.loggers):
            try:
                call(logger)
            except Exception as error:  # of its library or the network
                self.loggers.remove(logger)
                self.warn(f"{type(logger).__name__}: {error!r}; the run continues without it")

    def _append_to_log(self, *parts: Any) -> None:
        if self.run_dir is not None:
            text = io.StringIO()
            # No control codes in a file, even with FORCE_COLOR.
            Console(file=text, force_terminal=False).print(*parts)
            self.append("log.txt", text.getvalue())

    @contextlib.contextmanager
    def training_bar(self, n_steps: int) -> Iterator[Callable[[int, str], None]]:
        """Show progress. The yielded function takes the number of updates and a text ("": keep the last one).

        Without a terminal, print plain lines instead, at most one every PLAIN_INTERVAL_S.
        """
        if not self.console.is_interactive:
            due_s = time.monotonic()

            def print_line(step: int, text: str) -> None:
                nonlocal due_s
                if text and (step == 1 or time.monotonic() >= due_s):
                    due_s = time.monotonic() + PLAIN_INTERVAL_S
                    self.say(f"step {step}  {text}")

            yield print_line
            return
        columns = (
            *(TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None)),
            *(TextColumn("{task.description}"), TimeRemainingColumn(), TextColumn("left")),
        )
        others = len(f"step {n_steps}/{n_steps}  0:00:00 left ") + LEAST_BAR
        with self._bar("", n_steps, columns) as update:
            yield lambda step, text: update(
                completed=step, description=_fitting(text, self.console.width - others) if text else None
            )

    @contextlib.contextmanager
    def pass_bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show progress through a pass over data, of `total` bytes or samples.

        The yielded function takes how many are done. Without a terminal, or within a training bar, print plain lines
        every PASS_INTERVAL_S instead, after SLOW_S.
        """
        if not self.console.is_interactive or self.has_bar:
            began_s = time.monotonic()
            due_s = began_s + SLOW_S

            def print_line(done: int) -> None:
                nonlocal due_s
                if 0 < done and due_s <= (now := time.monotonic()):
                    due_s = now + PASS_INTERVAL_S
                    left = (now - began_s) * (total / done - 1)
                    self.say(f"{title}: {done / max(total, 1):.0%}, about {max(left, 0):.0f} s left")

            yield print_line
            return
        fitting = _fitting(title, self.console.width - len(" 100% 0:00:00 ") - LEAST_BAR, between=" ")
        text = TextColumn("{task.percentage:.0f}%")
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), text, TimeElapsedColumn())
        with self._bar(fitting, total, columns, transient=True) as update:
            yield lambda done: update(completed=done)

    @contextlib.contextmanager
    def _bar(
        self, description: str, total: int, columns: Iterable[ProgressColumn], transient: bool = False
    ) -> Iterator[Callable[..., None]]:
        """Show a progress bar; yield its update function."""
        with Progress(*columns, console=self.console, transient=transient, expand=True) as bar:
            self.has_bar = True
            try:
                yield functools.partial(bar.update, bar.add_task(description, total=total))
            finally:
                self.has_bar = False


def _fitting(text: str, width: int, between: str = "  ") -> str:
    """Return the first fields of a text that fit into `width` columns."""
    fields = text.split(between)
    while fields and len(between.join(fields)) > width:
        fields.pop()
    return between.join(fields)


def check_loggers(config: Config) -> None:
    """Raise UserError if a requested logger is not installed."""
    for setting, is_used, module in (
        ("log.tensorboard=true", config.log.tensorboard, "tensorboardX"),
        (f"log.wandb={config.log.wandb}", config.log.wandb, "wandb"),
    ):
        if is_used and importlib.util.find_spec(module) is None:
            extra = setting.removeprefix("log.").partition("=")[0]
            raise UserError(f"{setting}: {module} is not installed; pip install 'jaxlm[{extra}]', or leave it out")


def open_loggers(config: Config, run_log: RunLog, run_dir: Path, last_step: int) -> list[Logger]:
    """Return the requested loggers of a run that has made `last_step` updates."""
    loggers: list[Logger] = []
    if config.log.tensorboard:
        loggers.append(TensorBoard(run_log.append, last_step))
    if config.log.wandb:
        loggers.append(WeightsAndBiases(config.log.wandb, run_dir, configs.flat(config)))
    return loggers
