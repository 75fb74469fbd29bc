"""Reads run folders of jaxlm and torchlm: settings, state, scores, checkpoints. Imports no framework.

`read` reads one run, `find` searches folders; jaxlm.runs and jaxlm.report show the results.
"""

import contextlib
import dataclasses
import fcntl
import functools
import math
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import config as configs
from jaxlm import errors
from jaxlm.data import metrics
from jaxlm.errors import UserError
from jaxlm.io import checksums, storage, utf8
from jaxlm.training import history, resume
from jaxlm.weights import formats

DEPTH = 3  # levels of folders that are searched
RUNNING, FINISHED, STOPPED, INTERRUPTED, LOST = "running", "finished", "stopped", "interrupted", "weights not found"
Row = dict[str, Any]  # of metrics.jsonl


class CheckpointRecord(NamedTuple):
    step: int
    path: Path
    loss: float | None  # on the validation split
    is_whole: bool  # complete, and not renamed as damaged
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The content of a run folder when it was read."""

    path: Path
    settings: dict[str, Any]  # by dotted name; defaults for those that config.toml lacks
    rows: list[Row]

    @functools.cached_property
    def checkpoints(self) -> list[CheckpointRecord]:
        """Its checkpoints by step, including damaged and incomplete ones."""
        losses = {row["step"]: row["loss"] for row in self.rows if row["split"] == "validation"}
        try:
            paths = storage.children(storage.checkpoints(self.path))
        except UserError:  # their folder cannot be reached
            paths = []
        checkpoints = [x for path in paths if (x := _checkpoint(path, losses))]
        return sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, checkpoint.path.name))

    @functools.cached_property
    def best(self) -> CheckpointRecord | None:
        """The checkpoint with the lowest validation loss; the last one if none was scored."""
        whole = {checkpoint.step: checkpoint for checkpoint in self.checkpoints if checkpoint.is_whole}
        losses = {step: math.nan if one.loss is None else one.loss for step, one in whole.items()}
        return whole[metrics.best(whole, losses) or max(whole)] if whole else None

    @functools.cached_property
    def baseline(self) -> dict[str, Any]:
        """The content of baseline.json; {} if it is missing or unreadable."""
        try:
            return utf8.read_json(self.path / history.BASELINE)
        except (OSError, ValueError):
            return {}

    def baselines(self, split: str) -> Row:
        """Return the scores of the best constant prediction, {} if they are not recorded."""
        scores = self.baseline.get(split.removeprefix("final_"))
        scores = scores if isinstance(scores, dict) else {}
        return {k: x for k, x in scores.items() if isinstance(x, int | float) and abs(x) < 1e300}  # finite as a float

    @functools.cached_property
    def owner(self) -> str:
        """The process that uses it, "" if there is none."""
        with contextlib.suppress(OSError), open(self.path / resume.LOCK, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
            except BlockingIOError:
                return file.read().strip() or "another process"
        return ""

    @property
    def task(self) -> str:
        return str(self.settings["task"])

    @property
    def last_step(self) -> int:
        """The last update that is logged or saved."""
        return max([row["step"] for row in self.rows] + [x.step for x in self.checkpoints if x.is_whole], default=0)

    @property
    def progress(self) -> str:
        return f"{self.last_step:,} of {self.settings['train.max_steps']:,}"

    @property
    def is_over(self) -> bool:
        """Whether all updates are made, or train.patience has ended the run."""
        losses = {step: row["loss"] for step, row in self._scored("validation").items()}
        interval, patience = (self.settings.get(f"train.{name}", 0) for name in ("eval_interval", "patience"))
        return self.last_step >= self.settings["train.max_steps"] or metrics.is_stalled(losses, interval, patience)

    @property
    def state(self) -> str:
        if self.owner:
            return RUNNING
        if not self.is_over and not self.scores("test"):
            return INTERRUPTED
        # After `clean`, only the best checkpoint is left; after a failed last save, an older one.
        kept = {checkpoint.step for checkpoint in self.checkpoints if checkpoint.is_whole}
        if not kept & {self.last_step, self.best_score_step()}:
            return INTERRUPTED if kept else LOST
        return FINISHED if self.is_over else STOPPED

    @property
    def changed_s(self) -> float:
        """Time of the last write, in seconds since 1970."""
        names = ("metrics.jsonl", "log.txt", "samples.txt", "config.toml")
        return max((self.path / name).stat().st_mtime for name in names if (self.path / name).exists())

    def n_bytes(self) -> int:
        """Return the size of all its files, including checkpoints in another folder."""
        return n_bytes(self.path) + sum(x.n_bytes for x in self.checkpoints if self.path not in x.path.parents)

    def speed(self) -> float:
        """Return the median of the tokens per second, 0 if unknown."""
        return statistics.median([row["tokens_per_s"] for row in self.rows if row.get("tokens_per_s")] or [0.0])

    def changed_settings(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults."""
        defaults = configs.flat(configs.Config()) | {"run.checkpoint_dir": ""}
        return {name: x for name, x in self.settings.items() if x != defaults.get(name)}

    def tested_step(self) -> int | None:
        """Return the step of the checkpoint that was scored on the test split."""
        return next((row["step"] for row in reversed(self.rows) if row["split"] == "test"), None)

    def best_score_step(self, split: str = "validation") -> int | None:
        """Return the update with the lowest loss, None if there is none."""
        losses = {step: row["loss"] for step, row in self._scored(split).items()}
        return metrics.best(losses, losses)

    def scores(self, split: str) -> Row:
        """Return the scores of a split after the best update; {} if there are none."""
        best = self.best_score_step(split)
        row = {} if best is None else self._scored(split)[best]
        return {name: x for name, x in row.items() if name not in history.KEYS}

    def _scored(self, split: str) -> dict[int, Row]:
        """Return the rows of a split that have a loss, by step; the losses of checkpoints are their own."""
        rows = {row["step"]: row for row in self.rows if row["split"] == split}
        if split == "validation":
            own = {x.step: {"loss": x.loss} for x in self.checkpoints if x.is_whole and x.loss is not None}
            rows = {step: rows.get(step, {}) | own.get(step, {}) for step in {**rows, **own}}
        return {step: row for step, row in rows.items() if row.get("loss") is not None}

    def samples(self) -> dict[int, str]:
        """Return the texts of samples.txt by update."""
        path = self.path / "samples.txt"
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError as error:
            history.warn_once(f"{path}: cannot be read ({error.strerror}); skipped")
            return {}
        pieces = re.split(r"^--- step ([0-9]{1,18}) ---$", text, flags=re.MULTILINE)[1:]
        return {int(step): sample.strip("\n") for step, sample in zip(pieces[::2], pieces[1::2], strict=True)}

    def evaluation(self, split: str) -> dict[str, Any]:
        """Return the evaluation of a split by jaxlm.evaluate, {} without one. Raises UserError if it is unreadable."""
        path = self.path / f"evaluation_{split}.json"
        with evaluation_errors(path):
            return utf8.read_json(path) if path.exists() else {}


