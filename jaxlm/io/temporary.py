"""Atomic writes by temporary files and folders, and removing those that killed processes leave."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.io import storage

FOLDERS = ("tokens", "tokenizers", "downloads")  # of a cache folder
PROGRESS = "progress.json"  # in a temporary folder that another process can continue
# Names that `name_for` gives in these folders, in this and earlier versions. No other file is removed.
NAME = re.compile(r"[0-9a-f]{32}([-.].*)?\.[0-9]+\.tmp")
LOCK = "lock"  # in a temporary folder, locked by the process that writes there
IDLE_S = 3600  # if lock and process number are inconclusive, a folder without writes for so long is abandoned
START_S = 10  # within which a process locks a temporary folder that it has created


def user_cache_dir(configured: str) -> Path:
    """Return the folder for caches: `configured`, or jaxlm in the user's cache folder."""
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"


def name_for(path: Path) -> Path:
    """Return the temporary name under which this process writes a file or folder."""
    return path.with_name(f"{path.name[:40]}{_ending(os.getpid())}")  # names have at most 255 bytes


def _ending(process: int | str) -> str:
    return f".{platform.node()}.{process}.tmp"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name for the block to write; then rename it to the local `path`.

    After a crash at any time, `path` is either unchanged or complete. Raises OSError.
    """
    new = name_for(path)
    try:
        yield new
        fsync(new)
        new.replace(path)
        fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            storage.remove(new)


def replace_text(path: Path, text: str) -> None:
    """Write a local file atomically. Raises OSError."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Raises OSError if it is full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a lock in a temporary folder, so that no other process considers it abandoned."""
    with open(folder / LOCK, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: name and times are used instead
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
        (folder / LOCK).unlink()


def remove(folder: Path, is_removable: Callable[[Path], bool]) -> None:
    """Remove the temporary files and folders in a cache folder for which `is_removable` is true."""
    for name in FOLDERS:
        for path in (folder / name).glob("*.tmp"):
            if NAME.fullmatch(path.name) and not (path / PROGRESS).is_file() and is_removable(path):
                with contextlib.suppress(OSError):
                    storage.remove(path)


def is_own(path: Path) -> bool:
    """Return whether this process made a temporary file or folder."""
    return path.name.endswith(_ending(os.getpid()))


def is_abandoned(path: Path) -> bool:
    """Return whether the process that wrote a temporary file or folder has ended, as far as is known."""
    process = path.name.rsplit(".", 2)[1]
    is_of_this_host = path.name.endswith(_ending(process))
    idle_s = IDLE_S
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(path / LOCK, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                idle_s = START_S if is_of_this_host else IDLE_S  # locks of another host may be invisible here
            except BlockingIOError:
                return False
            except OSError:
                pass  # a file system without locks
        if is_of_this_host and not _is_alive(process):
            return True
        return time.time() - max(file.stat().st_mtime for file in (path, *path.glob("*"))) > idle_s
    except OSError:  # it was just removed
        return False


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (ValueError, PermissionError):
        pass
    return True
