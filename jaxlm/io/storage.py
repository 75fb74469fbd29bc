"""Paths of checkpoints: local, or in gs:// by `etils.epath`, whose paths are similar to those of pathlib.

The functions here cover what pathlib and epath do not share.
"""

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError, os_errors
from jaxlm.io import utf8

LATEST = "latest"  # stands for the newest run in a folder


def path(text: str | Path) -> Path:
    """Return a path, local or in gs://. Raises UserError for other kinds, and if a bucket cannot be reached."""
    if not is_remote(text):
        return Path(text)
    if not str(text).startswith("gs://"):
        raise UserError(f"{text}: neither a local folder nor gs://, the only places that Orbax writes to; give one")
    if match := re.search(r"[][*?#%\n\r]", str(text)):
        raise UserError(f"{text}: a name in gs:// cannot contain {match[0]!r}; give another")
    try:
        import fsspec
        import gcsfs  # noqa: F401
        from etils import epath
    except ImportError as error:
        raise UserError(f"{text}: needs gcsfs, which is not installed: pip install 'jaxlm[gcs]'") from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also logs the errors that it raises
    fsspec.config.conf["gcs"] = {"use_listings_cache": False}  # the cache misses files that Orbax writes
    result: Any = epath.Path(text)
    try:
        list(result.glob("*"))  # works for a missing folder, but not for a missing bucket
    except Exception as error:  # of gcsfs, its libraries or the network
        raise UserError(f"{text}: cannot be reached ({type(error).__name__}: {error})") from error
    return result


def run_path(named: str | Path) -> Path:
    """Return the path of a run or checkpoint. A name that does not exist stands for the newest matching run.

    `runs/mlm` stands for the newest of `runs/mlm-<date>-<n>`, `latest` for the newest in `runs`. Raises UserError.
    """
    source = path(named)
    if is_remote(named) or source.exists():
        return source
    folder = source.parent if source.parent.name else Path("runs")
    pattern = ".*" if source.name == LATEST else rf"{re.escape(source.name)}-\d{{8}}-\d+"
    runs = [config.parent for config in folder.glob("*/config.toml") if re.fullmatch(pattern, config.parent.name)]
    if not runs and source.name == LATEST:
        raise UserError(f"{named}: there is no run in {folder}; name a run, or train one")
    return max(runs, key=lambda run: (run / "config.toml").stat().st_mtime_ns, default=source)


def is_remote(path: str | Path) -> bool:
    """Return whether a path is not local."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def is_hub_name(path: Path) -> bool:
    """Return whether a missing path may be a name on the Hugging Face hub: NAME or OWNER/NAME."""
    is_file = path.suffix in (".json", ".txt", ".pt", ".safetensors")
    return not (is_file or path.is_absolute() or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir()))


def absolute(path: Path) -> Path:
    """Return the absolute path; epath's own method would turn gs:// into a local path."""
    return path if is_remote(path) else path.absolute()


@contextlib.contextmanager
def plain(path: Path) -> Iterator[Path]:
    """Yield a path without special characters: the absolute one, or a temporary link to it.

    Orbax reads a path as a pattern and as a URL; TensorStore refuses names of its own locks. Raises UserError if the
    link cannot be created.
    """
    path = absolute(path)
    if is_remote(path) or _is_plain(str(path)):
        yield path
        return
    folder = tempfile.gettempdir() if _is_plain(tempfile.gettempdir()) else "/tmp"
    with contextlib.ExitStack() as stack:
        with os_errors(
            f"{path}: has characters that need a link in {folder}, which cannot be created",
            "set TMPDIR to a writable folder, or give another name",
        ):
            link = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxlm-", dir=folder))) / "link"
            link.symlink_to(path)
        yield link


def _is_plain(path: str) -> bool:
    # etils reads /gs/x as gs://x. After a link, the system and Orbax resolve `..` to different folders.
    is_safe = re.fullmatch(r"(/(?!\.+(/|$))[\w.-]+)+", path, re.ASCII) and not re.match("/(gs|s3|az|hf)/", path)
    return is_safe is not None and not any(word in path for word in ("__lock", "orbax-checkpoint-tmp"))


def device(path: Path) -> int:
    """Return the number of the disk that a path is or will be on; 0 if it is not local."""
    return 0 if is_remote(path) else next(x.stat().st_dev for x in (path, *path.absolute().parents) if x.exists())


def children(folder: Path) -> list[Path]:
    """Return the paths in a folder, none if it is missing. Raises UserError if it cannot be read."""
    if is_remote(folder):
        return list(folder.glob("*"))
    with os_errors(f"{folder}: cannot be read"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link (but not its target), if it exists."""
    if is_remote(path):
        path.rmtree(missing_ok=True)  # type: ignore[attr-defined]
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def checkpoints(run_dir: Path, named: str = "") -> Path:
    """Return the checkpoint folder of a run: `named`, or else the one in its config.toml, or else its own."""
    if not named:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            named = utf8.from_toml(utf8.read(run_dir / "config.toml"))["run"]["checkpoint_dir"]
    return path(named) if named and isinstance(named, str) else run_dir / "checkpoints"
