"""What a run tells: lines and a progress bar on the terminal, files in the run folder, and optional loggers."""

import contextlib
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

PLAIN_INTERVAL_S = 5  # between lines that stand in for the progress bar where there is no terminal


class Logger(Protocol):
    """Where else scores go."""

    def log(self, step: int, split: str, scores: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run_dir: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError("log.tensorboard=true needs an extra: pip install 'jaxlm[tensorboard]'") from error
        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, split: str, scores: dict[str, float]) -> None:
        for name, value in scores.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run in a Weights & Biases project."""

    def __init__(self, project: str, run_dir: Path, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"log.wandb={project} needs an extra: pip install 'jaxlm[wandb]'") from error
        self.run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=settings)

    def log(self, step: int, split: str, scores: dict[str, float]) -> None:
        self.run.log({f"{split}/{name}": value for name, value in scores.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class RunLog:
    """The terminal and the files of one run: log.txt, metrics.jsonl, samples.txt."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
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
        if self.run_dir is not None:
            with open(self.run_dir / "log.txt", "a", encoding="utf-8") as file:
                Console(file=file, width=120, highlight=False, markup=False, soft_wrap=True).print(*parts)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, and to log.txt."""
        if self.run_dir is not None:
            with open(self.run_dir / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"warning: {text}\n")
        if self.bar is not None:
            self.bar.console.print(f"warning: {text}", style="yellow")
        else:
            print(f"warning: {text}", file=sys.stderr, flush=True)

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

    @contextlib.contextmanager
    def training_bar(self, n_steps: int) -> Iterator[Callable[[int, str], None]]:
        """Show progress; the yielded function is told updates done and a text. Plain lines without a terminal."""
        if not self.console.is_terminal:
            yield self._plain_line
            return
        columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
        with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=self.console) as bar:
            self.bar = bar
            task = bar.add_task("", total=n_steps)
            yield lambda step, text: bar.update(task, completed=step, description=text)
        self.bar = None

    def _plain_line(self, step: int, text: str) -> None:
        now = time.monotonic()
        if step == 1 or now - self.last_plain_s >= PLAIN_INTERVAL_S:
            self.last_plain_s = now
            self.say(f"step {step}  {text}")

    @contextlib.contextmanager
    def bytes_bar(self, title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
        """Show progress through `n_bytes` of text."""
        columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(title, total=n_bytes)
            yield lambda done: bar.update(task, completed=done)


def open_loggers(config: Config, run_dir: Path, settings: dict[str, Any]) -> list[Logger]:
    """Return the loggers that the settings ask for. Raises UserError if one is not installed."""
    loggers: list[Logger] = []
    if config.log.tensorboard:
        loggers.append(TensorBoard(run_dir))
    if config.log.wandb:
        loggers.append(WeightsAndBiases(config.log.wandb, run_dir, settings))
    return loggers
