"""The format of a record: what a run computed, in the order in which it did. Needs NumPy only.

A record is a folder of three files, without pickle:

    record.json     {"format": "parity-record", "version": 1, "framework": "torch 2.13.0"}
    entries.jsonl   a line for each array, in order of execution, with where its bytes are
    data.bin        the bytes of all arrays, little-endian, row by row, one after the other

A line of entries.jsonl:

    update, kind, name   the update (from 0), one of KINDS, and the module or parameter
    call                 how many times the name had this kind in this update before
    dtype, shape         as the framework has it, "bfloat16" included; the shape is that of the whole array
    at, bytes            where it is in data.bin
    shards               in place of these two, where it was sharded: [{"start": [...], "shape": [...], "at", "bytes"}]
    sketch               where only a sample is kept: {"kept", "norm", "projections"}, see sketch.py
    same                 in place of bytes: the number of the line that has the same array
    info                 what is no array: a module's class and settings, an optimizer's settings

A run that was stopped leaves a record that can be read up to its last whole line. Each process of a run with several
writes its own folder, `process-0`, `process-1`, ..., inside that of the record; the reader joins their shards.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from parity_tests.record import sketch

# In the order in which an update has them. A parameter is written before update `update`, and so once more at the end.
KINDS = ("parameter", "batch", "mask", "input", "activation", "loss", "gradient", "moment", "rate", "setting")
NAMES = ("record.json", "entries.jsonl", "data.bin")
FORMAT = {"format": "parity-record", "version": 1}


class Writer:
    """Appends arrays to a record."""

    def __init__(self, path: Path, framework: str):
        path.mkdir(parents=True, exist_ok=True)
        if any((path / name).exists() for name in NAMES):
            raise UserError(f"{path}: has a record already; give another folder, or remove it")
        (path / NAMES[0]).write_text(json.dumps(FORMAT | {"framework": framework}) + "\n", encoding="utf-8")
        self.entries = (path / NAMES[1]).open("w", encoding="utf-8")
        self.data = (path / NAMES[2]).open("wb")
        self.n, self.at = 0, 0
        self.calls: dict[tuple[int, str, str], int] = {}

    def add(self, update: int, kind: str, name: str, **line: Any) -> int:
        """Write a line; return its number. `line` is from `array`, or has `same` or `info`."""
        key = (update, kind, name)
        call = self.calls.get(key, 0)
        self.calls[key] = call + 1
        head = {"update": update, "kind": kind, "name": name, "call": call}
        self.entries.write(json.dumps(head | line) + "\n")
        self.n += 1
        return self.n - 1

    def array(self, x: np.ndarray, dtype: str = "", shape: tuple[int, ...] | None = None) -> dict[str, Any]:
        """Write the bytes of an array, here or as uint16 where NumPy has not its type; return what its line says."""
        return {"dtype": dtype or str(x.dtype), "shape": list(x.shape if shape is None else shape), **self._bytes(x)}

    def shards(self, dtype: str, shape: tuple[int, ...], pieces: list[tuple[list[int], np.ndarray]]) -> dict[str, Any]:
        """Write pieces of an array, each with where it starts; return what its line says."""
        written = [{"start": start, "shape": list(x.shape), **self._bytes(x)} for start, x in pieces]
        return {"dtype": dtype, "shape": list(shape), "shards": written}

    def flush(self) -> None:
        """Let what is written be read."""
        self.data.flush()
        self.entries.flush()

    def close(self) -> None:
        self.data.close()
        self.entries.close()

    def _bytes(self, x: np.ndarray) -> dict[str, int]:
        x = np.ascontiguousarray(x)
        if x.dtype.byteorder == ">":
            x = x.astype(x.dtype.newbyteorder("<"))
        self.data.write(x.reshape(-1).view(np.uint8).data)
        self.at += x.nbytes
        return {"at": self.at - x.nbytes, "bytes": x.nbytes}


@dataclass(eq=False)
class Entry:
    """An array of a record, read when it is asked for."""

    record: "Record" = field(repr=False)
    line: dict[str, Any]
    number: int

    @property
    def update(self) -> int:
        return self.line["update"]

    @property
    def kind(self) -> str:
        return self.line["kind"]

    @property
    def name(self) -> str:
        return self.line["name"]

    @property
    def call(self) -> int:
        return self.line["call"]

    @property
    def info(self) -> dict[str, Any]:
        return self.line.get("info", {})

    @property
    def source(self) -> "Entry":
        """Return the entry that has the bytes."""
        return self.record.entries[self.line["same"]].source if "same" in self.line else self

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the whole array, also where a sample is kept."""
        return tuple(self.source.line.get("shape", ()))

    @property
    def dtype(self) -> str:
        return self.source.line.get("dtype", "")

    @property
    def sketch(self) -> dict[str, Any] | None:
        return self.source.line.get("sketch")

    @property
    def is_number(self) -> bool:
        return "float" in self.dtype

    def array(self) -> np.ndarray:
        """Return the array, or what is kept of it; floats below float32 as float32, which has all their numbers."""
        return self.record.array(self.source)


