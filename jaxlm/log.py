"""What a run tells: lines and a progress bar on the terminal, files in the run folder, and optional loggers."""

import contextlib
import importlib.util
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxlm.config import Config
from jaxlm.errors import UserError

# Text is printed as it is: no [markup], no :emoji:, no lines broken where a path would break.
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
PLAIN_INTERVAL_S = 5  # between lines that stand in for the progress bar where there is no terminal


class Logger(Protocol):
    """Where else scores go."""

    def log(self, step: int, split: str, scores: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run_dir: Path, last_step: int):
        from tensorboardX import SummaryWriter

        # What a run that goes on has told before of later steps does not count.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1 if last_step else None)

    def log(self, step: int, split: str, scores: dict[str, float]) -> None:
        for name, value in scores.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


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


class RunLog:
    """The terminal and the files of one run: log.txt, metrics.jsonl, samples.txt."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a sample may have what the terminal cannot show
        self.console = Console(**PLAIN)
        self.loggers: list[Logger] = []
        self.run_dir: Path | None = None
        self.bar: Progress | None = None
        self.last_plain_s = 0.0

    def open(self, run_dir: Path, loggers: list[Logger]) -> None:
        """Write to the run folder, too, from here on."""
        self.run_dir, self.loggers = run_dir, loggers

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

    def say(self, *parts: Any) -> None:
        """Print to the terminal (rich renderables or text) and to log.txt."""
        self.console.print(*parts)
        self._append_to_log(*parts)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, and to log.txt."""
        text = f"warning: {text}"
        self._append_to_log(text)
        if self.bar is not None:  # which redraws itself below what its console prints
            self.bar.console.print(text, style="yellow")
        else:
            print(text, file=sys.stderr, flush=True)

    def row(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Append one object to metrics.jsonl, and pass it to the loggers."""
        # JSON has no NaN; null is what every reader takes.
        row = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        with open(self._folder() / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "split": split, **row}) + "\n")
        for logger in self.loggers:
            logger.log(step, split, scores)

    def samples(self, step: int, text: str, to_terminal: bool) -> None:
        """Append the samples of an evaluation to samples.txt."""
        text = f"--- step {step} ---\n{text}\n"
        with open(self._folder() / "samples.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")
        if to_terminal:
            self.console.print(text)

    def _folder(self) -> Path:
        assert self.run_dir is not None, "open() comes first"
        return self.run_dir

    def _append_to_log(self, *parts: Any) -> None:
        if self.run_dir is not None:
            with open(self.run_dir / "log.txt", "a", encoding="utf-8") as file:
                # No control codes in a file, whatever FORCE_COLOR says.
                Console(file=file, width=120, force_terminal=False, **PLAIN).print(*parts)

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
        with Progress(*columns, console=self.console, expand=True) as bar:
            task = bar.add_task("", total=n_steps)
            self.bar = bar
            try:
                yield lambda step, text: bar.update(task, completed=step, description=text or None)
            finally:
                self.bar = None

    @contextlib.contextmanager
    def bytes_bar(self, title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
        """Show progress through `n_bytes` of text, in plain lines without a terminal."""
        if not self.console.is_interactive:
            self.last_plain_s = time.monotonic()  # what is done sooner needs no line
            yield lambda done: self._plain_line(f"{title}: {done / max(n_bytes, 1):.0%}")
            return
        columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=n_bytes)
            yield lambda done: bar.update(task, completed=done)

    def _plain_line(self, text: str, is_due: bool = False) -> None:
        now = time.monotonic()
        if text and (is_due or now - self.last_plain_s >= PLAIN_INTERVAL_S):
            self.last_plain_s = now
            self.say(text)


def check_loggers(config: Config) -> None:
    """Raise UserError if a logger that the settings ask for is not installed."""
    for setting, is_wanted, module in (
        ("log.tensorboard=true", config.log.tensorboard, "tensorboardX"),
        (f"log.wandb={config.log.wandb}", config.log.wandb, "wandb"),
    ):
        if is_wanted and importlib.util.find_spec(module) is None:
            extra = setting.removeprefix("log.").partition("=")[0]
            raise UserError(f"{setting}: {module} is not installed; pip install 'jaxlm[{extra}]', or leave it out")


def open_loggers(config: Config, run_dir: Path, settings: dict[str, Any], last_step: int) -> list[Logger]:
    """Return the loggers that the settings ask for, of a run that has made `last_step` updates."""
    loggers: list[Logger] = []
    if config.log.tensorboard:
        loggers.append(TensorBoard(run_dir, last_step))
    if config.log.wandb:
        loggers.append(WeightsAndBiases(config.log.wandb, run_dir, settings))
    return loggers
