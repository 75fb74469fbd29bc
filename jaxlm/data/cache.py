"""The token cache: every article as token ids in memory-mapped arrays, made once per source, tokenizer and settings.

A corpus larger than memory works: building streams, and training touches only the pages it reads.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from tokenizers import Tokenizer
from tokenizers import __version__ as library_version

from jaxlm.data import tokenization
from jaxlm.data.sources import SPLITS, Article, Source
from jaxlm.errors import UserError, note, os_errors, slow, warn
from jaxlm.io import storage, temporary, utf8

FORMAT = 1  # raised when the files below change, so that older caches are not read
FILES: dict[str, Any] = {"offsets": np.int64, "labels": np.int32, "n_bytes": np.int64}
META, CHECKED = "meta.json", "checked.json"
OTHER_FOLDER = "choose another folder with --data.cache-dir"
BLOCK = 2**24  # bytes that have one checksum
CHECKED_BYTES = 2**30  # of a file that has not changed since it was checked in full: so much of it at each start


@dataclass(frozen=True)
class Split:
    """The articles of one split: article i has ids tokens[offsets[i] : offsets[i + 1]], without special tokens."""

    tokens: np.ndarray  # memory-mapped, narrowest unsigned type
    offsets: np.ndarray  # int64, one more than articles
    labels: np.ndarray  # int32, -1: none; values to predict are float32, NaN: none
    n_bytes: np.ndarray  # int64, length of the text in UTF-8

    def __len__(self) -> int:
        return len(self.labels)

    def token_counts(self) -> np.ndarray:
        """Return how often each id is in the tokens, int64; a block at a time, since bincount copies to int64."""
        counts = np.zeros(0, np.int64)
        for start in range(0, len(self.tokens), BLOCK):
            block = np.bincount(self.tokens[start : start + BLOCK], minlength=len(counts))
            block[: len(counts)] += counts
            counts = block
        return counts


def user_cache_dir(configured: str) -> Path:
    """Return the folder for caches: `configured`, or jaxlm in the user's cache folder."""
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"


def open_cache(
    source: Source, tokenizer: Tokenizer, cache_dir: Path, on_progress: Callable[[int], None] = lambda n_bytes: None
) -> dict[str, Split]:
    """Return the splits of `source` in tokens, from the cache or tokenized now.

    The files are compared with their checksums. If one is wrong, a warning says so and the cache is built again. What
    killed builds have left is removed. `on_progress` gets the bytes of text tokenized so far. Raises UserError if the
    cache cannot be written; then, as after an interrupt, nothing of it stays.
    """
    splits = _open_cache(source, tokenizer, cache_dir, on_progress)
    if source.has_values:  # the file has their bits
        splits = {name: replace(split, labels=split.labels.view(np.float32)) for name, split in splits.items()}
    return splits


def _open_cache(
    source: Source, tokenizer: Tokenizer, cache_dir: Path, on_progress: Callable[[int], None]
) -> dict[str, Split]:
    key = f"{FORMAT} {source.fingerprint} {tokenization.fingerprint(tokenizer)} {library_version}"
    folder = cache_dir / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    temporary.remove(cache_dir, temporary.is_abandoned)
    n_ids = tokenization.n_ids(tokenizer)
    if os.path.lexists(folder):
        try:
            return _opened(folder, n_ids)
        except (OSError, ValueError) as error:
            warn(f"{folder}: the token cache is damaged ({_reason(error)}); it is built again")
    _build(source, tokenizer, folder, on_progress)
    try:
        return _opened(folder, n_ids)
    except (OSError, ValueError) as error:
        rule = f"the token cache is not as it was just written ({_reason(error)})"
        raise UserError(f"{folder}: {rule}; check the disk, or {OTHER_FOLDER}") from error


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError):
        return str(error)
    name = Path(str(error.filename)).name if error.filename else ""
    return ": ".join(filter(None, (name, error.strerror or str(error))))


# Reading


