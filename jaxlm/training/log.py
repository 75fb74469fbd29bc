"""What a run tells: lines and a progress bar on the terminal, files in the run folder, and optional loggers."""

import contextlib
import copy
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.terminal import shown, wrapped

LEAST_BAR = 8  # columns of a progress bar in a narrow terminal, before the text beside it is cut
PLAIN_INTERVAL_S = 5  # between lines that stand in for the progress bar where there is no terminal
MOST_WAITING = 32 << 20  # bytes for one file that cannot be written


class Console(rich.console.Console):
    """Prints text as it is: no [markup], no :emoji:; control characters are shown.

    A terminal gets lines that fit, with whole words. Elsewhere lines and tables are as wide as they need to be.
    Once the reader of the output has gone, `reader_gone` is called and nothing more is printed; without it, printing
    raises BrokenPipeError.
    """

    reader_gone: Callable[[], None] | None = None

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if not self.is_terminal and "width" not in options:
            self.width = 10_000

    def on_broken_pipe(self) -> None:
        """Do what the class says; rich calls it with the error under way."""
        if self.reader_gone is None:
            raise
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # where Python puts what is left to write
        self.reader_gone()

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text to print; the cells of tables come here as well."""
        return super().render_str(shown(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print. Lines of text break where they are; on a terminal also between words, but no path is cut."""
        if len(objects) == 1 and isinstance(objects[0], Table) and objects[0].title:
            table = copy.copy(objects[0])
            self.print(str(table.title))  # a title that rich prints is cut at the width of its table
            table.title = None
            objects = (table,)
        if all(isinstance(x, str) for x in objects):
            options = {"soft_wrap": True} | options
            objects = tuple(wrapped(shown(x), self.width) for x in objects) if self.is_terminal else objects
        super().print(*objects, **options)


