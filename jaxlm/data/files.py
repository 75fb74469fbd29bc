"""Local files of a source: which they are, the split that each is for, and its format by name and content."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from jaxlm.config import DataConfig
from jaxlm.data import tables
from jaxlm.data.parts import SPLITS, STEMS, WHOLE, Part, Wanted
from jaxlm.errors import UserError, nearest, os_errors
from jaxlm.io import utf8

PARQUET = b"PAR1"  # how such a file begins
FORMATS = {"txt": "text", "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}
HEAD = 1 << 18  # bytes at the start of a text that tell what separates its documents
SHARD = re.compile(r"-[0-9]+-of-[0-9]+$")  # ends the stem of one of several files of a split
Tree = tuple[list[Path], list[Path]]  # files that may be a document each, and those that are left out
NO_TREE: Tree = ([], [])
MOST_HEAD = 1 << 23  # characters in which the first row of a table ends
CHECK_PATH = "check the path and its permissions"


# Which


def find(config: DataConfig, found_tree: Tree = NO_TREE) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return the (split, file) pairs of a source, and notes; `found_tree` is what `tree` returns for it.

    Raises UserError for files that do not fit.
    """
    found: list[tuple[str, Path]] = []
    notes: list[str] = []
    folder = Path()
    if config.path:
        path = _existing("data.path", config.path, Path())
        folder = path if path.is_dir() else path.parent
        files, unused = found_tree if config.documents in WHOLE else NO_TREE
        if files and unused:
            notes.append(f"not used (hidden, binary or empty): {_some(unused)}")
        found = [("train", file) for file in files or [path]]
        if path.is_dir() and not files:
            found = _folder_files(path, config, notes)
    named = {
        split: _existing(f"data.{split}_path", value, folder)
        for split, value in (("validation", config.validation_path), ("test", config.test_path))
        if value
    }
    for split, path in named.items():
        if path.is_dir():
            raise UserError(f"data.{split}_path={path}: is a folder; name a file in it")
    if len(named) == 2 and named["validation"].samefile(named["test"]):
        raise UserError(f"data.validation_path and data.test_path are both {named['test']}; leave one of them out")
    # What is named wins over what the folder says: such a file is this split only.
    found = [
        (split, file)
        for split, file in found
        if split not in named and not any(file.samefile(other) for other in named.values())
    ]
    pairs = sorted([*found, *named.items()], key=lambda pair: SPLITS.index(pair[0]))
    if config.path and pairs[0][0] != "train":
        others = [str(file) for _, file in pairs]
        path = _existing("data.path", config.path, Path())
        for split, file in named.items():
            if file.samefile(path):
                raise UserError(f"data.path and data.{split}_path are both {path}; leave out the second")
        mend = f"name a file, such as --data.path {others[0]}"
        mend += ", and other files as data.validation_path and data.test_path"
        raise UserError(f"data.path={config.path}: no train part (train.*), only {', '.join(others)}; {mend}")
    return pairs, notes


def _existing(setting: str, value: str, beside: Path) -> Path:
    """Return the path `value`, from here or from the folder `beside`. Raises UserError if it is not there."""
    path = Path(value if os.path.lexists(value) else os.path.expanduser(value))
    with os_errors(f"{setting}={value}: cannot be read", CHECK_PATH):
        for candidate in (path, beside / path):
            if candidate.exists():
                return candidate
        hint = "; its folder does not exist"
        if path.parent.is_dir():
            hint = nearest(path.name, [file.name for file in path.parent.iterdir()])
    raise UserError(f"{setting}={value}: no such file or folder{hint or '; check the name'}")


def tree(config: DataConfig) -> Tree:
    """Return the files below the folder data.path that have text, whatever they are called, if each may be a document.

    There are none where that is no folder, or where the names of the files in it tell splits or tables. Also returns
    what is left out: hidden files and folders, and files that are binary or empty. Links to folders are not followed.
    Raises UserError for a folder that cannot be read.
    """
    folder = _existing("data.path", config.path, Path())
    if not folder.is_dir() or config.format not in ("auto", "text"):
        return [], []
    with os_errors(f"data.path={folder}: cannot be read", CHECK_PATH):
        children = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
        are_tables = config.format == "auto" and any(format_by_name(file) not in ("", "text") for file in children)
        named = [file for file in children if _stem(file) in STEMS and file.suffix != ".py"]
        if are_tables or any(format_by_name(file) or STEMS[_stem(file)] == "train" for file in named):
            return [], []
        found: list[Path] = []
        unused: list[Path] = []
        for parent, folders, names in os.walk(folder, onerror=_raised):
            unused += [Path(parent, name) for name in folders if name.startswith(".")]
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(parent, name) for name in sorted(names)):
                has_text = not path.name.startswith(".") and path.is_file() and _has_text(path)
                (found if has_text else unused).append(path)
    is_table = [format_by_name(file) not in ("", "text") for file in found]
    return ([], []) if 2 * sum(is_table) > len(found) else (found, unused)


