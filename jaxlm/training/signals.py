"""How a user stops a run or has it save: signals, and files in the run folder."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.errors import signals
from jaxlm.training.log import RunLog

FILE_CHECK_S = 1.0  # between checks for the files `stop` and `save_checkpoint`


class FileWatch:
    """Looks for files that a user creates in the run folder as requests."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checked_s: dict[str, float] = {}
        self.stuck: set[str] = set()  # files that cannot be removed

    def take(self, name: str) -> bool:
        """Return whether a file exists, and remove it; checks at most once per second."""
        now = time.monotonic()
        if now - self.checked_s.get(name, 0.0) < FILE_CHECK_S:
            return False
        self.checked_s[name] = now
        path = self.folder / name
        if name in self.stuck or not os.path.lexists(path):
            return False
        try:
            path.unlink(missing_ok=True)
        except OSError:  # a folder, or a read-only disk: it counts only once
            self.stuck.add(name)
        return True


@contextlib.contextmanager
def interrupts(run_log: RunLog) -> Iterator[Callable[[], int]]:
    """Yield a function that returns 0, and the exit status after the first SIGINT or SIGTERM.

    A second signal ends the process immediately. A closed pipe at stdout counts as SIGPIPE.
    """
    status = 0

    def handle(number: int) -> None:
        nonlocal status
        if status:
            run_log.console.show_cursor()  # a progress bar hides it
            print("interrupted again: ended immediately", file=sys.stderr, flush=True)
            os._exit(128 + number)
        status = 128 + number
        run_log.say("interrupted: saving a checkpoint after this update; a second signal ends immediately")

    run_log.console.reader_gone = lambda: None if status else handle(signal.SIGPIPE)
    with signals(handle):
        yield lambda: status
