"""Files and folders that get their name when they are whole, and what killed processes leave of them."""

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
PROGRESS = "progress.json"  # in a temporary folder that another process can go on with
# What `name_for`, here and in earlier versions, makes of the names in these folders. No other file is removed.
NAME = re.compile(r"[0-9a-f]{32}([-.].*)?\.[0-9]+\.tmp")
LOCK = "lock"  # in a temporary folder, locked by the process that writes there
IDLE_S = 3600  # where neither lock nor process number tells: after this time without a write, nobody writes any more
START_S = 10  # in which a process that makes a temporary folder locks it


def user_cache_dir(configured: str) -> Path:
    """Return the folder for caches: `configured`, or jaxlm in the user's cache folder."""
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"


def name_for(path: Path) -> Path:
    """Return the name under which this process writes a file or folder before it gets its own name."""
    return path.with_name(f"{path.name[:40]}{_ending(os.getpid())}")  # a file system takes 255 bytes


def _ending(process: int | str) -> str:
    return f".{platform.node()}.{process}.tmp"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a new file or folder, which takes the place of a local `path` when the block has written it.

    After a crash at any time `path` is as it was before, or whole. Raises OSError.
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
    """Write a local file; after a crash at any time it is as it was before, or whole. Raises OSError."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk. Raises OSError if it is full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do it for folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a lock in a temporary folder, so that no other process takes it for abandoned."""
    with open(folder / LOCK, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the name and the times tell
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
        (folder / LOCK).unlink()


def remove(folder: Path, is_removable: Callable[[Path], bool]) -> None:
    """Remove the temporary files and folders in a cache folder for which `is_removable` holds."""
    for name in FOLDERS:
        for path in (folder / name).glob("*.tmp"):
            if NAME.fullmatch(path.name) and not (path / PROGRESS).is_file() and is_removable(path):
                with contextlib.suppress(OSError):
                    storage.remove(path)


def is_own(path: Path) -> bool:
    """Return whether this process made a temporary file or folder."""
    return path.name.endswith(_ending(os.getpid()))


def is_abandoned(path: Path) -> bool:
    """Return whether the process that wrote a temporary file or folder has ended, as far as can be known."""
    process = path.name.rsplit(".", 2)[1]
    is_of_this_host = path.name.endswith(_ending(process))
    idle_s = IDLE_S
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(path / LOCK, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                idle_s = START_S if is_of_this_host else IDLE_S  # another host's lock may be unknown here
            except BlockingIOError:
                return False
            except OSError:
                pass  # a file system without locks
        if is_of_this_host and not _is_alive(process):
            return True
        return time.time() - max(file.stat().st_mtime for file in (path, *path.glob("*"))) > idle_s
    except OSError:  # it has just gone
        return False


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (ValueError, PermissionError):
        pass
    return True
