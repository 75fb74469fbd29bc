"""Traces some updates, for TensorBoard's profile page, XProf and Perfetto, and shows where their time goes."""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

SKIPPED = 3  # updates before: the first compiles, the next ones fill the queues
# Rows of the table: operations by their jax.named_scope, the innermost.
PARTS = ("attention", "feed-forward", "embedding", "output layer", "optimizer")
REST = "norms, residuals, layers stacked"
DATA = "data"  # the annotation of the wait for a batch
Interval = tuple[float, float]


class Tracer:
    """Traces `n` updates of a run. Prints the table by `say`; an error of the profiler is only a warning, by `warn`."""

    def __init__(self, folder: Path, n: int, say: Callable[[Any], None], warn: Callable[[str], None]):
        self.folder, self.n, self.say, self.warn = folder, n, say, warn
        self.n_seen = 0

    def begin(self) -> None:
        """Start the trace if its first update is next."""
        if self.n and self.n_seen == SKIPPED:
            # No events of Python calls: they would be most of the trace, and slow down what they measure.
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            with self._warned():
                jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True, profiler_options=options)
            self.began_s = time.perf_counter()

    def end(self, metrics: Any, update: Any, *args: Any) -> None:
        """End the trace if this update, a jitted function of arguments like `args`, was its last."""
        self.n_seen += 1
        if self.n and self.n_seen == SKIPPED + self.n:
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - self.began_s
            with self._warned():
                jax.profiler.stop_trace()
                program = update.lower(*args).compile().as_text()
                self.say(table(self.folder, program, self.n, seconds))

    def close(self) -> None:
        """End the trace of a run that is over."""
        if self.n and SKIPPED < self.n_seen < SKIPPED + self.n:
            with self._warned():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the profiler and the disk raise
            self.n = 0
            self.warn(f"{self.folder}: there is no trace ({type(error).__name__}: {error})")


def table(folder: Path, program: str, n: int, seconds: float) -> Table:
    """Return a table on a trace of `n` updates in so many seconds; `program` is the compiled update as text."""
    parts_of = dict(_parts(program))
    times: dict[str, float] = defaultdict(float)
    busy: list[Interval] = []
    waiting_ns = 0.0
    path = sorted(folder.rglob("*.xplane.pb"))[-1]
    for line in (line for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines):
        operations, intervals = [], []
        for event in line.events:
            waiting_ns += event.duration_ns if event.name == DATA else 0
            if (operation := _operation(event)) in parts_of:
                operations.append(operation)
                intervals.append((event.start_ns, event.start_ns + event.duration_ns))
        for operation, own_ns in zip(operations, _own_times(intervals), strict=True):
            times[parts_of[operation]] += own_ns
        busy += intervals
    # Operations overlap on a processor of several cores: their times are scaled to the time in which any of them ran.
    busy_ns, span_ns, together_ns = _covered(busy), seconds * 1e9, max(sum(times.values()), 1)
    rows = {part: times[part] / together_ns * busy_ns for part in (*PARTS, REST)}
    rows |= {"waiting for data": waiting_ns, "device idle: host, data": max(span_ns - busy_ns, 0)}
    title = f"{n} updates in {seconds:.3f} s; the trace is in {folder}"
    result = Table("", "ms an update", "share", title=title, title_style="", title_justify="left")
    for name, ns in rows.items():
        result.add_row(name, f"{ns / n / 1e6:.2f}", f"{ns / span_ns:.1%}")
    return result


def _parts(program: str) -> Iterator[tuple[str, str]]:
    """Yield each operation of a compiled program, and the part of the model that it comes from."""
    instruction = r"^\s*(?:ROOT )?%?([\w.-]+) = .*?(?:op_name=\"([^\"]*)\"|$)"
    for name, scopes in re.findall(instruction, program, re.MULTILINE):
        found = [(scopes.rfind(part), part) for part in PARTS if part in scopes]
        yield name, max(found)[1] if found else REST


def _operation(event: Any) -> str:
    """Return the name in the compiled program of the operation that an event of a trace is about."""
    return str(dict(event.stats).get("hlo_op", "")) or event.name.partition(" = ")[0].lstrip("%")


def _own_times(intervals: list[Interval]) -> list[float]:
    """Return how long each of some nested intervals lasts without those inside it."""
    own = [end - start for start, end in intervals]
    around: list[int] = []
    for i in sorted(range(len(intervals)), key=lambda i: (intervals[i][0], -intervals[i][1])):
        start, end = intervals[i]
        while around and intervals[around[-1]][1] <= start:
            around.pop()
        if around:
            own[around[-1]] -= end - start
        around.append(i)
    return own


def _covered(intervals: list[Interval]) -> float:
    """Return how long any of the intervals lasts."""
    covered, until = 0.0, 0.0
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
