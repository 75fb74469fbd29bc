"""Files at URLs: http and https, and what fsspec has a package for. Fetched ahead of their use, and removed behind it.

A file is known by its size and by what the server has for its content (ETag or the like), so that a token cache is
found without reading it again. Several threads fetch a few files ahead of the one that is read, into the cache folder.
A download resumes after a lost connection; a file that has changed meanwhile is refused.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxlm.config import DataConfig
from jaxlm.data import files, hub
from jaxlm.data.parts import ANNOTATED, Part, Reads, Row, Table, Wanted
from jaxlm.errors import UserError, note, os_errors
from jaxlm.io import temporary, utf8

AHEAD = 3  # files that are fetched at once: the one that is read, and those behind it
FIRST_TRIES, MOST_TRIES = 4, 7  # of a request without an answer, which asks for what there is, or for content
WAIT_S = 0.25  # between the first two; it doubles each time
TIMEOUT_S = 30  # without a byte
BLOCK = 1 << 20  # bytes written at once
RANGE = 1 << 23  # bytes of one request to what fsspec reads
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which the same request may succeed
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "sha256", "LastModified", "last_modified", "mtime")  # fsspec's keys
FETCH_AGAIN = "run again, which continues where this ended"
HUB_FORM = "write hf://datasets/OWNER/NAME/FILE"
T = TypeVar("T")


class File(NamedTuple):
    url: str
    size: int  # bytes; -1: not told
    version: str  # what the server has for the content; "": nothing


class ChangedError(UserError):
    def __init__(self, file: File, found: object):
        super().__init__(
            f"{file.url}: has changed while it was read (it was {file.version} of {file.size} bytes, and is {found}); "
            "run again to begin with the new file"
        )


def is_url(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def open_parts(config: DataConfig, reads: Reads, splits: dict[str, str], cache_dir: Path) -> list[Part]:
    """Return the files of URLs by split as parts, without fetching them yet. Raises UserError."""
    if reads in ANNOTATED:
        url = next(iter(splits.values()))
        raise UserError(f"{url}: a classifier looks at all labels first; fetch the file, and give its path")
    parts = []
    for split, url in splits.items():
        setting = "data.path" if split == "train" else f"data.{split}_path"
        found = _listed(setting, url, cache_dir)
        spool = _Spool(found, cache_dir / "downloads")
        for i, file in enumerate(found):
            kind = config.format if config.format != "auto" else files.format_by_name(Path(file.url.partition("?")[0]))
            if not kind:
                raise UserError(f"{file.url}: its name tells no format; set data.format")
            own = Wanted(_with_format(config, kind), reads, split)
            columns = [getattr(config, name) for name, _, _ in own.choices] + [config.header, own.config.documents]
            table = Table(partial(_rows, spool, i, own), (columns, None, False))
            is_packed = kind == "parquet" or Path(file.url).suffix in utf8.COMPRESSED
            size = max(file.size, 0) * (hub.GROWTH if is_packed else 1)
            parts.append(Part(file.url, split, kind, f"{file.version} {file.size}", size, table, True))
    return parts


def _with_format(config: DataConfig, kind: str) -> DataConfig:
    plain = {"text": "line", "wikitext": "wikitext"}.get(kind, "column")
    found: dict[str, Any] = {"format": kind, "documents": plain if config.documents == "auto" else config.documents}
    return dataclasses.replace(config, **found)


def _rows(spool: "_Spool", i: int, wanted: Wanted) -> Iterator[Row]:
    with spool.fetched(i) as path:
        try:
            yield from files.open_part(path, wanted).rows()
        except UserError as error:
            raise UserError(str(error).replace(str(path), spool.files[i].url)) from error


# Which


def _listed(setting: str, pattern: str, cache_dir: Path) -> list[File]:
    """Return the files of a URL: {00..12} stands for numbers, and for fsspec * for any name.

    Where they cannot be reached, they are what they were when they were last listed. Raises UserError.
    """
    path = cache_dir / "downloads" / f"{hashlib.sha256(pattern.encode()).hexdigest()[:32]}.json"
    try:
        urls = _expanded(setting, pattern)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            found = list(threads.map(partial(_file, setting), urls))
    except UnreachableError as error:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = [File(*file) for file in utf8.read_json(path)["files"]]
            note(f"{error}; taken to be what it was last")
            return found
        raise
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace_text(path, json.dumps({"pattern": pattern, "files": found}))
    return found


class UnreachableError(UserError):
    pass


def _expanded(setting: str, pattern: str) -> list[str]:
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = int(braces[1]), int(braces[2])
        numbers = [f"{i:0{len(braces[1])}}" for i in range(first, last + 1)]
        urls = [pattern[: braces.start()] + number + pattern[braces.end() :] for number in numbers]
        return [url for each in urls for url in _expanded(setting, each)]
    if "*" not in pattern or pattern.startswith("http"):
        return [pattern]
    fs, path = _filesystem(setting, pattern)
    urls = [fs.unstrip_protocol(found) for found in sorted(_asked(setting, pattern, partial(fs.glob, path)))]
    if not urls:
        raise UserError(f"{setting}={pattern}: there is no such file; check the name")
    return urls


def _file(setting: str, url: str) -> File:
    if not url.startswith("http"):
        fs, path = _filesystem(setting, url)
        info = _asked(setting, url, partial(fs.info, path))
        version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
        return File(url, info["size"] if info["size"] is not None else -1, version)

    def ask() -> File:
        with _opened(url, method="HEAD") as answer:
            return File(url, int(answer.headers.get("Content-Length", -1)), _version(answer))

    try:
        return _tried(url, ask)
    except urllib.error.HTTPError as error:
        mend = "check the URL"
        if error.code in (401, 403):
            mend = "it is not public: fetch it with your account, and give the path of the file"
        raise UserError(f"{setting}={url}: the server answers {error.code} ({error.reason}); {mend}") from error
    except ValueError as error:
        raise UserError(f"{setting}={url}: is no URL ({error}); write it as a browser copies it") from error


def _filesystem(setting: str, url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        mend = HUB_FORM if url.startswith("hf:") else "or give http(s), or a local file"
        raise UserError(f"{setting}={url}: {_one_line(error)}; {mend}") from error
    return fs, path


def _asked(setting: str, url: str, request: Callable[[], T]) -> T:
    """Return what a request to fsspec returns. Raises UserError."""
    try:
        return _tried(url, request)
    except UserError:
        raise
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError) and not error.__cause__
        rule = "there is no such file" if is_missing else _one_line(error)
        raise UserError(f"{setting}={url}: {rule}; {_mend(url, error)}") from error


def _mend(url: str, error: Exception) -> str:
    """Return what helps with a file that cannot be had, whatever is tried again."""
    if url.startswith("hf:") and not url.startswith(("hf://datasets/", "hf://buckets/")):
        return HUB_FORM
    if hub.CLOSED.search(str(error)) or isinstance(error, PermissionError):
        log_in = hub.LOG_IN if url.startswith("hf:") else "give your account as its package documents"
        return f"check the name; if it is not public, ask for access, and {log_in}"
    return HUB_FORM if isinstance(error, ValueError) and url.startswith("hf:") else "check the name"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# HTTP


def _opened(url: str, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "jaxlm", **(headers or {})})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _version(answer: Any) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _tried(url: str, request: Callable[[], T]) -> T:
    """Return what a request returns, after errors that may pass at another try. Raises UnreachableError, or others."""
    for i in range(FIRST_TRIES):
        try:
            return request()
        except Exception as error:  # of the clients that fsspec uses, too: of many types
            if not _may_pass(error):
                raise
            reason = error
        time.sleep(WAIT_S * 2**i)
    raise UnreachableError(f"{url}: cannot be reached ({_one_line(reason)}); {FETCH_AGAIN}") from reason


def _may_pass(error: Exception) -> bool:
    lasting = (UserError, FileNotFoundError, PermissionError, NotImplementedError, ValueError, _DiskError)
    # As urllib, gcsfs, aiohttp and the client of the hub tell it.
    status = getattr(error, "code", None) or getattr(error, "status", None)
    status = status or getattr(getattr(error, "response", None), "status_code", None)
    return not isinstance(error, lasting) and (not isinstance(status, int) or status in PASSING)


def _http_blocks(file: File, start: int) -> Iterator[bytes]:
    """Yield the bytes of a file from a place on. Raises ChangedError, or an error that may pass."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    with _opened(file.url, headers=headers) as answer:
        if _version(answer) != file.version:
            raise ChangedError(file, _version(answer))
        if start and answer.status != 206:  # of a server without ranges
            while start:
                start -= len(answer.read(min(BLOCK, start)))
        yield from iter(partial(answer.read, BLOCK), b"")


