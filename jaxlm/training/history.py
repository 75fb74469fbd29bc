"""What a run has logged before it goes on: rows and samples up to its checkpoint are kept, later ones made again.

Logs are read with care: a line or file that cannot be read is passed over, named in one warning, and kept under another
name. The losses of checkpoints come from the checkpoints.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.data import metrics
from jaxlm.errors import UserError
from jaxlm.io import checksums
from jaxlm.io.checksums import DAMAGED
from jaxlm.weights import formats

FILES = ("metrics.jsonl", "samples.txt")
BASELINE = "baseline.json"  # scores of the best guess that looks at no input, by split
KEYS = ("step", "split")  # of a row, besides its scores
MOST_LINE = 1 << 20  # bytes of a line that is read
MOST_STEP = 2**31  # steps are int32
Row = dict[str, Any]
Warn = Callable[[str], None]
T = TypeVar("T")


@functools.cache
def warn_once(text: str) -> None:
    """Print a warning on stderr, unless this process has printed it before."""
    print(f"warning: {text}", file=sys.stderr)


def restore(
    run_dir: Path, step: int, source: Path, checkpoints: Path, warn: Warn = warn_once
) -> dict[int, metrics.Scores]:
    """Write what the run `source` has logged up to a step to a run folder; return the validation scores, by step.

    Raises UserError if it cannot be written.
    """
    validation = restore_to(run_dir, step, source, warn)
    for at, path in checksums.finished_in(checkpoints):
        with contextlib.suppress(UserError):  # its loss is of use, no more
            if at <= step and (loss := formats.validation_loss(path)) is not None:
                validation[at] = {"loss": loss} | validation.get(at, {}) | {"loss": loss}
    return validation


def restore_to(
    run_dir: Path, step: int, source: Path | None = None, warn: Warn = warn_once
) -> dict[int, metrics.Scores]:
    """Drop what was logged in a run folder after a step, or have it as in another; return the validation scores.

    Raises UserError if it cannot be written.
    """
    source = source or run_dir
    problems: list[str] = []
    kept = {
        key: (line, row)
        for key, (line, row) in _rows(source / FILES[0], problems.append).items()
        if row["step"] <= step and row["split"] != "test"
    }
    _replace(run_dir / FILES[0], b"".join(line for line, _ in kept.values()), problems, warn)
    problems.clear()
    samples = _samples(source / FILES[1], step, problems.append)
    _replace(run_dir / FILES[1], samples, problems, warn)
    return {
        row["step"]: {name: math.nan if value is None else value for name, value in row.items() if name not in KEYS}
        for _, row in kept.values()
        if row["split"] == "validation"
    }


def rows(path: Path, warn: Warn = warn_once) -> list[Row]:
    """Return the rows of a metrics.jsonl, without what cannot be read. A score is a finite float or None."""
    return [row for _, row in _rows(path, warn).values()]


def json_lines(path: Path, read: Callable[[Any], T | None], warn: Warn) -> Iterator[tuple[bytes, T]]:
    """Yield the lines of a file of one JSON value a line, each with what `read` makes of its value, NaN read as null.

    What is no JSON, or None by `read`, is passed over, and all of it named in one warning; a last line that a killed
    process has cut short is passed over without.
    """
    bad: list[int] = []
    try:
        for n, line in enumerate(_lines(path), start=1):
            value, others = None, list[str]()
            # A number of too many digits is a ValueError, and a line of too many brackets a RecursionError.
            with contextlib.suppress(ValueError, RecursionError):
                value = read(json.loads(line, parse_constant=others.append))  # of NaN, which is no JSON, None
            if value is not None:
                yield (json.dumps(value).encode() if others else line.rstrip(b"\r\n")) + b"\n", value
            elif line.strip() and line.endswith(b"\n"):
                bad.append(n)
    except OSError as error:
        warn(f"{path}: cannot be read ({error.strerror}); it is passed over")
    if bad:
        first = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines, the first is line {bad[0]}"
        warn(f"{path}: cannot be read: {first}; passed over")


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; of those longer than MOST_LINE, a part. Raises OSError if it is no file."""
    if not os.path.lexists(path):
        return
    if not os.path.isfile(path):  # to read a device or a pipe might never end
        raise OSError(0, "it is no file")
    with open(path, "rb") as file:
        while line := file.readline(MOST_LINE):
            rest = line
            while len(rest) == MOST_LINE and not rest.endswith(b"\n"):
                rest = file.readline(MOST_LINE)
            yield line if rest is line else b"!\n"  # which is no JSON


def _rows(path: Path, warn: Warn) -> dict[tuple[int, str], tuple[bytes, Row]]:
    """Return lines and rows by step and split; of two with the same, the later."""
    return {(row["step"], row["split"]): (line, row) for line, row in json_lines(path, _row, warn)}


def _row(value: Any) -> Row | None:
    """Return a row with its scores as floats, or None if it is none: without step or split, or unscored validation."""
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
    except OverflowError:  # an integer beyond all floats
        return None


def _samples(path: Path, step: int, warn: Warn) -> bytes:
    """Return the samples of evaluations up to a step."""
    if not os.path.lexists(path):
        return b""
    try:
        if not os.path.isfile(path):
            raise OSError(0, "it is no file")
        text = path.read_bytes()
    except OSError as error:
        warn(f"{path}: cannot be read ({error.strerror}); it is passed over")
        return b""
    found = re.finditer(rb"^--- step ([0-9]{1,18}) ---$", text, re.MULTILINE)
    end = next((match.start() for match in found if int(match[1]) > step), len(text))
    return text[:end]


def _replace(path: Path, content: bytes, problems: list[str], warn: Warn) -> None:
    """Give a file a content, whole or not at all; with `problems`, which are told, what was there gets another name."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        if not problems and path.is_file() and path.read_bytes().startswith(content):
            os.truncate(path, len(content))  # which a full disk allows
            return
        temporary.write_bytes(content)
        if problems and os.path.lexists(path):
            names = (path.with_name(f"{path.name}{DAMAGED}{n or ''}") for n in itertools.count())
            aside = next(name for name in names if not os.path.lexists(name))
            path.rename(aside)
            problems = [f"{problem}, and kept as {aside.name}" for problem in problems]
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space, or go on in a new folder with --run.dir"
        ) from error
    finally:
        for problem in problems:
            warn(problem)


SAVED = "saved.json"  # in a run folder: {"step": that of its last whole checkpoint, 0 before the first}


def last_saved(run_dir: Path) -> int:
    """Return the step of the last whole checkpoint that a run has recorded, 0 if there was none.

    A run of an earlier version has no record: its last score of the validation split counts, which is saved just after.
    """
    try:
        step = checksums.read_json(run_dir / SAVED)["step"]
        if type(step) is int:
            return step
    except (OSError, ValueError, KeyError):
        pass
    from jaxlm.training import history  # which imports this module

    return max(
        (row["step"] for row in history.rows(run_dir / "metrics.jsonl") if row["split"] == "validation"), default=0
    )
