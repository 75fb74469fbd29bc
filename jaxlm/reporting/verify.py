"""Verifies checkpoints by their checksums, and selects those that can be removed. Imports no framework."""

from pathlib import Path
from typing import Any

from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenization
from jaxlm.errors import UserError
from jaxlm.io import checksums, storage
from jaxlm.params import layout
from jaxlm.reporting.run_reader import CheckpointRecord, RunRecord
from jaxlm.weights import formats, snapshots


def checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run, of a folder of checkpoints, or `path` itself. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: there is no such run or checkpoint")
    paths = [path]
    if path.is_dir() and not (path / "info").is_dir():
        folders = (storage.checkpoints(path), path)
        paths = [checkpoint for folder in folders for _, checkpoint in checksums.checkpoints_in(folder)]
    if not paths:
        raise UserError(f"{path}: there is no checkpoint of a run")
    if any(checkpoint.is_file() for checkpoint in paths):
        formats.need_torch(path)
    return paths


def check(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint. Raises UserError if it is damaged or cannot be used."""
    if path.is_dir():
        layout.check_run(path)
        info = layout.info_of_run(path)
    else:
        info = layout.checked_info(snapshots.load(path).info, path)  # bare weights have none
    snapshots.config_of(info["config"], path)
    own = path.parent.parent / "tokenizer.json"  # a run that was converted has none
    if info["tokenizer"] and path.parent.name == "checkpoints" and own.is_file():
        if tokenization.fingerprint(tokenization.read(TokenizerConfig(path=str(own)))) != info["tokenizer"]:
            raise UserError(f"{path}: {own} is not the tokenizer of this checkpoint")
    return info


def spare(run: RunRecord) -> tuple[list[CheckpointRecord], str]:
    """Return the checkpoints of a run that can be removed, and a reason not to ("": none).

    The best one is needed, and the last one of an unfinished run.
    """
    if run.best is None:
        return [], "none of its checkpoints is complete" if run.checkpoints else ""
    kept = [run.best]
    if not run.is_over:
        kept.append([checkpoint for checkpoint in run.checkpoints if checkpoint.is_whole][-1])
    try:
        for checkpoint in kept:
            check(checkpoint.path)
    except UserError as error:
        return [], str(error).removeprefix(f"{run.path}/")
    return [checkpoint for checkpoint in run.checkpoints if checkpoint not in kept], ""
