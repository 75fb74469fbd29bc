"""A trace of some updates, for TensorBoard's profile page, XProf and Perfetto, and a table of where their time goes."""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

SKIPPED = 3  # updates before: the first compiles, the next ones fill the queues
# Rows of the table by the jax.named_scope around the operations that they have, the inner one first.
PARTS = ("attention", "feed-forward", "embedding", "output layer", "optimizer")
REST = "norms, residuals, layers stacked"
DATA = "data"  # the annotation of the wait for a batch
Interval = tuple[float, float]


class Tracer:
    """Traces `n` updates of a run. `say` gets the table, `warn` why there is none; training goes on in any case."""

    def __init__(self, folder: Path, n: int, say: Callable[[Any], None], warn: Callable[[str], None]):
        self.folder, self.n, self.say, self.warn = folder, n, say, warn
        self.n_seen = 0

    def begin(self) -> None:
        """Start the trace, if the next update is the first of it."""
        if self.n and self.n_seen == SKIPPED:
            # No events of Python's own calls, which would be most of it and slow down what they measure.
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            with self._outlived():
                jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True, profiler_options=options)
            self.began_s = time.perf_counter()

    def end(self, metrics: Any, update: Any, *args: Any) -> None:
        """End the trace, if this update was the last of it: a jitted function of arguments like `args`."""
        self.n_seen += 1
        if self.n and self.n_seen == SKIPPED + self.n:
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - self.began_s
            with self._outlived():
                jax.profiler.stop_trace()
                program = update.lower(*args).compile().as_text()
                self.say(table(self.folder, program, self.n, seconds))

    def close(self) -> None:
        """End the trace of a run that is over."""
        if self.n and SKIPPED < self.n_seen < SKIPPED + self.n:
            with self._outlived():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _outlived(self) -> Iterator[None]:
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
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            events = list(line.events)
            waiting_ns += sum(event.duration_ns for event in events if event.name == DATA)
            names = [(event, _operation(event)) for event in events]
            ours = [(event, name) for event, name in names if name in parts_of]
            for (_, name), own_ns in zip(ours, _own_times([event for event, _ in ours]), strict=True):
                times[parts_of[name]] += own_ns
            busy += [(event.start_ns, event.start_ns + event.duration_ns) for event, _ in ours]
    together, span_ns = sum(times.values()), seconds * 1e9
    title = f"{n} updates in {seconds:.3f} s; the trace is in {folder}"
    result = Table("", "ms an update", "share", title=title, title_style="", title_justify="left")
    # Operations overlap on a processor of several cores, so that their times are scaled to those in which any ran.
    busy_ns = _covered(busy)
    for part in (*PARTS, REST):
        result.add_row(part, *_cells(times[part] / max(together, 1) * busy_ns, n, span_ns))
    result.add_row("waiting for data", *_cells(waiting_ns, n, span_ns))
    result.add_row("device idle: host, data", *_cells(max(span_ns - busy_ns, 0), n, span_ns))
    return result


def _cells(ns: float, n: int, span_ns: float) -> tuple[str, str]:
    return f"{ns / n / 1e6:.2f}", f"{ns / span_ns:.1%}"


def _parts(program: str) -> Iterator[tuple[str, str]]:
    """Yield each operation of a compiled program, and the part of the model that it comes from."""
    for name, metadata in re.findall(
        r"^\s*(?:ROOT )?%?([\w.-]+) = .*?(?:op_name=\"([^\"]*)\"|$)", program, re.MULTILINE
    ):
        found = [(metadata.rfind(part), part) for part in PARTS if part in metadata]
        yield name, max(found)[1] if found else REST


def _operation(event: Any) -> str:
    """Return the name of the operation that an event of a trace is about, as the compiled program has it."""
    stats = dict(event.stats)
    return str(stats.get("hlo_op", "")) or event.name.partition(" = ")[0].lstrip("%")


def _own_times(events: list[Any]) -> Iterable[float]:
    """Return the time of each event of one line without that of the events inside it, in ns."""
    own = [event.duration_ns for event in events]
    open_events: list[int] = []
    for i in sorted(range(len(events)), key=lambda i: (events[i].start_ns, -events[i].duration_ns)):
        while open_events and _end(events[open_events[-1]]) <= events[i].start_ns:
            open_events.pop()
        if open_events:
            own[open_events[-1]] -= events[i].duration_ns
        open_events.append(i)
    return own


def _end(event: Any) -> float:
    return event.start_ns + event.duration_ns


def _covered(intervals: list[Interval]) -> float:
    """Return how long any of the intervals lasts."""
    covered, until = 0.0, 0.0
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
