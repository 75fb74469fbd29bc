"""What the recorders of both frameworks have in common: the folder, the number of the update, and the batch."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, Self

import numpy as np

from parity_tests.record.files import Record, Writer, read

WHOLE = 2**18  # elements: of larger arrays, a sketch is kept


class Recorder:
    """A record that is being written; inside its `with` block all that the framework computes is added."""

    def __init__(self, framework: str, path: Path | str | None, whole: int, process: int | None = None):
        self.path = Path(path or tempfile.mkdtemp(prefix="parity-record-"))
        if not path:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self.writer = Writer(self.path if process is None else self.path / f"process-{process}", framework)
        self.whole, self.update = whole, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.writer.close()

    def batch(self, **arrays: Any) -> None:
        """Add inputs, labels, masks or what else this update gets; the names are free, tokens and labels are known."""
        for name, x in arrays.items():
            self.add("batch", name, x)

    def add(self, kind: str, name: str, x: Any, **line: Any) -> int:
        """Add an array; return the number of its line."""
        return self.writer.add(self.update, kind, name, **self.stored(x), **line)

    def stored(self, x: Any) -> dict[str, Any]:
        """Write an array; return what its line says."""
        return self.writer.array(np.asarray(x))

    def read(self) -> Record:
        """Return what has been recorded."""
        if not self.writer.data.closed:
            self.writer.flush()
        return read(self.path)
