"""Rich's console for untrusted text: data, file names, model outputs."""

import copy
import os
from collections.abc import Callable
from typing import Any

import rich.console
from rich.table import Table
from rich.text import Text

from jaxlm.terminal import shown, wrapped


class Console(rich.console.Console):
    """Prints text literally: no [markup], no :emoji:, control characters escaped.

    On a terminal, lines are wrapped between words. Elsewhere, lines and tables are as wide as needed. When the pipe at
    stdout is closed, `reader_gone` is called and nothing more is printed; without it, BrokenPipeError is raised.
    """

    reader_gone: Callable[[], None] | None = None

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if not self.is_terminal and "width" not in options:
            self.width = 10_000

    def on_broken_pipe(self) -> None:
        """Handle a closed pipe; rich calls this while it handles the error."""
        if self.reader_gone is None:
            raise
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # Python flushes its buffer there
        self.reader_gone()

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text to print; also called for the cells of tables."""
        return super().render_str(shown(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects. On a terminal, lines of text are wrapped between words, and no path is cut."""
        if len(objects) == 1 and isinstance(objects[0], Table) and objects[0].title:
            table = copy.copy(objects[0])
            self.print(str(table.title))  # rich would cut the title at the width of the table
            table.title = None
            objects = (table,)
        if all(isinstance(x, str) for x in objects):
            options = {"soft_wrap": True} | options
            objects = tuple(wrapped(shown(x), self.width) for x in objects) if self.is_terminal else objects
        super().print(*objects, **options)
