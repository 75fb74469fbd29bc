"""Rich's console, for text that may hold anything: data, file names, what a model has written."""

import copy
import os
from collections.abc import Callable
from typing import Any

import rich.console
from rich.table import Table
from rich.text import Text

from jaxlm.terminal import shown, wrapped


class Console(rich.console.Console):
    """Prints text as it is: no [markup], no :emoji:; control characters are shown.

    A terminal gets lines that fit, with whole words. Elsewhere lines and tables are as wide as they need to be.
    Once the reader of the output has gone, `reader_gone` is called and nothing more is printed; without it, printing
    raises BrokenPipeError.
    """

    reader_gone: Callable[[], None] | None = None

    def __init__(self, **options: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if not self.is_terminal and "width" not in options:
            self.width = 10_000

    def on_broken_pipe(self) -> None:
        """Do what the class says; rich calls it with the error under way."""
        if self.reader_gone is None:
            raise
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # where Python puts what is left to write
        self.reader_gone()

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text to print; the cells of tables come here as well."""
        return super().render_str(shown(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print. Lines of text break where they are; on a terminal also between words, but no path is cut."""
        if len(objects) == 1 and isinstance(objects[0], Table) and objects[0].title:
            table = copy.copy(objects[0])
            self.print(str(table.title))  # a title that rich prints is cut at the width of its table
            table.title = None
            objects = (table,)
        if all(isinstance(x, str) for x in objects):
            options = {"soft_wrap": True} | options
            objects = tuple(wrapped(shown(x), self.width) for x in objects) if self.is_terminal else objects
        super().print(*objects, **options)
