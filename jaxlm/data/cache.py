"""The token cache: every article as token ids in memory-mapped arrays, made once per source, tokenizer and settings.

A corpus larger than memory works: building streams, and training touches only the pages it reads.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

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
T = TypeVar("T")
HASHES = "hashes"  # of the texts so far, while a cache without duplicates is built
META, CHECKED = "meta.json", "checked.json"
OTHER_FOLDER = "choose another folder with --data.cache-dir"
BLOCK, PIECE = 2**24, 2**20  # bytes that have one checksum, and that are read at once for it
LARGE, KEPT_EVERY = 2**30, 2**25  # bytes of text: of a source whose progress is kept, and between two times
CHECKED_BYTES = 2**30  # of a file that has not changed since it was checked in full: so much of it at each start


@dataclass(frozen=True)
class Split:
    """The articles of one split: article i has ids tokens[offsets[i] : offsets[i + 1]], without special tokens."""

    tokens: np.ndarray  # memory-mapped, narrowest unsigned type
    offsets: np.ndarray  # int64, one more than articles
    labels: np.ndarray  # int32, -1: none; values to predict are float32, NaN: none
    n_bytes: np.ndarray  # int64, length of the text in UTF-8
    n_left_out: int = 0  # articles that were equal to one before

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


class Record(NamedTuple):
    """An entry of a cache folder: a token cache, or an unfinished build of one."""

    path: Path
    state: str
    source: str  # in words
    n_bytes: int
    used_s: float  # when it was last opened or written, in seconds since 1970


WHOLE, AT_WORK, BEGUN, UNREADABLE = "complete", "being built", "begun, not finished", "damaged"


def records(cache_dir: Path) -> list[Record]:
    """Return what is in a cache folder, the last used first."""
    found = []
    for path in (cache_dir / "tokens").glob("*"):
        with contextlib.suppress(OSError):  # it has just gone
            state, source = (AT_WORK, "") if path.suffix == ".tmp" else (WHOLE, "")
            if state == AT_WORK and temporary.is_abandoned(path):
                state = BEGUN
            if state == WHOLE:
                try:
                    source = _meta_of(path)["source"]
                except (OSError, ValueError, KeyError):
                    state = UNREADABLE
            files = [file.stat() for file in (path.iterdir() if path.is_dir() else [path])]
            used_s = max((file.st_mtime for file in files), default=path.stat().st_mtime)
            found.append(Record(path, state, source, sum(file.st_size for file in files), used_s))
    return sorted(found, key=lambda record: -record.used_s)


def damage(folder: Path) -> str:
    """Return what is wrong with a token cache, all of whose bytes are compared with their checksums; "" if nothing."""
    try:
        meta = _meta_of(folder)
        if "files" not in meta:
            return ""  # of an older version: the next training on it adds its checksums
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(folder / name, "rb")) for name in meta["files"]}
            _check_sums(folder, files, meta["files"], is_full=True)
    except (OSError, ValueError) as error:
        return _reason(error)
    return ""


def _opened(folder: Path, n_ids: int) -> dict[str, Split]:
    """Return the splits in a folder. Raises OSError or ValueError if they are not as they were written."""
    dtypes = _dtypes(n_ids)
    meta = _meta_of(folder)
    if meta.get("dtype") != dtypes["train.tokens"].name:
        raise ValueError(f"{META} has the dtype {meta.get('dtype')!r}")
    with contextlib.ExitStack() as stack, slow("checking the token cache"):
        # Opened once: another process may replace the folder between the check and the use.
        files = {name: stack.enter_context(open(folder / name, "rb")) for name in dtypes}
        if "files" in meta:
            _check_sums(folder, files, meta["files"])
        arrays: dict[str, Any] = {name: _mapped(file, dtypes[name]) for name, file in files.items()}
        left_out = meta.get("left_out", {})
        splits = {
            split: Split(**{x: arrays[f"{split}.{x}"] for x in ("tokens", *FILES)}, n_left_out=left_out.get(split, 0))
            for split in SPLITS
        }
        if "files" not in meta:
            _add_sums(folder, meta, splits, n_ids)
    with contextlib.suppress(OSError):  # of another user
        os.utime(folder / META)  # when it was last used, as jaxlm.cache tells
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


def _meta_of(folder: Path) -> dict[str, Any]:
    """Return meta.json. Raises OSError or ValueError if it is not as it was written."""
    meta = utf8.read_json(folder / META)
    if meta.keys() & {"files", "sum"} and meta.pop("sum", None) != _sum_of(meta):
        raise ValueError(f"{META} is not as it was written")
    return meta


def _sum_of(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(meta, sort_keys=True).encode())


def _check_sums(
    folder: Path, files: Mapping[str, BufferedReader], expected: Mapping[str, Any], is_full: bool = False
) -> None:
    """Raise ValueError unless the files have their sizes and checksums.

    All blocks are compared, except where a file has neither moved nor changed since that was done and is larger than
    CHECKED_BYTES, unless it `is_full`: then as many blocks as that, chosen anew at each start.
    """
    try:
        checked = utf8.read_json(folder / CHECKED)
    except (OSError, ValueError):
        checked = {}
    for name, file in files.items():
        size, sums = expected[name]
        if os.fstat(file.fileno()).st_size != size:
            raise ValueError(f"{name} has {os.fstat(file.fileno()).st_size} bytes, not {size}")
        blocks = list(range(len(sums)))
        if checked.get(name) == _state(file) and not is_full:
            blocks = sorted(random.sample(blocks, min(len(sums), CHECKED_BYTES // BLOCK)))
        for i in blocks:
            if _sum_of_block(file, i) != sums[i]:
                raise ValueError(f"{name} is not as it was written")
    if checked != (states := {name: _state(file) for name, file in files.items()}):
        with contextlib.suppress(OSError):  # read-only: it is checked in full each time
            (folder / CHECKED).write_text(json.dumps(states))


def _sum_of_block(file: BinaryIO, i: int) -> str:
    """Return the checksum of a block of a file, read in small pieces, so that no file is larger in memory."""
    file.seek(i * BLOCK)
    found, left = xxhash.xxh3_64(), BLOCK
    while left and (piece := file.read(min(PIECE, left))):
        found.update(piece)
        left -= len(piece)
    return found.hexdigest()


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


@dataclass(frozen=True)
class _Progress:
    """How far a build is that was interrupted: all before is in the files, whose sizes and checksums are these."""

    part: int = 0  # of Source.parts
    articles: int = 0  # of that part
    n_bytes: int = 0  # of text
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # size, xxh3
    left_out: Mapping[str, int] = field(default_factory=dict)  # by split, articles that are equal to one before


def _build(source: Source, tokenizer: Tokenizer, folder: Path, on_progress: Callable[[int], None]) -> None:
    unfinished = temporary.name_for(folder)
    n_ids = tokenization.n_ids(tokenizer)
    dtypes = _dtypes(n_ids)
    try:
        with os_errors(f"{unfinished}: the token cache cannot be written", f"free some space, or {OTHER_FOLDER}"):
            done, hashes = _taken_over(folder, unfinished)
            unfinished.mkdir(parents=True, exist_ok=True)
            with temporary.claimed(unfinished):
                with contextlib.ExitStack() as stack:
                    kinds = dtypes | ({HASHES: np.dtype(np.uint64)} if source.is_unique else {})
                    files = {
                        name: stack.enter_context(_File(unfinished / name, kind, *hashes.get(name, ())))
                        for name, kind in kinds.items()
                    }
                    left_out = _write(source, tokenizer, files, done, unfinished, on_progress)
                (unfinished / HASHES).unlink(missing_ok=True)
                for name in dtypes:
                    temporary.fsync(unfinished / name)
                meta: dict[str, Any] = {"dtype": dtypes["train.tokens"].name, "source": source.description}
                meta |= {"left_out": left_out} if source.is_unique else {}
                _write_meta(unfinished, meta, dtypes)
                (unfinished / temporary.PROGRESS).unlink(missing_ok=True)
            _move(unfinished, folder, n_ids)
    finally:
        if not (unfinished / temporary.PROGRESS).is_file():
            shutil.rmtree(unfinished, ignore_errors=True)


def _taken_over(folder: Path, unfinished: Path) -> tuple[_Progress, dict[str, tuple[int, xxhash.xxh3_64]]]:
    """Rename the files of an interrupted build of this cache to `unfinished`, if they are complete.

    Returns its progress, and the size and the running hash of each file; all empty if there is none.
    """
    for other in folder.parent.glob(f"{folder.name}.*.tmp"):
        if (other / temporary.PROGRESS).is_file() and (temporary.is_own(other) or temporary.is_abandoned(other)):
            try:
                other.rename(unfinished)
                with slow("checking what an interrupted build of the token cache has left"):
                    done = _Progress(**utf8.read_json(unfinished / temporary.PROGRESS))
                    hashes = {name: (size, _hashed(unfinished / name, size)) for name, (size, _) in done.files.items()}
                    for name, (_, expected) in done.files.items():
                        if hashes[name][1].hexdigest() != expected:
                            raise ValueError(f"{name} is not as it was written")
                note(f"{folder}: continues an unfinished token cache, after {done.n_bytes / 1e6:,.0f} MB of text")
                return done, hashes
            except (OSError, ValueError, TypeError) as error:
                warn(f"{other}: a token cache that was begun before is damaged ({error}); it begins anew")
    shutil.rmtree(unfinished, ignore_errors=True)
    return _Progress(), {}


def _hashed(path: Path, size: int) -> xxhash.xxh3_64:
    """Return the running hash of the first bytes of a file."""
    found = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while size and (piece := file.read(min(PIECE, size))):
            found.update(piece)
            size -= len(piece)
    return found


class _File:
    """A file that is appended to, by plain writes: a full disk under a memory map would kill the process."""

    def __init__(self, path: Path, dtype: np.dtype, size: int = 0, running: xxhash.xxh3_64 | None = None):
        """`size` and `running`: of the bytes of an interrupted build, which stay."""
        self.dtype, self.size, self.hash = dtype, size, running or xxhash.xxh3_64()
        if running:
            os.truncate(path, size)
        self.file = open(path, "ab" if running else "wb")

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.file.close()

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def kept(self) -> tuple[int, str]:
        """Have on the disk what was written; return its size and hash."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.size, self.hash.hexdigest()


