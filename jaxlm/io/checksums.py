"""Checksums of checkpoint folders: SHA-256 of each file in checksums.json, which is written last.

A folder without that file is an incomplete save. Imports no framework.
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
FROZEN = "frozen"  # a folder beside the checkpoints, with the frozen weights that all of them share
# Names in a complete or incomplete checkpoint of jaxlm (CONTENTS), and in its parts (INSIDE), without suffixes.
CONTENTS = {"base", "head", "optimizer", "info", "checksums", "_CHECKPOINT_METADATA", "commit_success"}
DAMAGED = ".damaged"  # suffix of damaged checkpoints and logs, which are renamed
REMOVED = "removed"  # suffix of a checkpoint while it is removed
INSIDE = {"_METADATA", "_sharding", "array_metadatas", "commit_success", "d", "manifest", "metadata", "ocdbt"}
_ABOVE = "../"
_FROZEN_PLACE = f"{_ABOVE}{FROZEN}/"


def write(folder: Path, needs_frozen: bool = False) -> None:
    """Write the checksums of all files in a folder; this marks it as complete.

    With `needs_frozen`, they include those of the folder FROZEN beside it.
    """
    paths = (path for path in sorted(_files(folder)) if path != folder / FILE)
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in paths}
    if needs_frozen:
        others = utf8.read_json(folder.parent / FROZEN / FILE)
        sums |= {f"{_FROZEN_PLACE}{name}": others[name] for name in sorted(others) if name != FILE}
    text = json.dumps(sums | {FILE: _sum_of_all(sums)}, indent=0)
    if storage.is_remote(folder):
        (folder / FILE).write_text(text, encoding="utf-8")  # objects in gs:// are written atomically
    else:
        temporary.replace_text(folder / FILE, text)


def is_finished(folder: Path) -> bool:
    """Return whether a folder is complete."""
    return (folder / FILE).is_file()


def is_cut_short(folder: Path) -> bool:
    """Return whether a folder is an incomplete save of jaxlm, without files of the user."""
    step, _, ending = folder.name.partition(".")
    if not step.isdecimal() or not folder.is_dir() or (is_finished(folder) and ending != REMOVED):
        return False
    return is_ours(folder) and (ending != "" or any(folder.iterdir()))


def is_ours(folder: Path) -> bool:
    """Return whether a folder has only files and folders that jaxlm writes."""
    children = storage.children(folder)
    inside = [x for child in children if child.is_dir() for x in storage.children(child)]
    return {x.name.split(".")[0] for x in children} <= CONTENTS and {x.name.split(".")[0] for x in inside} <= INSIDE


def remove(path: Path) -> None:
    """Remove a checkpoint folder or file, or only the link to it. If interrupted, none that looks complete remains."""
    if storage.is_remote(path):
        (path / FILE).unlink(missing_ok=True)
    elif path.is_dir() and not path.name.endswith(f".{REMOVED}"):
        new = path.with_name(f"{path.name.partition('.')[0]}.{REMOVED}")
        storage.remove(new)
        path = path.rename(new)
    storage.remove(path)


def damaged_name(path: Path) -> Path:
    """Return a new name for a damaged file or folder."""
    names = (path.with_name(f"{path.name}{DAMAGED}{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists() and not os.path.islink(name))


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder by step: folders of jaxlm, files of torchlm."""
    return sorted(
        (int(path.stem), path)
        for path in storage.children(folder)
        if path.stem.isdecimal() and (path.suffix == ".pt" if path.is_file() else not path.suffix)
    )


def finished_in(folder: Path) -> list[tuple[int, Path]]:
    """Return the complete checkpoints in a folder by step."""
    return [(step, path) for step, path in checkpoints_in(folder) if is_finished(path) or path.is_file()]


def damage(folder: Path, parts: Iterable[str] | None = None) -> str:
    """Return what is wrong with a folder, or with its subfolders `parts`; "" if all checksums match."""
    name = FILE
    try:
        sums = utf8.read_json(folder / FILE)
        if sums.pop(FILE, "") != _sum_of_all(sums):
            return f"{FILE} is damaged"
        starts = "" if parts is None else tuple(f"{place}{part}/" for part in parts for place in ("", _FROZEN_PLACE))
        for name in (name for name in sums if name.startswith(starts)):
            place = folder.parent if name.startswith(_ABOVE) else folder
            if _sum(place / name.removeprefix(_ABOVE)) != sums[name]:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing" + (": the save is incomplete" if name == FILE else "")
    except OSError as error:
        if storage.is_remote(folder):
            raise  # the network fails: the checkpoint may be fine
        return f"{name} cannot be read ({error.strerror})"
    except ValueError:
        return f"{FILE} is damaged"
    return ""


def check(folder: Path, parts: Iterable[str] | None = None) -> None:
    """Raise UserError if the files of a folder, or of its subfolders `parts`, do not match their checksums."""
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