class Record:
    """The content of a folder that a recorder has written."""

    def __init__(self, path: Path):
        self.path = path
        parts = sorted(path.glob("process-*"), key=lambda x: int(x.name.rpartition("-")[2])) or [path]
        self.header = _header(parts[0])
        lines = [_lines(part) for part in parts]
        self.data = [_mapped(part / NAMES[2]) for part in parts]
        self.entries = [Entry(self, line, i) for i, line in enumerate(_joined(path, lines))]
        self.known: dict[int, np.ndarray] = {}
        self.n_kept = 0

    @property
    def framework(self) -> str:
        return self.header.get("framework", "")

    def all(self, *kinds: str) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.kind in kinds)

    def array(self, entry: Entry) -> np.ndarray:
        line = entry.line
        if entry.number not in self.known:
            if "shards" in line:
                whole = np.empty(line["shape"], _numpy_type(line["dtype"]))
                for piece in line["shards"]:
                    place = tuple(slice(i, i + n) for i, n in zip(piece["start"], piece["shape"], strict=True))
                    whole[place] = self._bytes(piece, line["dtype"], piece["shape"])
                x = whole
            elif "at" in line:
                kept = line["sketch"]["kept"] if "sketch" in line else line["shape"]
                x = self._bytes(line, line["dtype"], kept)
            else:
                raise UserError(f"{self.path}: line {entry.number + 1} of entries.jsonl has no array")
            if str(x.dtype) == "uint16" and line["dtype"] == "bfloat16":
                x = (x.astype(np.uint32) << 16).view(np.float32)
            x = x.astype(np.float32) if x.dtype == np.float16 else x
            self.n_kept += x.nbytes
            if self.n_kept > _MOST_KEPT:
                self.known.clear()
                self.n_kept = x.nbytes
            self.known[entry.number] = x
        return self.known[entry.number]

    def _bytes(self, place: dict[str, Any], dtype: str, shape: list[int]) -> np.ndarray:
        data = self.data[place.get("process", 0)]
        piece = data[place["at"] : place["at"] + place["bytes"]]
        if len(piece) < place["bytes"]:
            raise UserError(f"{self.path}: data.bin ends too early; the run was stopped while it wrote")
        return np.frombuffer(piece.tobytes(), _numpy_type(dtype)).reshape(shape)


_MOST_KEPT = 256_000_000  # bytes of arrays that have been read


def read(path: Path | str) -> Record:
    """Return the record in a folder. Raises UserError if there is none."""
    return Record(Path(path))


def record_of(x: Any) -> Record:
    """Return the record of a recorder or of a folder; a record as it is."""
    if isinstance(x, Record):
        return x
    return read(x) if isinstance(x, Path | str) else x.read()


def _header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads((path / NAMES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no record ({NAMES[0]} cannot be read: {error})") from error
    if not isinstance(header, dict) or {key: header.get(key) for key in FORMAT} != FORMAT:
        raise UserError(f"{path}/{NAMES[0]}: no record of version 1; write it with parity_tests.record")
    return header


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    with (path / NAMES[1]).open(encoding="utf-8") as file:
        for i, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                break  # a run that was stopped
            try:
                line = json.loads(text)
                known = {key: line[key] for key in ("update", "kind", "name", "call")}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}/{NAMES[1]}: line {i} is no entry: {error}") from error
            if known["kind"] not in KINDS:
                raise UserError(f"{path}/{NAMES[1]}: line {i}: unknown kind {known['kind']}; one of {', '.join(KINDS)}")
            lines.append(line)
    return lines


def _joined(path: Path, lines: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the lines of the first process, with the shards of all."""
    first, *others = lines
    if others and len({tuple((x["kind"], x["name"]) for x in process) for process in lines}) > 1:
        raise UserError(f"{path}: its processes have not recorded the same; were all of one run?")
    for i, line in enumerate(first if others else []):
        for process, other in enumerate(others, start=1):
            line.get("shards", []).extend(x | {"process": process} for x in other[i].get("shards", []))
    return first


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)


def _numpy_type(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype("<u2")
    try:
        return np.dtype(name).newbyteorder("<")
    except TypeError as error:
        raise UserError(f"a record has arrays of {name}, which NumPy has not") from error


def sketched(x: Any, whole: int) -> bool:
    """Return whether only a sample of an array is kept."""
    return bool(np.prod(x.shape, dtype=np.int64) > whole) and sketch.can(x.shape)
