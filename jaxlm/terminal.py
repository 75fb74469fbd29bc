"""Text for terminals and pages: control characters are shown, not sent, and every character can be encoded.

Data, file names and models may hold escape sequences, which a terminal would obey. Imports nothing that takes long.
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

# C0 but for tab and newline, DEL, C1, marks and overrides of text direction, and surrogates, which cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_WHOLE: Any = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False, "expand_tabs": False}


def command(name: str) -> str:
    """Return what to type for a command of jaxlm: `jaxlm NAME` in a process started so, else `python -m jaxlm.NAME`."""
    program = sys.argv[0]
    if Path(program).stem != "jaxlm":
        return f"python -m jaxlm.{name}"
    return f"{'jaxlm' if shutil.which('jaxlm') == program else shlex.quote(program)} {name}"


def shown(text: str) -> str:
    """Return the text with a visible escape, such as \\x1b, for each control character; newlines and tabs stay."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def dumps(value: Any, **options: Any) -> str:
    """Return JSON in printable ASCII, which every terminal and every encoding takes as it is."""
    return json.dumps(value, **options).replace("\x7f", "\\u007f")


def wrapped(text: str, width: int) -> str:
    """Return text with lines of at most `width`, broken between words; a word that is wider stays whole."""
    lines = []
    for line in text.split("\n"):
        words = line.lstrip(" ")
        longest = max(map(len, words.split()), default=0)
        indent = line[: max(min(len(line) - len(words), width // 3, width - longest), 0)]
        more: dict[str, Any] = {"initial_indent": indent, "subsequent_indent": f"{indent}    "}
        lines += textwrap.wrap(words, width, **_WHOLE, **more) if len(line) > width else [line]
    return "\n".join(lines)


class Shown:
    """A text stream that shows control characters. Rich, whose colours are control characters, writes past it."""

    def __init__(self, stream: Any):
        self.rich_proxied_file = stream  # the name that Rich looks for

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(shown(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def raw(stream: Any) -> Any:
    """Return the stream inside a Shown one, for text whose control characters are our own."""
    return stream.rich_proxied_file if isinstance(stream, Shown) else stream


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Have stdout and stderr take any text: what they cannot encode and control characters come as escapes."""
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
    """Open the null device in the place of standard streams that are closed (`>&-`).

    Else the next file that is opened takes their number, and what a library prints goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
