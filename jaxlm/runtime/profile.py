"""Traces of a few updates for TensorBoard, XProf and Perfetto, and a table of where the time goes."""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

SKIPPED = 3  # updates before the trace: the first one compiles, the next ones fill the queues
# Rows of the table: operations by their innermost jax.named_scope.
SCOPES = ("attention", "feed-forward", "embedding", "output layer", "optimizer")
REST = "norms, residuals, layers stacked"
DATA = "data"  # annotates the wait for a batch
Interval = tuple[float, float]


class Tracer:
    """Traces `n` updates of a run. `say` prints the table; errors of the profiler are warnings, printed by `warn`."""

    def __init__(self, folder: Path, n: int, say: Callable[[Any], None], warn: Callable[[str], None]):
        self.folder, self.n, self.say, self.warn = folder, n, say, warn
        self.n_seen = 0

    def begin(self) -> None:
        """Start the trace if its first update is next."""
        if self.n and self.n_seen == SKIPPED:
            # Without Python calls, which would be most of the trace and slow down the run.
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
        """End a trace in progress at the end of the run."""
        if self.n and SKIPPED < self.n_seen < SKIPPED + self.n:
            with self._warned():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the profiler or the disk
            self.n = 0
            self.warn(f"{self.folder}: there is no trace ({type(error).__name__}: {error})")


def table(folder: Path, program: str, n: int, seconds: float) -> Table:
    """Return a table for a trace of `n` updates; `program` is the compiled update as text."""
    scopes = dict(_scopes(program))
    times: dict[str, float] = defaultdict(float)
    busy: list[Interval] = []
    waiting_ns = 0.0
    path = sorted(folder.rglob("*.xplane.pb"))[-1]
    for line in (line for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines):
        operations, intervals = [], []
        for event in line.events:
            waiting_ns += event.duration_ns if event.name == DATA else 0
            if (operation := _operation(event)) in scopes:
                operations.append(operation)
                intervals.append((event.start_ns, event.start_ns + event.duration_ns))
        for operation, own_ns in zip(operations, _own_times(intervals), strict=True):
            times[scopes[operation]] += own_ns
        busy += intervals
    # Operations overlap on several cores: scale their times to the time in which at least one of them ran.
    busy_ns, span_ns, together_ns = _covered(busy), seconds * 1e9, max(sum(times.values()), 1)
    rows = {scope: times[scope] / together_ns * busy_ns for scope in (*SCOPES, REST)}
    rows |= {"waiting for data": waiting_ns, "device idle: host, data": max(span_ns - busy_ns, 0)}
    title = f"{n} updates in {seconds:.3f} s; the trace is in {folder}"
    result = Table("", "ms an update", "share", title=title, title_style="", title_justify="left")
    for name, ns in rows.items():
        result.add_row(name, f"{ns / n / 1e6:.2f}", f"{ns / span_ns:.1%}")
    return result


def _scopes(program: str) -> Iterator[tuple[str, str]]:
    """Yield each operation of a compiled program, and its innermost scope of SCOPES, or REST."""
    instruction = r"^\s*(?:ROOT )?%?([\w.-]+) = .*?(?:op_name=\"([^\"]*)\"|$)"
    for name, path in re.findall(instruction, program, re.MULTILINE):
        places = [(path.rfind(scope), scope) for scope in SCOPES if scope in path]
        yield name, max(places)[1] if places else REST


def _operation(event: Any) -> str:
    """Return the operation of an event, by its name in the compiled program."""
    return str(dict(event.stats).get("hlo_op", "")) or event.name.partition(" = ")[0].lstrip("%")


def _own_times(intervals: list[Interval]) -> list[float]:
    """Return the duration of each interval without the intervals nested in it."""
    own = [end - start for start, end in intervals]
    parents: list[int] = []
    for i in sorted(range(len(intervals)), key=lambda i: (intervals[i][0], -intervals[i][1])):
        start, end = intervals[i]
        while parents and intervals[parents[-1]][1] <= start:
            parents.pop()
        if parents:
            own[parents[-1]] -= end - start
        parents.append(i)
    return own


def _covered(intervals: list[Interval]) -> float:
    """Return the duration of the union of the intervals."""
    covered, until = 0.0, 0.0
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