class Logger(Protocol):
    """Where else scores go."""

    def log(self, step: int, split: str, scores: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """An event file in the run folder. tensorboardX's own writer stops for good, or waits for ever, on a full disk."""

    def __init__(self, append: Callable[[str, bytes], None], last_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.append = append
        self.name = f"tensorboard/events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.begun = [Event(file_version="brain.Event:2")]
        if last_step:  # what a run that goes on has told before of later steps does not count
            self.begun.append(Event(step=last_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, split: str, scores: dict[str, float]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        values = [summary.scalar(f"{split}/{name}", value).value[0] for name, value in scores.items()]
        event = Event(step=step)
        event.summary.value.extend(values)
        for record in (*self.begun, event):
            record.wall_time = time.time()
            self.append(self.name, _framed(record.SerializeToString()))
        self.begun = []

    def close(self) -> None: ...


def _framed(data: bytes) -> bytes:
    """Return a record of an event file: its length, itself, and the checksums of both."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


class WeightsAndBiases:
    """A run in a Weights & Biases project."""

    def __init__(self, project: str, run_dir: Path, settings: dict[str, Any]):
        import wandb

        try:
            self.run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=settings)
        except wandb.errors.Error as error:  # no account, no network
            raise UserError(f"log.wandb={project}: {error}; or set WANDB_MODE=offline") from error
        # An axis of our own, because wandb's drops the test scores, which come last and belong to an earlier step.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, split: str, scores: dict[str, float]) -> None:
        self.run.log({f"{split}/{name}": value for name, value in scores.items()} | {"step": step})

    def close(self) -> None:
        self.run.finish()


class GrowingFile:
    """A file that grows by whole pieces. Those that cannot be written wait in memory, in order, for the next try.

    More than MOST_WAITING bytes do not wait: the oldest pieces are dropped, and counted.
    """

    def __init__(self, path: Path):
        self.path = path
        self.waiting: deque[tuple[int, bytes]] = deque()  # update, piece
        self.n_bytes = self.n_dropped = 0
        if _is_cut_short(path):
            self.add(0, b"\n")

    def add(self, step: int, piece: bytes) -> None:
        """Add a piece to those that wait; `step` is the update that it is about."""
        self.waiting.append((step, piece))
        self.n_bytes += len(piece)
        while self.n_bytes > MOST_WAITING:
            self.n_bytes -= len(self.waiting.popleft()[1])
            self.n_dropped += 1

    def drop_after(self, step: int) -> None:
        """Drop the pieces that wait and are about a later update."""
        self.waiting = deque(x for x in self.waiting if x[0] <= step)
        self.n_bytes = sum(len(piece) for _, piece in self.waiting)

    def flush(self) -> None:
        """Write the pieces that wait. Raises OSError where one cannot be written, and then leaves none half written."""
        if not self.waiting:
            return
        if self.path.parent.name == "tensorboard":
            self.path.parent.mkdir(exist_ok=True)
        # Without O_NONBLOCK, a named pipe that nobody reads would stop the run.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            while self.waiting:
                _write_whole(file, self.waiting[0][1])
                self.n_bytes -= len(self.waiting.popleft()[1])
        finally:
            os.close(file)


def _is_cut_short(path: Path) -> bool:
    """Return whether the last line of a file has no end, as a killed process leaves it."""
    with contextlib.suppress(OSError):  # no such file, or an empty one
        if path.is_file():
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read() != b"\n"
    return False


def _write_whole(file: int, piece: bytes) -> None:
    status = os.fstat(file)
    try:
        left = memoryview(piece)
        while left:
            left = left[os.write(file, left) :]
    except OSError:
        if stat.S_ISREG(status.st_mode):
            os.ftruncate(file, status.st_size)
        raise


class RunLog:
    """The terminal and the files of one run: log.txt, metrics.jsonl, samples.txt.

    A file that cannot be written, on a full disk for example, never ends a run: one warning, and what is to be written
    waits in memory until it can be. May be called in any thread.
    """

    def __init__(self, stderr: bool = False) -> None:
        self.console = Console(stderr=stderr)
        self.loggers: list[Logger] = []
        self.run_dir: Path | None = None
        self.files: dict[str, GrowingFile] = {}
        self.reasons: dict[str, str] = {}  # by file: why it could not be written the last time
        self.warned: set[str] = set()  # of these reasons
        self.lock = threading.RLock()
        self.bar: Progress | None = None
        self.last_plain_s = 0.0

    def open(self, run_dir: Path, loggers: list[Logger]) -> None:
        """Write to the run folder, too, from here on."""
        self.run_dir, self.loggers = run_dir, loggers

    def close(self) -> None:
        """Close the loggers, write what waits, and warn of what cannot be written."""
        for logger in list(self.loggers):
            self._try_logger(logger, logger.close)
        self.flush()
        for name, what in self.unwritten().items():
            self.warn(f"{self._folder() / name}: {what}")

    def append(self, name: str, piece: str | bytes, step: int = 0) -> None:
        """Append to a file of the run folder, now or as soon as possible; the piece is about update `step`."""
        with self.lock:
            if name not in self.files:
                self.files[name] = GrowingFile(self._folder() / name)
            data = piece if isinstance(piece, bytes) else piece.encode("utf-8", "backslashreplace")
            self.files[name].add(step, data)
            self.flush()

    def flush(self) -> None:
        """Write what waits, and warn once of each reason why it cannot be written."""
        with self.lock:
            for name, file in list(self.files.items()):
                try:
                    file.flush()
                except OSError as error:
                    why = self.reasons[name] = error.strerror or type(error).__name__
                    if why not in self.warned:
                        self.warned.add(why)
                        self.warn(
                            f"{file.path}: cannot be written ({why}); the run goes on and keeps rows, lines and "
                            "samples in memory until it can write its files"
                        )

    def drop_after(self, step: int, names: Sequence[str]) -> None:
        """Drop what waits for some files and is about a later update."""
        with self.lock:
            for name in names:
                if name in self.files:
                    self.files[name].drop_after(step)

    def unwritten(self) -> dict[str, str]:
        """Return, by file, what of it could not be written, and why."""
        counts = {name: len(file.waiting) + file.n_dropped for name, file in self.files.items()}
        return {
            name: f"{n:,} {'entry' if n == 1 else 'entries'} not written ({self.reasons.get(name, 'too many')})"
            for name, n in counts.items()
            if n
        }

    def say(self, *parts: Any) -> None:
        """Print to the terminal (rich renderables or text) and to log.txt."""
        self.console.print(*parts)
        self._append_to_log(*parts)

    def warn(self, text: str, kind: str = "warning") -> None:
        """Print a warning, or a line of another kind, on stderr, and to log.txt."""
        text = f"{kind}: {text}"
        self._append_to_log(text)
        if self.bar is not None:  # which redraws itself below what its console prints
            self.bar.console.print(text, style="yellow")
        else:
            with contextlib.suppress(BrokenPipeError):  # it is in log.txt
                Console(stderr=True).print(text)

    def row(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Append one object to metrics.jsonl, and pass it to the loggers."""
        # JSON has no NaN; null is what every reader takes.
        row = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        self.append("metrics.jsonl", json.dumps({"step": step, "split": split, **row}) + "\n", step)
        for logger in list(self.loggers):
            self._try_logger(logger, logger.log, step, split, scores)

    def samples(self, step: int, text: str, to_terminal: bool) -> None:
        """Append the samples of an evaluation to samples.txt, with control characters shown as on the terminal."""
        text = f"--- step {step} ---\n{shown(text)}\n"
        self.append("samples.txt", text + "\n", step)
        if to_terminal:
            self.console.print(text)

    def _try_logger(self, logger: Logger, call: Callable[..., None], *args: Any) -> None:
        """Call a method of a logger; one that fails is left out from then on."""
        try:
            call(*args)
        except Exception as error:  # whatever its library and the network raise
            self.loggers.remove(logger)
            self.warn(f"{type(logger).__name__}: {error!r}; the run goes on without it")

    def _folder(self) -> Path:
        assert self.run_dir is not None, "open() comes first"
        return self.run_dir

    def _append_to_log(self, *parts: Any) -> None:
        if self.run_dir is not None:
            text = io.StringIO()
            # No control codes in a file, whatever FORCE_COLOR says.
            Console(file=text, force_terminal=False).print(*parts)
            self.append("log.txt", text.getvalue())

    @contextlib.contextmanager
    def training_bar(self, n_steps: int) -> Iterator[Callable[[int, str], None]]:
        """Show progress; the yielded function is told the updates made, and a text on them ("": the last one stays).

        Without a terminal there are plain lines instead, one every PLAIN_INTERVAL_S at most.
        """
        if not self.console.is_interactive:
            yield lambda step, text: self._plain_line(f"step {step}  {text}" if text else "", is_due=step == 1)
            return
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        last = ""

        def show(step: int, text: str) -> None:
            nonlocal last
            last = text or last
            others = len(f"step {step}/{n_steps}  0:00:00 left ") + LEAST_BAR
            bar.update(task, completed=step, description=_fitting(last, self.console.width - others))

        with Progress(*columns, console=self.console, expand=True) as bar:
            task = bar.add_task("", total=n_steps)
            self.bar = bar
            try:
                yield show
            finally:
                self.bar = None

    @contextlib.contextmanager
    def bytes_bar(self, title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
        """Show progress through `n_bytes` of text, in plain lines without a terminal."""
        if not self.console.is_interactive:
            self.last_plain_s = time.monotonic()  # what is done sooner needs no line
            yield lambda done: self._plain_line(f"{title}: {done / max(n_bytes, 1):.0%}")
            return
        text = TextColumn("{task.percentage:.0f}%")
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), text, TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, expand=True) as bar:
            fitting = _fitting(title, self.console.width - len(" 100% 0:00:00 ") - LEAST_BAR, between=" ")
            task = bar.add_task(fitting, total=n_bytes)
            yield lambda done: bar.update(task, completed=done)

    def _plain_line(self, text: str, is_due: bool = False) -> None:
        now = time.monotonic()
        if text and (is_due or now - self.last_plain_s >= PLAIN_INTERVAL_S):
            self.last_plain_s = now
            self.say(text)


def _fitting(text: str, width: int, between: str = "  ") -> str:
    """Return the first fields of a text that fit into a width."""
    fields = text.split(between)
    while fields and len(between.join(fields)) > width:
        fields.pop()
    return between.join(fields)


def check_loggers(config: Config) -> None:
    """Raise UserError if a logger that the settings ask for is not installed."""
    for setting, is_wanted, module in (
        ("log.tensorboard=true", config.log.tensorboard, "tensorboardX"),
        (f"log.wandb={config.log.wandb}", config.log.wandb, "wandb"),
    ):
        if is_wanted and importlib.util.find_spec(module) is None:
            extra = setting.removeprefix("log.").partition("=")[0]
            raise UserError(f"{setting}: {module} is not installed; pip install 'jaxlm[{extra}]', or leave it out")


def open_loggers(
    config: Config, run_log: RunLog, run_dir: Path, settings: dict[str, Any], last_step: int
) -> list[Logger]:
    """Return the loggers that the settings ask for, of a run that has made `last_step` updates."""
    loggers: list[Logger] = []
    if config.log.tensorboard:
        loggers.append(TensorBoard(run_log.append, last_step))
    if config.log.wandb:
        loggers.append(WeightsAndBiases(config.log.wandb, run_dir, settings))
    return loggers