def _opened(folder: Path, n_ids: int) -> dict[str, Split]:
    """Return the splits in a folder. Raises OSError or ValueError if they are not as they were written."""
    dtypes = _dtypes(n_ids)
    meta = _read_meta(folder, dtypes)
    with contextlib.ExitStack() as stack, slow("checking the token cache"):
        # Opened once: another process may replace the folder between the check and the use.
        files = {name: stack.enter_context(open(folder / name, "rb")) for name in dtypes}
        if "files" in meta:
            _check_sums(folder, files, meta["files"])
        arrays = {name: _mapped(file, dtypes[name]) for name, file in files.items()}
        splits = {split: Split(*(arrays[f"{split}.{name}"] for name in ("tokens", *FILES))) for split in SPLITS}
        if "files" not in meta:
            _add_sums(folder, meta, splits, n_ids)
    return splits


def _add_sums(folder: Path, meta: dict[str, Any], splits: Mapping[str, Split], n_ids: int) -> None:
    """Add checksums to a cache of an older version, which has none. Raises ValueError if its structure is wrong."""
    for name, split in splits.items():
        _check_structure(name, split, n_ids)
    try:
        _write_meta(folder, meta, _dtypes(n_ids))
        action = "they are added"
    except OSError as error:  # it can still be read
        action = f"they cannot be added ({error.strerror})"
    note(f"{folder}: this token cache of an older version has no checksums; its structure is right, and {action}")


def _dtypes(n_ids: int) -> dict[str, np.dtype]:
    """Return the type of each file."""
    token = np.dtype(np.uint16 if n_ids <= 2**16 else np.uint32)
    return {f"{split}.{name}": np.dtype(kind) for split in SPLITS for name, kind in {"tokens": token, **FILES}.items()}


def _mapped(file: BinaryIO, dtype: np.dtype) -> np.ndarray:
    size = os.fstat(file.fileno()).st_size
    if size % dtype.itemsize:
        raise ValueError(f"{Path(file.name).name} has {size} bytes, not a multiple of {dtype.itemsize}")
    return np.memmap(file, dtype, "r") if size else np.zeros(0, dtype)


def _read_meta(folder: Path, dtypes: Mapping[str, np.dtype]) -> dict[str, Any]:
    """Return meta.json. Raises OSError or ValueError if it is not as it was written."""
    meta = utf8.read_json(folder / META)
    if meta.keys() & {"files", "sum"} and meta.pop("sum", None) != _sum_of(meta):
        raise ValueError(f"{META} is not as it was written")
    if meta.get("dtype") != dtypes["train.tokens"].name:
        raise ValueError(f"{META} has the dtype {meta.get('dtype')!r}")
    return meta


def _sum_of(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())


