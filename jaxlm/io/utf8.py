"""Reading text: UTF-8, without a byte-order mark. Anything else raises ValueError with a fix.

Lines end at \\n, \\r\\n or \\r, not at the other characters of `str.splitlines`. Messages of the errors continue a
sentence that begins with the name of the file and "is".
"""

import codecs
import contextlib
import gzip
import io
import json
import lzma
import re
import sys
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

TAB = "\t"  # between the two texts of a line
COMPRESSED = (".gz", ".xz", ".zst")
LONGEST = 1 << 26  # characters of a line or document: tokenizing it takes about 8 GB
START = 1 << 16  # bytes; a NUL among them means binary data
DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)  # errors of damaged .gz and .xz files
MARKS = {  # longest first: UTF-32's mark begins with UTF-16's
    **{codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"},
    **{codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"},
}
CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # bytes of binary data, found in no text encoding
BINARY = "binary, or text in UTF-16; give UTF-8 text (of UTF-16, as with iconv -f UTF-16LE -t UTF-8 OLD > NEW)"
LFS = b"version https://git-lfs.github.com/spec/"  # start of a Git LFS pointer
LONG_NUMBER = f"has a number of more than {sys.get_int_max_str_digits():,} digits; shorten it, or put it in quotes"
TOO_LONG = f"longer than {LONGEST:,} characters; break it into shorter ones"


def decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of blocks of bytes. Raises ValueError with the position of the first byte that is not UTF-8."""
    decoder, n_read, start = codecs.getincrementaldecoder("utf-8")(), 0, b""
    try:
        for block in blocks:
            is_first = not n_read
            n_read += len(block)
            if is_first:
                start = block[:START]
                _check_mark(start)
                if b"\0" in start:
                    raise ValueError(BINARY)
            text = decoder.decode(block)
            yield text.removeprefix("\ufeff") if is_first else text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        if is_binary(start):
            raise ValueError(BINARY) from error
        place = n_read - len(error.object) + error.start  # the decoder keeps an incomplete character between blocks
        mend = "convert it, as with iconv -f LATIN1 -t UTF-8 OLD > NEW"
        raise ValueError(f"not UTF-8 at byte {place} (from 0); {mend}") from error


def is_binary(start: bytes) -> bool:
    """Return whether the first bytes of a file are binary data, neither UTF-8 nor text in a one-byte encoding."""
    if start.startswith(tuple(MARKS)):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return CONTROLS.search(start) is not None
    return b"\0" in start


def decode(data: bytes) -> str:
    """Return the text of bytes. Raises ValueError for what is not UTF-8."""
    return "".join(decoded([data]))


def read(path: Path) -> str:
    """Return the text of a file, with lines ending in \\n. Raises OSError, or ValueError if it is not UTF-8."""
    return decode(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")


def opened(path: Path) -> IO[bytes]:
    """Open a file for reading; .gz, .xz and .zst are decompressed on the way, and may raise one of DAMAGED while read.

    Compressed files are recognized by name or by their first bytes.
    """
    start = b""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(6)
    for suffix, first, opener in (
        (".gz", b"\x1f\x8b\x08", gzip.open),
        (".xz", b"\xfd7zXZ\0", lzma.open),
        (".zst", b"\x28\xb5\x2f\xfd", _zstd),
    ):
        if path.suffix.lower() == suffix or start.startswith(first):
            compressed: Any = opener(path, "rb")
            return compressed
    return open(path, "rb")


def _zstd(path: Path, mode: str) -> IO[bytes]:
    import pyarrow  # which takes long to import

    class Reader(io.RawIOBase):
        def __init__(self) -> None:
            self.stream = pyarrow.input_stream(str(path), compression="zstd")

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                data = self.stream.read(len(buffer))
            except OSError as error:  # of Arrow, which has no type of its own for it
                raise zlib.error(str(error)) from error
            buffer[: len(data)] = data
            return len(data)

        def close(self) -> None:
            self.stream.close()
            super().close()

    return io.BufferedReader(Reader(), 1 << 17)


def lines(stream: IO[bytes], errors: str = "strict", keep_ends: bool = False) -> Iterator[str]:
    """Yield the lines of a stream, and close it. Raises ValueError for the byte-order mark of another encoding.

    Line ends are removed unless `keep_ends`. Longer lines are cut after LONGEST + 1 characters. With
    errors="surrogateescape", bytes that are not UTF-8 become surrogates. `check` refuses both: one bad line does
    not end the stream.
    """
    with io.TextIOWrapper(stream, "utf-8-sig", errors, newline="" if keep_ends else None) as reader:
        is_first = True
        while line := reader.readline(LONGEST + 1):
            rest = line
            while not rest.endswith(("\n", "\r")) and (rest := reader.readline(LONGEST)):
                pass
            if is_first:
                _check_mark(line[:START].encode("utf-8", errors))
            is_first = False
            yield line if keep_ends else line.removesuffix("\n")


def check(text: str) -> None:
    """Raise ValueError unless a string from a pipe, the command line or JSON is valid text."""
    if len(text) > LONGEST:
        raise ValueError(TOO_LONG)
    if "\0" in text[:START]:
        raise ValueError(BINARY)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        with contextlib.suppress(UnicodeEncodeError):
            decode(text.encode("utf-8", "surrogateescape"))
        raise ValueError(f"not Unicode at character {error.start + 1}: {_half(error)}") from None


def from_json(text: str, object_of: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value of a JSON text; `object_of(pairs)` makes each object, by default a dict.

    Raises ValueError, also for half of a surrogate pair and for deep nesting.
    """
    with _parsing(text):
        value = json.loads(text, object_pairs_hook=object_of)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError or OSError if there is none."""
    value = from_json(read(path))
    if not isinstance(value, dict):
        raise ValueError("no object of JSON")
    return value


def from_toml(text: str) -> dict[str, Any]:
    """Return the values of a TOML text. Raises ValueError, also for deep nesting."""
    with _parsing(text):
        return tomllib.loads(text)


@contextlib.contextmanager
def _parsing(text: str) -> Iterator[None]:
    """Turn every error of a parser into a ValueError with a reason; syntax errors are not changed."""
    try:
        yield
    except RecursionError:
        raise ValueError("nested too deeply; flatten it") from None
    except UnicodeEncodeError as error:
        raise ValueError(_half(error)) from None
    except ValueError as error:
        if why := stand_in(text[:START].encode("utf-8", "replace")):
            raise ValueError(why) from None
        if isinstance(error, json.JSONDecodeError | tomllib.TOMLDecodeError):
            raise
        raise ValueError(LONG_NUMBER) from None


def _half(error: UnicodeEncodeError) -> str:
    code = f"\\u{ord(error.object[error.start]):04x}"
    return f"{code} is half of a surrogate pair, not a character; write both halves, or leave it out"


def joined(text: str, pair: str | None) -> str:
    """Return a text as predictors take it: if there are two, with a tab between them."""
    return text if pair is None else f"{text.replace(TAB, ' ')}{TAB}{pair}"


def stand_in(start: bytes) -> str:
    """Return what a file really is if its first bytes are a pointer or a web page; "" if it may be what it claims."""
    if not start:
        return "empty; copy or download it again"
    start = start.removeprefix(codecs.BOM_UTF8)
    if start.startswith(LFS):
        return "a pointer of Git LFS, not the file itself; run git lfs pull in its folder"
    if re.match(rb"(\.\./)*(\.git)?/annex/objects/", start):
        return "a pointer of git-annex, not the file itself; run git annex get in its folder"
    if re.match(rb"\s*<(!doctype|html|head|error|\?xml)", start, re.IGNORECASE):
        return "a page of HTML or XML, not the file itself; download the raw file"
    return ""


def _check_mark(data: bytes) -> None:
    if data.startswith(LFS):
        raise ValueError(stand_in(data))
    for mark, name in MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"{name}, not UTF-8; convert it, as with iconv -f {name} -t UTF-8 OLD > NEW")
