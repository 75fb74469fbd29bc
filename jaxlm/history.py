"""What a run has logged before it goes on: rows and samples up to its checkpoint are kept, later ones made again."""

import json
import math
import re
from pathlib import Path
from typing import Any

from jaxlm import checksums, formats, metrics
from jaxlm.start import Start

FILES = ("metrics.jsonl", "samples.txt")
KEYS = ("step", "split")  # of a row, besides its scores


def restore(start: Start, run_dir: Path) -> dict[int, metrics.Scores]:
    """Write what was logged up to the checkpoint of `start` to a run folder; return the validation scores, by step."""
    if start.kind != "resume" or start.path is None or start.run is None:
        return {}
    validation = restore_to(run_dir, start.info["step"], start.run)
    if not validation and start.run_dir:  # lost with the disk of a machine: still, the best checkpoint is to be known
        infos = [formats.info_of_run(path) for _, path in checksums.finished_in(start.path.parent) if path.is_dir()]
        validation = {info["step"]: {"loss": info["val_loss"]} for info in infos if info["val_loss"] is not None}
    return validation


def restore_to(run_dir: Path, step: int, source: Path | None = None) -> dict[int, metrics.Scores]:
    """Drop what was logged in a run folder after a step, or have it as in another; return the validation scores."""
    source = source or run_dir
    kept = [row for row in rows(source / FILES[0]) if row["step"] <= step and row["split"] != "test"]
    _replace(run_dir / FILES[0], "".join(json.dumps(row) + "\n" for row in kept))
    _replace(run_dir / FILES[1], _samples(source / FILES[1], step))
    return {
        row["step"]: {name: math.nan if value is None else value for name, value in row.items() if name not in KEYS}
        for row in kept
        if row["split"] == "validation"
    }


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a line that a crash has cut short is none."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() >= set(KEYS):
            found.append(row)
    return found


def _samples(path: Path, step: int) -> str:
    """Return the samples of evaluations up to a step."""
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    starts = [match for match in re.finditer(r"^--- step (\d+) ---$", text, re.MULTILINE) if int(match[1]) > step]
    return text[: starts[0].start()] if starts else text


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