def _other_blocks(file: File, start: int) -> Iterator[bytes]:
    fs, path = _filesystem("data.path", file.url)
    for first in range(start, file.size, RANGE):
        yield fs.cat_file(path, first, min(first + RANGE, file.size))


def fetch(file: File, target: Path) -> None:
    """Write the content of a file to `target`, whole or not at all. Raises UserError."""
    blocks_of = _http_blocks if file.url.startswith("http") else _other_blocks
    place, n_failures = 0, 0
    full = os_errors(f"{target}: cannot be written", "free some space, or choose another folder with --data.cache-dir")
    with full, temporary.replacing(target) as new, open(new, "wb") as out:
        while True:
            try:
                for block in blocks_of(file, place):
                    with _of_disk():
                        out.write(block)
                    place, n_failures = place + len(block), 0
                if place == file.size or file.size < 0:
                    break
                reason: Exception = OSError(f"{place} of {file.size} bytes came")
            except Exception as error:
                if isinstance(error, UserError | _DiskError):
                    raise
                if not _may_pass(error):
                    raise UserError(
                        f"{file.url}: cannot be fetched ({_one_line(error)}); {_mend(file.url, error)}"
                    ) from error
                reason = error
            n_failures += 1
            if place > file.size >= 0:
                raise ChangedError(file, f"{place} bytes or more")
            if n_failures == MOST_TRIES:
                raise UserError(f"{file.url}: cannot be fetched ({reason}); {FETCH_AGAIN}") from reason
            time.sleep(WAIT_S * 2 ** (n_failures - 1))