@contextlib.contextmanager
def evaluation_errors(*files: Path) -> Iterator[None]:
    """Turn errors in the content of evaluations into a UserError that names the files."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        names = ", ".join(map(str, files))
        raise UserError(f"{names}: not written by jaxlm.evaluate ({error!r}); run it again, or remove it") from error


def read(path: Path) -> RunRecord:
    """Return the content of a run folder. Raises UserError if it is not one."""
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run")
    file, defaults = path / "config.toml", configs.flat(configs.Config())
    try:
        settings = defaults | configs.by_dotted_name(utf8.from_toml(utf8.read(file)))
    except FileNotFoundError as error:
        raise UserError(f"{path}: is not a run folder: it has no config.toml") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {errors.reason(error)}; correct it") from error
    for name, default in defaults.items():
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(settings[name], kinds) or isinstance(settings[name], bool) != isinstance(default, bool):
            rule = f"must have the type of its default, {default!r}; correct it"
            raise UserError(f"{file}: {name}={settings[name]!r}: {rule}")
    return RunRecord(path, settings, history.rows(path / "metrics.jsonl"))


def _checkpoint(path: Path, losses: dict[int, float]) -> CheckpointRecord | None:
    """Return the record of a checkpoint, None if the path is not one; `losses` are those of the log, by step."""
    stem, _, ending = path.name.partition(".")
    is_file = path.is_file()
    is_finished = is_file or checksums.is_finished(path)
    if not stem.isdecimal() or not (is_finished or checksums.is_cut_short(path)):
        return None
    if is_file and path.suffix != ".pt" and ".pt." not in path.name:
        return None
    is_whole = is_finished and ending == ("pt" if is_file else "")
    loss = losses.get(int(stem))
    if is_whole and not is_file:  # reading those of torchlm would need PyTorch
        with contextlib.suppress(UserError):
            loss = formats.validation_loss(path)
    return CheckpointRecord(int(stem), path, loss, is_whole, n_bytes(path))


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the settings that differ between runs, with the value in each; "-": missing."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {
        name: ["-" if x is None else str(x) for x in of_runs]
        for name, of_runs in values.items()
        if any(x != of_runs[0] for x in of_runs)
    }


def results(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return state, progress and scores of runs as text, by name."""
    lines = {
        "state": [run.state for run in runs],
        "updates": [run.progress for run in runs],
        "tokens/s, median": [f"{speed:,.0f}" if (speed := run.speed()) else "-" for run in runs],
        "best step": ["-" if run.best_score_step() is None else f"{run.best_score_step():,}" for run in runs],
    }
    for split in ("validation", *history.ENDING):
        of_runs = [run.scores(split) for run in runs]
        for name in dict.fromkeys(name for scores in of_runs for name in scores):
            title = f"{split.replace('_', ' ')} {name}"
            lines[title] = [metrics.number(name, scores.get(name)) for scores in of_runs]
            if any(baselines := [run.baselines(split) for run in runs]):
                lines[f"{title}, baseline"] = [metrics.number(name, scores.get(name)) for scores in baselines]
    return lines


def find(folders: Sequence[Path]) -> list[RunRecord]:
    """Return the runs in some folders, the last changed first; unreadable ones are skipped with a warning.

    Raises UserError if a folder does not exist.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder")
        for path in _runs_in(folder, DEPTH):
            try:
                runs.append(read(path))
            except UserError as error:
                history.warn_once(f"{error}; skipped")
    return sorted(runs, key=lambda run: -run.changed_s)


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.toml").is_file():
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from _runs_in(path, depth - 1)


def n_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    try:
        if path.is_file():
            return int(path.stat().st_size) if not storage.is_remote(path) else int(path.stat().length)  # type: ignore[attr-defined]
        return sum(n_bytes(child) for child in path.iterdir())
    except OSError:  # a running process replaces files
        return 0


def size(n: float) -> str:
    """Return a number of bytes as text, such as 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def ago(then_s: float) -> str:
    """Return the time since `then_s` as text, such as 3 h."""
    seconds = max(time.time() - then_s, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