def _write_meta(folder: Path, meta: dict[str, Any], names: Iterable[str]) -> None:
    """Write meta.json with the sizes and checksums of the files beside it."""
    sums: dict[str, tuple[int, list[str]]] = {}
    states = {}
    for name in names:
        with open(folder / name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            blocks = [_sum_of_block(file, i) for i in range(-(-size // BLOCK))]
            sums[name], states[name] = (size, blocks), _state(file)
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
    source: Source,
    tokenizer: Tokenizer,
    files: Mapping[str, _File],
    done: _Progress,
    folder: Path,
    on_progress: Callable[[int], None],
) -> dict[str, int]:
    """Tokenize the articles, many at a time on all cores, and append them to the files of their splits.

    Returns how many were left out as duplicates, by split. The progress of a source that is large, or that has to be
    fetched, is kept, for a build that is interrupted.
    """
    if not done.files:
        for split in SPLITS:
            files[f"{split}.offsets"].write(np.zeros(1, np.int64))
    parts = source.parts or (source.articles,)
    seen = _Seen(np.fromfile(folder / HASHES, np.uint64)) if source.is_unique else None
    left_out = Counter(done.left_out)

    def articles() -> Iterator[tuple[int, int, Article]]:
        for i in range(done.part, len(parts)):
            for n, article in enumerate(parts[i](), start=1):
                if i > done.part or n > done.articles:
                    yield i, n, article

    n_bytes = n_kept = done.n_bytes
    for chunk in _ahead(tokenization.chunks(articles(), lambda item: len(item[2].text))):
        *place, _ = chunk[-1]
        found = [article for *_, article in chunk]
        if seen is not None:
            hashes = np.array([xxhash.xxh3_64_intdigest(f"{x.split}\0{x.text}".encode()) for x in found], np.uint64)
            is_new = seen.add(hashes)
            files[HASHES].write(hashes[is_new])
            left_out.update(x.split for x, new in zip(found, is_new, strict=True) if not new)
            found = [x for x, new in zip(found, is_new, strict=True) if new]
        n_bytes += _tokenize(found, tokenizer, source.has_values, files)
        if n_kept == done.n_bytes:
            _check_room(folder, source.n_bytes - n_bytes, sum(file.size for file in files.values()) / max(n_bytes, 1))
        if (source.is_remote or source.n_bytes >= LARGE) and n_bytes - n_kept >= KEPT_EVERY:
            sizes = {name: file.kept() for name, file in files.items()}
            progress = _Progress(place[0], place[1], n_bytes, sizes, left_out)
            temporary.replace_text(folder / temporary.PROGRESS, json.dumps(asdict(progress)))
            n_kept = n_bytes
        on_progress(n_bytes)
    return dict(left_out)


def _tokenize(articles: Sequence[Article], tokenizer: Tokenizer, has_values: bool, files: Mapping[str, _File]) -> int:
    """Append articles to the files of their splits; return the bytes of their texts."""
    encodings = tokenizer.encode_batch_fast([article.text for article in articles], add_special_tokens=False)
    rows: dict[str, list[tuple[Article, list[int]]]] = {}
    for article, encoding in zip(articles, encodings, strict=True):
        rows.setdefault(article.split, []).append((article, encoding.ids))
    return sum(_append(split, of_split, has_values, files) for split, of_split in rows.items())


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items; a thread makes the next one while the caller uses the last."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


class _Seen:
    """The hashes of the texts so far, 8 bytes each: sorted arrays, each longer than the next."""

    def __init__(self, hashes: np.ndarray):
        self.levels = [np.sort(hashes)]

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Return which of some hashes are new, and add these."""
        is_new = np.zeros(len(hashes), bool)
        is_new[np.unique(hashes, return_index=True)[1]] = True
        for level in filter(len, self.levels):
            is_new &= level[np.minimum(np.searchsorted(level, hashes), len(level) - 1)] != hashes
        added = np.sort(hashes[is_new])
        while self.levels and len(self.levels[-1]) <= len(added):
            added = np.sort(np.concatenate([self.levels.pop(), added]))
        self.levels.append(added)
        return is_new


def _append(split: str, rows: list[tuple[Article, list[int]]], has_values: bool, files: Mapping[str, _File]) -> int:
    """Append articles to the files of their split; return the bytes of their texts. Values are stored as float32."""
    tokens, offsets = files[f"{split}.tokens"], files[f"{split}.offsets"]
    sizes = np.fromiter((len(ids) for _, ids in rows), np.int64, len(rows))
    n_bytes = np.fromiter((len(article.text.encode()) for article, _ in rows), np.int64, len(rows))
    begin = tokens.size // tokens.dtype.itemsize
    tokens.write(np.fromiter(itertools.chain.from_iterable(ids for _, ids in rows), tokens.dtype, int(sizes.sum())))
    offsets.write(begin + np.cumsum(sizes))
    kind = np.float32 if has_values else np.int32
    files[f"{split}.labels"].write(np.fromiter((article.label for article, _ in rows), kind, len(rows)))
    files[f"{split}.n_bytes"].write(n_bytes)
    return int(n_bytes.sum())


def _check_room(folder: Path, n_left: int, rate: float) -> None:
    """Raise UserError unless the disk has room for the tokens of the bytes of text that are left, at so many a byte."""
    free = shutil.disk_usage(folder).free
    if n_left * rate > free:
        what = f"the token cache needs about {n_left * rate / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free"
        raise UserError(f"{folder}: {what}; free some space, or {OTHER_FOLDER}")
