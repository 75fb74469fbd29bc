"""Reads the metrics log and the samples of a run, and truncates both when a run resumes.

An unreadable line or file never stops a run: it is skipped, with one warning, and the file is kept under another name.
"""

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlm import errors
from jaxlm.data.metrics import Scores
from jaxlm.errors import UserError, os_errors
from jaxlm.io import checksums, temporary, utf8
from jaxlm.weights import formats

FILES = METRICS, SAMPLES = "metrics.jsonl", "samples.txt"
BASELINE = "baseline.json"  # scores by split of the best constant prediction, which ignores the input
SAVED = "saved.json"  # {"step": step of the last complete checkpoint, 0 before the first}
ENDING = ("final_validation", "test")  # splits that are scored at the end of a run
KEYS = ("step", "split")  # of a row; its other keys are scores
MOST_LINE = 1 << 20  # bytes; longer lines are skipped
MOST_STEP = 2**31  # steps are int32
Row = dict[str, Any]
Warn = Callable[[str], None]
warn_once = functools.cache(errors.warn)  # prints each text once in a process


def restore(run_dir: Path, step: int, source: Path, checkpoints: Path, warn: Warn = warn_once) -> dict[int, Scores]:
    """Call `restore_to`; return its validation scores, with the losses that are stored in checkpoints."""
    validation = restore_to(run_dir, step, source, warn)
    for saved, path in checksums.finished_in(checkpoints):
        with contextlib.suppress(UserError):  # an unreadable checkpoint has no loss
            if saved <= step and (loss := formats.validation_loss(path)) is not None:
                validation[saved] = validation.get(saved, {}) | {"loss": loss}
    return validation


def restore_to(run_dir: Path, step: int, source: Path | None = None, warn: Warn = warn_once) -> dict[int, Scores]:
    """Copy the logs of the run `source` up to a step; without `source`, truncate the run's own logs.

    Final scores of a finished run are dropped, too. Returns the validation scores by step. Raises UserError if a file
    cannot be written.
    """
    source = source or run_dir
    problems: list[str] = []
    kept = [
        (line, row)
        for line, row in _last_rows(source / METRICS, problems.append)
        if row["step"] <= step and row["split"] not in ENDING
    ]
    _replace(run_dir / METRICS, b"".join(line for line, _ in kept), problems, warn)
    problems = []
    _replace(run_dir / SAMPLES, _samples(source / SAMPLES, step, problems.append), problems, warn)
    return {
        row["step"]: {name: math.nan if value is None else value for name, value in row.items() if name not in KEYS}
        for _, row in kept
        if row["split"] == "validation"
    }


def rows(path: Path, warn: Warn = warn_once) -> list[Row]:
    """Return the readable rows of a metrics.jsonl. A score is a finite float or None."""
    return [row for _, row in _last_rows(path, warn)]


def last_saved(run_dir: Path) -> int:
    """Return the step of the last complete checkpoint that a run has recorded, 0 if there was none.

    Runs of earlier versions have no record; for them, it is the step of the last validation, which a save follows.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        step = utf8.read_json(run_dir / SAVED)["step"]
        if type(step) is int:
            return step
    return max((row["step"] for row in rows(run_dir / METRICS) if row["split"] == "validation"), default=0)


def json_lines(path: Path, read: Callable[[Any], Row | None], warn: Warn) -> Iterator[tuple[bytes, Row]]:
    """Yield each line of a JSON Lines file, and the row that `read` returns for its value. NaN becomes null.

    Lines that are not JSON, or for which `read` returns None, are skipped with one warning. An incomplete last line,
    which a killed process leaves, is skipped silently.
    """
    bad: list[int] = []
    for n, line in enumerate(_lines(path, warn), start=1):
        value, constants = None, list[str]()
        # Too many digits raise ValueError, too deep nesting RecursionError.
        with contextlib.suppress(ValueError, RecursionError):
            if len(line) <= MOST_LINE:
                # NaN and infinity, which are not JSON, become None: `append` returns None.
                value = read(json.loads(line, parse_constant=constants.append))
        if value is not None:
            yield (json.dumps(value).encode() if constants else line.rstrip(b"\r\n")) + b"\n", value
        elif line.strip() and line.endswith(b"\n"):
            bad.append(n)
    if bad:
        first = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines, the first is line {bad[0]}"
        warn(f"{path}: cannot be read: {first}; skipped")


def _lines(path: Path, warn: Warn) -> Iterator[bytes]:
    """Yield the lines of a file, nothing if it is missing; warn if it cannot be read."""
    try:
        if os.path.isfile(path):  # reading a device or a pipe might never end
            with open(path, "rb") as file:
                yield from file
        elif os.path.lexists(path):
            raise OSError(0, "not a file")
    except OSError as error:
        warn(f"{path}: cannot be read ({error.strerror}); skipped")


def _last_rows(path: Path, warn: Warn) -> list[tuple[bytes, Row]]:
    """Return the lines of a metrics.jsonl and their rows; the last one for each step and split."""
    return list({(row["step"], row["split"]): (line, row) for line, row in json_lines(path, _row, warn)}.values())


def _row(value: Any) -> Row | None:
    """Return a row with its scores as floats; None if step or split is missing, or the loss of a validation."""
    if not isinstance(value, dict):
        return None
    step, split = (value.pop(key, None) for key in KEYS)
    if type(step) is not int or not 0 <= step < MOST_STEP or not isinstance(split, str):
        return None
    scores = {name: _score(x) for name, x in value.items() if x is None or type(x) in (int, float)}
    if split == "validation" and "loss" not in scores:
        return None
    return {"step": step, "split": split, **scores}


def _score(x: float | None) -> float | None:
    try:
        return float(x) if x is not None and math.isfinite(x) else None
    except OverflowError:  # an integer larger than any float
        return None


def _samples(path: Path, step: int, warn: Warn) -> bytes:
    """Return the content of samples.txt up to a step."""
    kept = []
    for line in _lines(path, warn):
        heading = re.fullmatch(rb"--- step ([0-9]{1,18}) ---\n?", line)
        if heading and int(heading[1]) > step:
            break
        kept.append(line)
    return b"".join(kept)


def _replace(path: Path, content: bytes, problems: list[str], warn: Warn) -> None:
    """Write a file atomically. If there are `problems`, warn of them and keep the old file under another name."""
    try:
        with os_errors(f"{path}: cannot be written", "free some space, or resume in a new folder with --run.dir"):
            if not problems and path.is_file() and path.read_bytes().startswith(content):
                os.truncate(path, len(content))  # works on a full disk
                return
            with temporary.replacing(path) as new:
                new.write_bytes(content)
                if problems and os.path.lexists(path):
                    kept = path.rename(checksums.damaged_name(path))
                    problems = [f"{problem}, and kept as {kept.name}" for problem in problems]
    finally:
        for problem in problems:
            warn(problem)