def _raised(error: OSError) -> None:
    raise error


def _stem(file: Path) -> str:
    """Return the name of a file before its first dot, without the number of a shard, as in train-00000-of-00010."""
    return SHARD.sub("", file.name.partition(".")[0].lower())


def _folder_files(folder: Path, config: DataConfig, notes: list[str]) -> list[tuple[str, Path]]:
    """Return (split, file) pairs by the names of the files in a folder; all are for training where no name says
    a split. If no name tells a format, all files that have text are used.
    """
    with os_errors(f"data.path={folder}: cannot be read", CHECK_PATH):
        children = sorted(folder.iterdir())
        files = [file for file in children if file.is_file()]
        visible = [file for file in files if not file.name.startswith(".")]
        wanted = "text" if config.format == "wikitext" else config.format
        usable = [f for f in visible if (format_by_name(f) if wanted == "auto" else format_by_name(f) == wanted)]
        unused = sorted({*visible} - {*usable})
        if not usable:
            usable = visible if wanted != "auto" else [file for file in visible if _has_text(file)]
            unused = sorted({*files} - {*usable})
    if not usable:
        names = _some(children) or "nothing"
        raise UserError(f"data.path={folder}: no file of text in it, only {names}; name a folder or file with text")
    if unused and wanted == "auto":
        why = "the format of others is told by their names" if format_by_name(usable[0]) else "hidden, binary or empty"
        notes.append(f"not used ({why}): {_some(unused)}")
    found: dict[str, list[Path]] = {}
    for file in usable:
        found.setdefault(STEMS.get(_stem(file), ""), []).append(file)
    unnamed = found.pop("", [])
    if not found:
        return [("train", file) for file in unnamed]
    for split, files in found.items():
        if {_stem(file) for file in files} == {"dev", "val"}:  # as WNLI has them, where val is a part of its train
            notes.append(f"not used beside dev: {_some([file for file in files if _stem(file) == 'val'])}")
            files[:] = [file for file in files if _stem(file) == "dev"]
        if len(files) > 1 and not all(SHARD.search(file.name.partition(".")[0]) for file in files):
            rule = f"{_some(files, ' and ')} are each the {split} part"
            raise UserError(f"data.path={folder}: {rule}; move all but one elsewhere")
    unnamed = [f for f in unnamed if f.name not in (Path(config.validation_path).name, Path(config.test_path).name)]
    if unnamed:
        notes.append(f"not used, as the name says no part: {_some(unnamed)}")
    return [(split, file) for split, files in found.items() for file in files]


def _some(files: list[Path], between: str = ", ", most: int = 5) -> str:
    """Return the names of the first files, and how many more there are."""
    more = [f"{len(files) - most} more"] if len(files) > most else []
    return between.join([file.name for file in files[:most]] + more)


# Format


def open_part(path: Path, wanted: Wanted) -> Part:
    """Return the part that a file is. Raises UserError for a file that cannot be read or lacks a wanted column."""
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file; write its content to one, and name that")
    reads = wanted.reads
    kind = _named_kind(path, wanted.config)
    content, size, head = _scan(path, kind)
    kind = _kind(kind, head, wanted)
    if reads == "tags" and kind not in ("jsonl", "parquet"):
        kind = "conll"
    documents = wanted.config.documents if reads == "text" else "auto"
    if kind in ("text", "wikitext") and documents == "column" and wanted.split == "train":
        mend = "give a table (csv, tsv, jsonl, parquet), or leave data.documents out"
        raise UserError(f"data.documents=column: {path} is plain text; {mend}")
    if kind in ("text", "wikitext") and documents in (*WHOLE, "wikitext"):
        kind = documents
    if reads != "text" and kind in ("text", "wikitext"):
        needed = {"labels": "a label column", "couples": "a column of texts and one of their pairs"}
        raise UserError(
            f"{path}: a {kind} file has no {reads}; give a table (csv, tsv, jsonl, parquet) with "
            f"{needed.get(reads, 'a column of prompts and one of answers')}"
        )
    return Part(str(path), wanted.split, kind, content, size, tables.open_table(path, kind, head, wanted))