def _check_sums(folder: Path, files: Mapping[str, BufferedReader], expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless the files have their sizes and checksums.

    All blocks are compared, except where a file has neither moved nor changed since that was done and is larger than
    CHECKED_BYTES: then as many blocks as that, chosen anew at each start.
    """
    try:
        checked = utf8.read_json(folder / CHECKED)
    except (OSError, ValueError):
        checked = {}
    buffer = memoryview(bytearray(BLOCK))
    for name, file in files.items():
        size, sums = expected[name]
        if os.fstat(file.fileno()).st_size != size:
            raise ValueError(f"{name} has {os.fstat(file.fileno()).st_size} bytes, not {size}")
        blocks = list(range(len(sums)))
        if checked.get(name) == _state(file):
            blocks = sorted(random.sample(blocks, min(len(sums), CHECKED_BYTES // BLOCK)))
        for i in blocks:
            file.seek(i * BLOCK)
            if xxhash.xxh3_64_hexdigest(buffer[: file.readinto(buffer)]) != sums[i]:
                raise ValueError(f"{name} is not as it was written")
    if checked != (states := {name: _state(file) for name, file in files.items()}):
        with contextlib.suppress(OSError):  # read-only: it is checked in full each time
            (folder / CHECKED).write_text(json.dumps(states))


def _state(file: BinaryIO) -> list[int]:
    """Return numbers that change when a file is written to, copied or moved to another disk."""
    status = os.fstat(file.fileno())
    return [status.st_ino, status.st_ctime_ns]  # unlike that of the last write, this time cannot be set


def _check_structure(name: str, split: Split, n_ids: int) -> None:
    """Raise ValueError if the arrays of a split do not fit each other and the vocabulary."""
    offsets, n = split.offsets, len(split.labels)
    if len(offsets) != n + 1 or len(split.n_bytes) != n:
        raise ValueError(f"{name}: {len(offsets)} offsets, {n} labels and {len(split.n_bytes)} lengths do not fit")
    if offsets[0] != 0 or offsets[-1] != len(split.tokens) or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError(f"{name}.offsets do not divide its {len(split.tokens)} tokens into articles")
    if np.any(split.labels < -1) or np.any(split.n_bytes < 0):
        raise ValueError(f"{name} has a label or a length below its least")
    for start in range(0, len(split.tokens), BLOCK):  # a block at a time: comparing makes an array
        if np.any(split.tokens[start : start + BLOCK] >= n_ids):
            raise ValueError(f"{name}.tokens has an id above the vocabulary of {n_ids}")


# Writing


def _build(source: Source, tokenizer: Tokenizer, folder: Path, on_progress: Callable[[int], None]) -> None:
    unfinished = temporary.name_for(folder)
    n_ids = tokenization.n_ids(tokenizer)
    dtypes = _dtypes(n_ids)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed and had the same number
    try:
        with os_errors(f"{unfinished}: the token cache cannot be written", f"free some space, or {OTHER_FOLDER}"):
            unfinished.mkdir(parents=True)
            with temporary.claimed(unfinished):
                with contextlib.ExitStack() as stack:
                    # Plain writes: a full disk under a memory map would kill the process instead of raising.
                    files = {name: stack.enter_context(open(unfinished / name, "wb")) for name in dtypes}
                    _write(source.articles(), source.has_values, tokenizer, files, dtypes, on_progress)
                for name in dtypes:
                    temporary.fsync(unfinished / name)
                meta = {"dtype": dtypes["train.tokens"].name, "source": source.description}
                _write_meta(unfinished, meta, dtypes)
            _move(unfinished, folder, n_ids)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_meta(folder: Path, meta: dict[str, Any], names: Iterable[str]) -> None:
    """Write meta.json with the sizes and checksums of the files beside it."""
    sums: dict[str, tuple[int, list[str]]] = {}
    states = {}
    for name in names:
        with open(folder / name, "rb") as file:
            blocks = [xxhash.xxh3_64_hexdigest(block) for block in iter(functools.partial(file.read, BLOCK), b"")]
            sums[name], states[name] = (file.tell(), blocks), _state(file)
    meta = json.loads(json.dumps(meta | {"files": sums}))
    temporary.replace_text(folder / META, json.dumps(meta | {"sum": _sum_of(meta)}))
    (folder / CHECKED).write_text(json.dumps(states))


def _move(unfinished: Path, folder: Path, n_ids: int) -> None:
    """Give a built cache its name. A damaged one in its place goes; a good one, which another process built, stays."""
    try:
        unfinished.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        try:
            _opened(folder, n_ids)
            return
        except (OSError, ValueError):
            # Not emptied in place: other processes keep what they have mapped.
            aside = temporary.name_for(folder.with_name(f"{folder.name}.damaged"))
            with contextlib.suppress(FileNotFoundError):  # another process has just done the same
                folder.rename(aside)
                storage.remove(aside)
            _move(unfinished, folder, n_ids)
    temporary.fsync(folder.parent)


def _write(
    articles: Iterator[Article],
    has_values: bool,
    tokenizer: Tokenizer,
    files: Mapping[str, BinaryIO],
    dtypes: Mapping[str, np.dtype],
    on_progress: Callable[[int], None],
) -> None:
    """Tokenize the articles, many at a time on all cores, and append them to the files of their splits."""
    ends = dict.fromkeys(SPLITS, 0)
    n_bytes_done = 0
    for split in SPLITS:
        files[f"{split}.offsets"].write(np.int64(0).tobytes())
    for chunk in tokenization.chunks(articles, lambda article: len(article.text)):
        encodings = tokenizer.encode_batch_fast([article.text for article in chunk], add_special_tokens=False)
        for article, encoding in zip(chunk, encodings, strict=True):
            n_bytes = len(article.text.encode())
            ends[article.split] += len(encoding.ids)
            n_bytes_done += n_bytes
            label = np.float32(article.label).view(np.int32) if has_values else int(article.label)
            values = {"tokens": encoding.ids, "offsets": ends[article.split], "labels": label}
            for name, value in (values | {"n_bytes": n_bytes}).items():
                path = f"{article.split}.{name}"
                files[path].write(np.asarray(value, dtypes[path]).tobytes())
        on_progress(n_bytes_done)
