"""Training metrics: throughput, MFU, watching for NaN and gradient spikes, rows of metrics.jsonl."""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from jaxlm.data.metrics import Scores, number
from jaxlm.errors import UserError
from jaxlm.training.run import Run

SPIKE, SPIKE_WINDOW = 10, 50  # warn if a gradient norm is SPIKE times the median of the last SPIKE_WINDOW updates


class Meter:
    """Reads metrics one update late, so that the device never waits; logs a row every train.log_interval updates.

    `read` copies metrics from the device and waits for them. `show` gets each update, and a text if there is one.
    `peak_flops` is that of all devices together, per second; 0: unknown.
    """

    def __init__(
        self, run: Run, read: Callable[[Any], dict[str, Any]], show: Callable[[int, str], None], peak_flops: float = 0.0
    ):
        self.run, self.read, self.show, self.peak_flops = run, read, show, peak_flops
        self.pending: tuple[int, Any, Any, int, int] | None = None
        self.is_first = True
        self.last_finite = 0
        self.norms: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.tokens, self.flops, self.clock_s = 0.0, 0.0, time.monotonic()

    def add(self, i: int, metrics: Any, real: Any, n_positions: int, n_flops: int) -> int:
        """Read the metrics of the previous update, and keep those of update `i`; return what `flush` returns.

        `real` is the share of the `n_positions` of update `i` that is no padding, a number that may still be on its
        way from other processes; `n_flops` is for all positions.
        """
        bad = self.flush()
        self.pending = (i, metrics, real, n_positions, n_flops)
        if self.is_first:
            # The first update includes the compilation: wait for it, show it, and do not time it.
            bad = self.flush()
            self.is_first = False
            self._restart_clock()
        else:
            self.show(i, "")
        return bad

    def flush(self) -> int:
        """Read the pending metrics; log them if a row is due.

        If the loss or gradient is NaN or infinite, returns the update if the run must roll back, and raises UserError
        if it must stop. Otherwise returns 0.
        """
        if self.pending is None:
            return 0
        (i, metrics, real, n_positions, n_flops), self.pending = self.pending, None
        metrics, real = self.read(metrics), float(real)
        self.tokens += real * n_positions
        self.flops += n_flops * real  # those of padding are of no use
        self.run.undo.clear()  # the first update is done: the run folder stays
        train, scores, norm = self.run.config.train, self.run.task.scores(metrics), float(metrics["grad_norm"])
        bad = [x for x in (scores["loss"], norm) if not math.isfinite(x)]
        if not bad:
            self.last_finite = i
            self._watch_norm(i, norm)
        elif train.on_nonfinite == "rollback":
            return i
        elif train.on_nonfinite == "stop":
            raise diverged(self.run, bad[0], i, self.last_finite)
        else:
            self.run.skipped.append(i)
            self.run.log.warn(
                f"step {i}: the loss is {scores['loss']} and the gradient norm {norm}; this update is skipped"
            )
        if self.is_first:
            self.run.log.say(f"first update done {time.monotonic() - self.run.started_s:.1f} s after the start")
        if i == 1 or i % train.log_interval == 0 or i == train.max_steps:
            self._log(i, scores, float(metrics["rate"]), norm, real)
        return 0

    def forget(self) -> None:
        """Drop the pending metrics: the run rolls back."""
        self.pending = None
        self.norms.clear()

    def _watch_norm(self, i: int, norm: float) -> None:
        if len(self.norms) == SPIKE_WINDOW and norm > SPIKE * (usual := statistics.median(self.norms)) > 0:
            self.run.log.warn(
                f"step {i}: the gradient norm, {norm:.3g}, is {norm / usual:,.0f} times the median of the last "
                f"{SPIKE_WINDOW} updates"
            )
        self.norms.append(norm)

    def _log(self, i: int, scores: Scores, rate: float, norm: float, real: float) -> None:
        row: dict[str, float] = {name: scores[name] for name in ("loss", "accuracy") if name in scores}
        row |= {"rate": rate, "grad_norm": norm, "real_share": real}
        speed = ""
        if not self.is_first:
            seconds = max(time.monotonic() - self.clock_s, 1e-9)
            row["tokens_per_s"] = self.tokens / seconds
            speed = f"  {row['tokens_per_s']:,.0f} tokens/s  {real:.0%} real"
            if self.peak_flops:
                row["mfu"] = self.flops / seconds / self.peak_flops
                speed += f"  {row['mfu']:.1%} of peak flops"
            self._restart_clock()
        self.run.log.row(i, "train", row)
        self.show(i, f"loss {number('loss', row['loss'])}  rate {rate:.2e}{speed}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the `with` block from the throughput."""
        paused_s = time.monotonic()
        yield
        self.clock_s += time.monotonic() - paused_s


def diverged(run: Run, value: float, step: int, last_finite: int) -> UserError:
    """Return the error that ends a run whose loss or gradient is NaN or infinite; `last_finite`: 0 if unknown."""
    before = f"and was finite at step {last_finite}; lower the rate, raise train.warmup_steps"
    if not last_finite:
        before = "and was never finite; check the initial weights, lower the rate"
    return UserError(
        f"train.learning_rate={run.config.train.learning_rate}: the loss or gradient is {value} at step {step}, "
        f"{before}, or see train.on_nonfinite ({run.dir} is kept)"
    )
