"""Text for terminals and pages: control characters are shown, not sent, and every character can be encoded.

Data, file names and models may hold escape sequences, which a terminal would obey. Imports nothing that takes long.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

# C0 but for tab and newline, DEL, C1, the overrides of text direction, and surrogates, which cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """Return the text with a visible escape, such as \\x1b, for each control character; newlines and tabs stay."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def dumps(value: Any, **options: Any) -> str:
    """Return JSON in printable ASCII, which every terminal and every encoding takes as it is."""
    return json.dumps(value, **options).replace("\x7f", "\\u007f")


class Shown:
    """A text stream that shows control characters. Rich, whose colours are control characters, writes past it."""

    def __init__(self, stream: Any):
        self.rich_proxied_file = stream  # the name that Rich looks for

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(shown(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Have stdout and stderr take any text: what they cannot encode and control characters come as escapes."""
    _open_closed()
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


def _open_closed() -> None:
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