class _DiskError(OSError):
    pass


@contextlib.contextmanager
def _of_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _DiskError(*error.args) from error


class _Spool:
    """Files in the order in which they are read, fetched by threads that end with the process."""

    def __init__(self, found: Sequence[File], folder: Path):
        self.files, self.folder = found, folder
        self.fetches: dict[int, _Fetch] = {}

    @contextlib.contextmanager
    def fetched(self, i: int) -> Iterator[Path]:
        """Yield the path of a file, which is removed at the end of the block, unless that is left before its end."""
        for j in range(i, min(i + AHEAD, len(self.files))):
            if j not in self.fetches:
                file = self.files[j]
                key = hashlib.sha256(f"{file.url} {file.version} {file.size}".encode()).hexdigest()[:32]
                name = Path(file.url.partition("?")[0]).name[-80:]
                self.fetches[j] = _Fetch(file, self.folder / f"{key}-{name}")
        fetch_of = self.fetches[i]
        fetch_of.join()
        if fetch_of.error:
            del self.fetches[i]
            raise fetch_of.error
        yield fetch_of.path
        del self.fetches[i]
        fetch_of.path.unlink(missing_ok=True)


class _Fetch(threading.Thread):
    def __init__(self, file: File, path: Path):
        super().__init__(daemon=True)
        self.file, self.path = file, path
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                fetch(self.file, self.path)
        except Exception as error:
            self.error = error
