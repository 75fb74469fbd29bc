"""Safe text for terminals and pages: control characters are escaped, and every character can be encoded.

Data, file names and model outputs may contain escape sequences. Imports nothing slow.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# C0 except tab and newline, DEL, C1, marks and overrides of text direction, and surrogates, which cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_WHOLE: Any = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False, "expand_tabs": False}


def command(name: str) -> str:
    """Return how to call a command: `jaxlm NAME` if this process was started so, else `python -m jaxlm.NAME`."""
    program = sys.argv[0]
    if Path(program).stem != "jaxlm":
        return f"python -m jaxlm.{name}"
    return f"{'jaxlm' if shutil.which('jaxlm') == program else shlex.quote(program)} {name}"


def shown(text: str) -> str:
    """Return the text with control characters escaped, such as \\x1b; newlines and tabs stay."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def dumps(value: Any, **options: Any) -> str:
    """Return JSON in printable ASCII, safe for every terminal and encoding."""
    return json.dumps(value, **options).replace("\x7f", "\\u007f")


def wrapped(text: str, width: int) -> str:
    """Return text with lines of at most `width` columns, broken between words; longer words are not broken."""
    lines = []
    for line in text.split("\n"):
        words = line.lstrip(" ")
        longest = max(map(len, words.split()), default=0)
        indent = line[: max(min(len(line) - len(words), width // 3, width - longest), 0)]
        more: dict[str, Any] = {"initial_indent": indent, "subsequent_indent": f"{indent}    "}
        lines += textwrap.wrap(words, width, **_WHOLE, **more) if len(line) > width else [line]
    return "\n".join(lines)


class Shown:
    """A text stream that escapes control characters. Rich, which prints colours, writes to the stream inside."""

    def __init__(self, stream: Any):
        self.rich_proxied_file = stream  # Rich looks for this name

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(shown(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def raw(stream: Any) -> Any:
    """Return the stream inside a Shown one, for text with control characters of our own."""
    return stream.rich_proxied_file if isinstance(stream, Shown) else stream


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Make stdout and stderr accept any text: control characters and unencodable ones are escaped."""
    open_closed()
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Shown):
            setattr(sys, name, Shown(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def open_closed() -> None:
    """Open the null device in place of closed standard streams (`>&-`).

    Otherwise the next opened file gets their number, and a library may print into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
