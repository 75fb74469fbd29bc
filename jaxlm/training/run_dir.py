"""The run folder: created, locked and written, and removed again if the run does not start."""

import contextlib
import datetime
import fcntl
import itertools
import json
import os
import socket
import sys
from pathlib import Path
from typing import TextIO

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data import prepare
from jaxlm.errors import UserError, os_errors, reason
from jaxlm.io import checksums, storage, temporary
from jaxlm.training import environment, history
from jaxlm.training.history import SAVED
from jaxlm.training.log import RunLog
from jaxlm.training.resume import LOCK, Start

# Everything that a run without a checkpoint writes into its folder; all other files are the user's.
OWN = (
    *(*history.FILES, "config.toml", "tokenizer.json", "log.txt", environment.FILE, history.BASELINE, SAVED),
    *("tensorboard", "wandb", "trace", "stop", "save_checkpoint"),
)


class Claim:
    """A run folder that this process has created or taken over, and locked. Raises UserError if it cannot."""

    def __init__(self, config: Config, start: Start):
        self.path, self.made = make(config, start)
        self.is_new = bool(self.made) or not (start.is_retry or start.run_dir)
        self.is_emptied = False
        self.locks = contextlib.ExitStack()
        try:
            self.locks.enter_context(lock(self.path))  # first: the folder may belong to another process
        except UserError:
            remove_made(self.made)
            raise

    def add_checkpoints(self, named: str) -> None:
        """Create and lock the checkpoint folder `named`, if there is one."""
        self.made = [*lock_checkpoints(self.locks, self.path, named), *self.made]

    def empty(self) -> None:
        """Remove the files of an earlier attempt."""
        self.is_emptied = True
        empty(self.path)

    def undo(self) -> None:
        """Remove what was created and written: the run does not start."""
        if self.is_new:
            remove(self.path, self.made)
        elif self.is_emptied:
            empty(self.path)


def make(config: Config, start: Start) -> tuple[Path, list[Path]]:
    """Create the run folder; return it, and all folders that were created, inner ones first.

    Raises UserError if it is in use or cannot be created.
    """
    checkpoint_dir, run_dir = config.run.checkpoint_dir, config.run.dir
    if checkpoint_dir and not start.run_dir and checksums.finished_in(storage.path(checkpoint_dir)):
        raise UserError(
            f"run.checkpoint_dir={checkpoint_dir}: it has checkpoints of another run; "
            "resume that run by --run.dir RUN --resume auto, or give a new folder"
        )
    with os_errors(f"run.dir={run_dir or 'runs'}: cannot be written", "give another with --run.dir"):
        for n in itertools.count(1) if not run_dir else ():
            path = Path("runs", f"{config.task}-{datetime.date.today():%Y%m%d}-{n}")
            with contextlib.suppress(FileExistsError):
                if made := _make(path):
                    return path, made
        path = Path(run_dir)
        is_run = (path / LOCK).exists()
        is_ours = start.run_dir or (start.is_retry and is_run)
        if not is_ours and path.exists() and (not path.is_dir() or any(path.iterdir())):
            mend = "resume it by --resume auto, or give a new folder" if is_run else "give a new folder"
            raise UserError(f"run.dir={path}: it exists already, with a run or other files; {mend}, or remove this one")
        return path, _make(path)


def _make(path: Path) -> list[Path]:
    """Create a folder if it is missing; return all folders that were created, inner ones first."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    if made:
        path.mkdir(parents=True)  # raises FileExistsError if another process has just created it
    return made


def lock(run_dir: Path) -> TextIO:
    """Lock a run folder until the returned file is closed or the process ends.

    Raises UserError if another process has locked it.
    """
    with os_errors(f"run.dir={run_dir}: cannot be written", "give another with --run.dir"):
        return _lock(run_dir, "run.dir")


def lock_checkpoints(locks: contextlib.ExitStack, run_dir: Path, named: str) -> list[Path]:
    """Create and lock the local checkpoint folder `named`, if there is one; return what was created.

    Raises UserError if another run has locked it: each run would remove unfinished saves of the other.
    """
    made: list[Path] = []
    if named and not storage.is_remote(named):
        folder = Path(named)
        with contextlib.suppress(OSError):  # no locks on this disk, or no write access: the first save warns
            made = _make(folder)
            if not folder.samefile(run_dir):
                made = made if (folder / LOCK).exists() else [folder / LOCK, *made]
                locks.enter_context(_lock(folder, "run.checkpoint_dir"))
    return made


def _lock(folder: Path, setting: str) -> TextIO:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{setting}={folder}: {owner} uses it; wait for it or stop it, or give another folder"
            ) from error
        file.truncate(0)
        with contextlib.suppress(OSError):  # on a full disk, the lock has no name
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        stack.pop_all()
        return file


def set_aside(start: Start, folder: Path, run_dir: Path, run_log: RunLog) -> None:
    """Rename damaged checkpoints of the resumed run, and those whose checksums are missing.

    An interrupted save has no checksums either, but is later than the last recorded save. It is not renamed.
    """
    last = history.last_saved(run_dir) if (run_dir / SAVED).is_file() else sys.maxsize
    saved = [path for path in storage.children(folder) if path.name.isdecimal() and int(path.name) <= last]
    lost = [(path, f"{checksums.FILE} is missing") for path in saved if checksums.is_cut_short(path)]
    for path, what in (*start.damaged, *lost):
        if storage.absolute(path.parent) == storage.absolute(folder):
            aside = checksums.damaged_name(path)
            try:
                path.rename(aside)
            except Exception as error:  # the disk or the network fails
                raise UserError(
                    f"{path}: damaged: {what}, and cannot be renamed ({reason(error)}); move or remove it"
                ) from error
            what += f"; renamed to {aside.name}"
        run_log.warn(f"{path}: damaged: {what}")


def write(path: Path, text: str) -> None:
    """Write a file unless it has this content, so that a run resumes on a full disk. Raises UserError if it fails."""
    with os_errors(f"{path}: cannot be written", "free some space, or give another folder with --run.dir"):
        if not (path.is_file() and path.read_bytes() == text.encode()):
            temporary.replace_text(path, text)


def write_settings(run_dir: Path, config: Config, data: prepare.Data) -> None:
    """Write settings and tokenizer, which the checkpoints of a run need. Raises UserError if it fails."""
    write(run_dir / "config.toml", configs.dump(config))
    write(run_dir / "tokenizer.json", data.tokenizer.to_str())


def record_saved(run_dir: Path, step: int) -> None:
    """Record the step of the last complete checkpoint: if it is missing later, the run does not start from scratch."""
    with contextlib.suppress(UserError):  # a full disk; the next save tries again
        write(run_dir / SAVED, json.dumps({"step": step}) + "\n")


def empty(path: Path) -> None:
    """Remove the files of a run without a checkpoint; the user's own files stay."""
    for name in OWN:
        storage.remove(path / name)


def remove(path: Path, made: list[Path]) -> None:
    """Empty the folder of a run that did not start, and remove the folders and locks created for it."""
    empty(path)
    storage.remove(path / LOCK)
    remove_made([path / "checkpoints", *made])


def remove_made(paths: list[Path]) -> None:
    """Remove locks, and folders that are empty, inner ones first."""
    for path in paths:
        with contextlib.suppress(OSError):  # another run has started there
            path.unlink() if path.name == LOCK else path.rmdir()