def kind_of(path: Path, config: DataConfig) -> str:
    """Return the format of a file that is read for its texts, by its name and its start."""
    return _kind(_named_kind(path, config), start_of(path), Wanted(config, "text", "train"))


def start_of(path: Path) -> str:
    """Return the start of a text file, HEAD bytes of it; "" of one that cannot be read, which reading it tells."""
    with contextlib.suppress(OSError, *utf8.DAMAGED), utf8.opened(path) as stream:
        text = stream.read(HEAD).decode("utf-8", "ignore").removeprefix("\ufeff")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    return ""


def is_one_line(path: Path) -> bool:
    """Return whether a text file that can be read has nothing behind its first line."""
    with contextlib.suppress(OSError, *utf8.DAMAGED), utf8.opened(path) as stream:
        stream.readline(utf8.LONGEST)
        return not stream.read(HEAD).strip()
    return False


def _named_kind(path: Path, config: DataConfig) -> str:
    if config.format != "auto":
        return config.format
    return "parquet" if _is_parquet(_start(path)) else format_by_name(path)


def _kind(kind: str, head: str, wanted: Wanted) -> str:
    """Return the format of a file, given that by its name, "" for none, and its start."""
    is_auto = wanted.config.format == "auto"
    if not kind or (kind == "text" and wanted.reads != "text" and is_auto):
        kind = tables.guess(head, wanted) or "text"
    is_titled = kind == "text" and is_auto and any(tables.TITLE.fullmatch(line) for line in head.splitlines()[:50])
    return "wikitext" if is_titled else kind


def format_by_name(path: Path) -> str:
    name = path.name.lower()
    for ending in utf8.COMPRESSED:
        name = name.removesuffix(ending)
    return FORMATS.get(name.rpartition(".")[2], "") if "." in name else ""


def _start(path: Path) -> bytes:
    """Return the first bytes of a file, decompressed, and none of one that cannot be read, which reading it tells."""
    with contextlib.suppress(OSError, *utf8.DAMAGED), utf8.opened(path) as stream:
        return stream.read(utf8.START)
    return b""


def _is_parquet(start: bytes) -> bool:
    return start.startswith(PARQUET) and b"\0" in start


def _has_text(path: Path) -> bool:
    """Return whether a file is neither empty nor binary; of one that cannot be read, reading it tells."""
    try:
        with utf8.opened(path) as stream:
            start = stream.read(utf8.START)
    except (OSError, *utf8.DAMAGED):
        return path.stat().st_size > 0
    return bool(start.strip()) and (_is_parquet(start) or not utf8.is_binary(start))


def _scan(path: Path, kind: str) -> tuple[str, int, str]:
    """Return the hash and the bytes of a file, decompressed, and its start as text; reads it once, in blocks.

    The start is a megabyte, or more where the first line is longer. Raises UserError for a file that is unreadable,
    damaged or empty, or that should be text and is not UTF-8.
    """
    digest, size, head, n_open = hashlib.sha256(), 0, "", 0

    def blocks(stream: IO[bytes]) -> Iterator[bytes]:
        nonlocal size
        for block in iter(partial(stream.read, 1 << 20), b""):
            digest.update(block)
            size += len(block)
            yield block

    try:
        with open(path, "rb") as file:
            start = file.read(utf8.START)
        is_plain_text = kind in ("", "text", "wikitext") and path.suffix.lower() not in utf8.COMPRESSED
        if start and not is_plain_text and (why := utf8.stand_in(start)):
            raise ValueError(why)
        with utf8.opened(path) as stream:
            for text in utf8.decoded(blocks(stream)) if kind != "parquet" else ("" for _ in blocks(stream)):
                if not head or (len(head) < MOST_HEAD and "\n" not in head and "\r" not in head):
                    head += text
                end = max(text.rfind("\n"), text.rfind("\r"))
                n_open = len(text) - end - 1 + (n_open if end < 0 else 0)
                if n_open > utf8.LONGEST:  # where the rest would be read for nothing
                    raise UserError(f"{path}: has a line {utf8.TOO_LONG}")
    except utf8.DAMAGED as error:
        mend = "fetch or compress it again, or rename it if it is not compressed"
        raise UserError(f"{path}: the compressed file is damaged ({error}); {mend}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {CHECK_PATH}") from error
    except ValueError as error:
        raise UserError(f"{path}: is {error}") from error
    if not size:
        raise UserError(f"{path}: is empty; give a file with text")
    return digest.hexdigest(), size, head
