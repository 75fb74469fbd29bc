"""The folder of a run: made, locked, written, and removed where a run did not start. Knows no framework."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from pathlib import Path
from typing import TextIO

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data import prepare
from jaxlm.errors import UserError, reason
from jaxlm.io import checksums, storage, temporary
from jaxlm.training import environment, history
from jaxlm.training.history import SAVED
from jaxlm.training.log import RunLog
from jaxlm.training.resume import LOCK, Start

# All that a run without a checkpoint writes into its folder; what else is there is the user's.
OWN = (
    *(*history.FILES, "config.toml", "tokenizer.json", "log.txt", environment.FILE, history.BASELINE, SAVED),
    *("tensorboard", "wandb", "trace", "stop", "save_checkpoint"),
)


def make(config: Config, start: Start) -> tuple[Path, list[Path]]:
    """Make the run folder; return it, and the folders that were not there before, inner ones first.

    Raises UserError if it is in use or cannot be made.
    """
    if config.run.checkpoint_dir and not start.run_dir:
        if checksums.finished_in(storage.path(config.run.checkpoint_dir)):
            raise UserError(
                f"run.checkpoint_dir={config.run.checkpoint_dir}: there are checkpoints of a run already; "
                "go on with it by --resume auto, or give a new folder"
            )
    try:
        if config.run.dir:
            path = Path(config.run.dir)
            if start.run_dir or (start.is_retry and path.is_dir() and _is_of_a_run(path)):
                return path, _make(path)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                is_run = path.is_dir() and _is_of_a_run(path)
                mend = "go on with it by --resume auto, or give a new folder" if is_run else "give a new folder"
                raise UserError(f"run.dir={path}: there is a run or another file already; {mend}, or remove this one")
            return path, _make(path)
        name = f"{config.task}-{datetime.date.today():%Y%m%d}"
        for n in range(1, 10_000):
            path = Path("runs") / f"{name}-{n}"
            with contextlib.suppress(FileExistsError):
                if made := _make(path):
                    return path, made
    except OSError as error:
        folder = config.run.dir or path
        raise UserError(
            f"run.dir={folder}: cannot be written ({error.strerror}); give another with --run.dir"
        ) from error
    raise UserError(f"runs/{name}-*: there are too many runs; give a folder with --run.dir")


def _is_of_a_run(path: Path) -> bool:
    return (path / LOCK).exists()


def lock(run_dir: Path) -> TextIO:
    """Return the lock of a run folder; the system lets go of it when it is closed or the process ends, however it does.

    Raises UserError, with the host and the process that has it, if it is taken.
    """
    try:
        return _lock(run_dir, "run.dir")
    except OSError as error:
        raise UserError(
            f"run.dir={run_dir}: cannot be written ({error.strerror}); give another with --run.dir"
        ) from error


def _lock(folder: Path, setting: str) -> TextIO:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{setting}={folder}: {owner} works in it; wait for it or stop it, or give another folder"
            ) from error
        file.truncate(0)
        with contextlib.suppress(OSError):  # on a full disk, it is locked without a name
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        stack.pop_all()
        return file


def lock_checkpoints(held: contextlib.ExitStack, run_dir: Path, named: str) -> list[Path]:
    """Lock the folder of checkpoints `named`, where the disk allows it; return what was made: its lock, and folders.

    Raises UserError if another run works in it: each would remove what the other has not yet finished.
    """
    made: list[Path] = []
    if named and not storage.is_remote(named):
        folder = Path(named)
        with contextlib.suppress(OSError):  # a disk without locks, or one that cannot be written: the first save warns
            made = _make(folder)
            if not folder.samefile(run_dir):
                made = made if (folder / LOCK).exists() else [folder / LOCK, *made]
                held.enter_context(_lock(folder, "run.checkpoint_dir"))
    return made


def empty(path: Path) -> None:
    """Remove what a run without a checkpoint has left; the user's own files stay."""
    for name in OWN:
        storage.remove(path / name)


def set_aside(start: Start, folder: Path, run_dir: Path, run_log: RunLog) -> None:
    """Give damaged checkpoints of the run that goes on another name; and those without their checksums.

    Of the latter, a save of this run that was killed is left out: it is later than the last that was recorded.
    """
    saved = history.last_saved(run_dir) if (run_dir / SAVED).is_file() else sys.maxsize
    lost = [x for x in storage.children(folder) if x.name.isdecimal() and int(x.name) <= saved]
    lost_why = f"{checksums.FILE} is missing"
    for path, what in (*start.damaged, *((x, lost_why) for x in lost if checksums.is_cut_short(x))):
        if storage.absolute(path.parent) == storage.absolute(folder):
            aside = checksums.damaged_name(path)
            try:
                path.rename(aside)
            except Exception as error:  # of a disk or a network that fails
                raise UserError(
                    f"{path}: damaged: {what}, and cannot be set aside ({reason(error)}); move or remove it"
                ) from error
            what += f"; it is set aside as {aside.name}"
        run_log.warn(f"{path}: damaged: {what}")


def remove(path: Path, made: list[Path]) -> None:
    """Empty the folder of a run that did not start, and remove the folders made for it."""
    empty(path)
    storage.remove(path / LOCK)
    remove_empty([path / "checkpoints", *made])


def record_saved(run_dir: Path, step: int) -> None:
    """Record the step of the last whole checkpoint in a run folder: the run does not begin anew if none is found."""
    with contextlib.suppress(OSError, UserError):  # of a full disk; the next save tries again
        write(run_dir / SAVED, saved(step))


def write_settings(run_dir: Path, config: Config, data: prepare.Data) -> None:
    """Write what it takes to use the checkpoints of a run. Raises UserError if it cannot be written."""
    write(run_dir / "config.toml", configs.dump(config))
    write(run_dir / "tokenizer.json", data.tokenizer.to_str())


def write(path: Path, text: str) -> None:
    if path.is_file() and path.read_bytes() == text.encode():  # a run goes on, maybe on a full disk
        return
    try:
        temporary.replace_text(path, text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space, or give another folder with --run.dir"
        ) from error


def saved(step: int) -> str:
    return json.dumps({"step": step}) + "\n"


def _make(path: Path) -> list[Path]:
    """Make a folder unless it is there, and return those that were not there before, inner ones first."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    if made:
        path.mkdir(parents=True)  # raises FileExistsError if another process has just made it
    return made


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # another run has begun beside it
            folder.rmdir()
