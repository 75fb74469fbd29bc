"""Whether a checkpoint folder is whole: it has the SHA-256 of each of its files in checksums.json, written last.

A folder without that file is an unfinished save. Imports no framework.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.io import storage, temporary, utf8

FILE = "checksums.json"
FROZEN = "frozen"  # a folder beside checkpoints, with what all of them have and none changes
# What a checkpoint of jaxlm has, or a save of it that was cut short, and what its parts have; with suffixes left off.
CONTENTS = {"base", "head", "optimizer", "info", "checksums", "_CHECKPOINT_METADATA", "commit_success"}
DAMAGED = ".damaged"  # behind the name of a checkpoint or log that was set aside
REMOVED = "removed"  # at the end of the name of a checkpoint while it is removed
INSIDE = {"_METADATA", "_sharding", "array_metadatas", "commit_success", "d", "manifest", "metadata", "ocdbt"}
_ABOVE = "../"
_FROZEN_PLACE = f"{_ABOVE}{FROZEN}/"


def write(folder: Path, needs_frozen: bool = False) -> None:
    """Write the checksums of all files in a folder; from then on it counts as whole.

    Those of the folder FROZEN beside it, which has been written, are among them if it is part of the checkpoint.
    """
    paths = (path for path in sorted(_files(folder)) if path != folder / FILE)
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in paths}
    if needs_frozen:
        others = utf8.read_json(folder.parent / FROZEN / FILE)
        sums |= {f"{_FROZEN_PLACE}{name}": others[name] for name in sorted(others) if name != FILE}
    text = json.dumps(sums | {FILE: _sum_of_all(sums)}, indent=0)
    if storage.is_remote(folder):
        (folder / FILE).write_text(text, encoding="utf-8")  # an object is there as a whole, or not at all
    else:
        temporary.replace_text(folder / FILE, text)


def is_finished(folder: Path) -> bool:
    """Return whether a folder has been written to its end."""
    return (folder / FILE).is_file()


def is_cut_short(folder: Path) -> bool:
    """Return whether a folder is what a save of jaxlm that never came to its end has left, and nothing of a user's."""
    step, _, ending = folder.name.partition(".")
    if not step.isdecimal() or not folder.is_dir() or (is_finished(folder) and ending != REMOVED):
        return False
    return is_ours(folder) and (ending != "" or any(folder.iterdir()))


def is_ours(folder: Path) -> bool:
    """Return whether a folder holds only files and folders that a save of jaxlm writes."""
    children = storage.children(folder)
    inside = [x for child in children if child.is_dir() for x in storage.children(child)]
    return {x.name.split(".")[0] for x in children} <= CONTENTS and {x.name.split(".")[0] for x in inside} <= INSIDE


def remove(path: Path) -> None:
    """Remove a checkpoint, a folder or file; cut short, it leaves none that looks whole. Of a link, the link alone."""
    if storage.is_remote(path):
        (path / FILE).unlink(missing_ok=True)
    elif path.is_dir() and not path.name.endswith(f".{REMOVED}"):
        new = path.with_name(f"{path.name.partition('.')[0]}.{REMOVED}")
        storage.remove(new)
        path = path.rename(new)
    storage.remove(path)


def damaged_name(path: Path) -> Path:
    """Return the name for a damaged file or folder that is set aside, one that nothing has yet."""
    names = (path.with_name(f"{path.name}{DAMAGED}{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists() and not os.path.islink(name))


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder by step, of jaxlm (folders) and torchlm (files)."""
    found = [
        (int(path.stem), path)
        for path in storage.children(folder)
        if path.stem.isdecimal() and (path.suffix == ".pt" if path.is_file() else not path.suffix)
    ]
    return sorted(found)


def finished_in(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder by step that were written to their end."""
    # A save that was killed is no checkpoint that was damaged.
    return [(step, path) for step, path in checkpoints_in(folder) if is_finished(path) or path.is_file()]


def damage(folder: Path, parts: Iterable[str] | None = None) -> str:
    """Return what is wrong with a folder, or with the subfolders `parts` of it; "" if all is as it was written."""
    name = FILE
    try:
        sums = utf8.read_json(folder / FILE)
        if sums.pop(FILE, "") != _sum_of_all(sums):
            return f"{FILE} is damaged"
        starts = "" if parts is None else tuple(f"{place}{part}/" for part in parts for place in ("", _FROZEN_PLACE))
        for name in (name for name in sums if name.startswith(starts)):
            place = folder.parent if name.startswith(_ABOVE) else folder
            if _sum(place / name.removeprefix(_ABOVE)) != sums[name]:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{name} is missing" + (": it was never finished" if name == FILE else "")
    except OSError as error:
        if storage.is_remote(folder):
            raise  # the network fails, which tells nothing of the checkpoint
        return f"{name} cannot be read ({error.strerror})"
    except ValueError:
        return f"{FILE} is damaged"
    return ""


def check(folder: Path, parts: Iterable[str] | None = None) -> None:
    """Raise UserError if a folder, or the subfolders `parts` of it, are not as they were written."""
    if what := damage(folder, parts):
        raise UserError(f"{folder}: damaged: {what}")


def _sum_of_all(sums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
