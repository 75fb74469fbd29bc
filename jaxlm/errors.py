"""Errors that the user can mend: one line on stderr, exit status 2, no traceback. And Ctrl-C before training."""

import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

CLEANUPS: list[Callable[[], None]] = []  # what removes that which Ctrl-C would leave half done


class UserError(Exception):
    """Bad input. The message is one line: the setting or file, the value, the rule broken and the mend."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean X?" for the choice most like `name`, or "" when none is near."""
    # A name that is right but for its section (`--d-model`) is matched by its last part.
    choices = list(choices)
    last = {choice.rpartition(".")[2]: choice for choice in reversed(choices)}
    match = difflib.get_close_matches(name, choices, n=1) or [
        last[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last, n=1)
    ]
    return f"; did you mean {match[0]}?" if match else ""


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn a UserError into one line on stderr and exit status 2; with `debug`, let its traceback through."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C call CLEANUPS and end the process with one line on stderr and exit status 130.

    It raises nothing, because an exception in the middle of anything can get lost, as in the callback that JAX has for
    garbage collections, come out as another error, or crash an extension module that is being loaded.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            for clean in CLEANUPS:
                clean()
            print("interrupted before training; nothing is kept", file=sys.stderr, flush=True)
        finally:
            os._exit(130)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
