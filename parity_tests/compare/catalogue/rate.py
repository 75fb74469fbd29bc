"""Learning rates of each update."""

from collections.abc import Iterator

import numpy as np

from parity_tests.compare.catalogue.evidence import Cause, Rule, ratio_of
from parity_tests.compare.catalogue.place import Divergence


class Curves:
    """The rates of A and of B, and where they differ."""

    def __init__(self, d: Divergence):
        self.x, self.y = d.rates
        differ = np.flatnonzero(np.abs(self.x - self.y) > 1e-6 * np.abs(self.x).max(initial=0))
        self.differ = differ
        self.start, self.end = (int(differ[0]), int(differ[-1])) if len(differ) else (0, 0)
        self.peak = int(np.argmax(self.x))  # A's
        self.apart = float(np.linalg.norm(self.x - self.y))

    def is_behind(self, shift: int, until: int) -> bool:
        """Return whether B's rates up to an update are A's of `shift` updates later."""
        x, y = self.x[:until], self.y[:until]
        one, two = (x[shift:], y[:-shift]) if shift > 0 else (x[:shift], y[-shift:])
        return len(one) > 1 and float(np.linalg.norm(one - two)) < 0.02 * float(np.linalg.norm(x - y)) + 1e-12

    def is_line(self, z: np.ndarray) -> bool:
        """Return whether rates after the peak are on a line."""
        bends = np.abs(np.diff(z[self.peak :], 2)).max(initial=0)
        return bool(bends < 0.02 * np.abs(np.diff(z[self.peak :])).max(initial=1e-30))


def shifted(d: Divergence) -> Iterator[Cause]:
    c = Curves(d)
    for shift in (1, -1):
        if c.is_behind(shift, len(c.x)):
            yield Cause("schedule offset", f"B's rate of update i is A's of update i {shift:+d}", 1.0)


def warmup(d: Divergence) -> Iterator[Cause]:
    c = Curves(d)
    if c.peak > 2 and c.end <= c.peak and c.is_behind(1, c.peak):
        yield Cause("warmup", "B's warmup is a step ahead of A's: it does not begin at 0", 0.97)
        yield Cause("schedule offset", "B's warmup is a step ahead of A's", 0.6)
    if c.x[0] < 0.5 * c.x.max() and c.y[0] > 0.99 * c.y.max():
        yield Cause("warmup", f"B has no warmup: its first rate is {c.y[0]:.3g}, A's {c.x[0]:.3g}", 0.95)
    elif c.end < c.peak:
        yield Cause("warmup", f"rates differ in updates {c.start} to {c.end}, while A's rise: another warmup", 0.7)


def scaled(d: Divergence) -> Iterator[Cause]:
    if ratio := ratio_of(*d.rates):
        yield Cause("rate scale", f"B's rate is {ratio:.6g} times A's throughout", 0.9)


def decay(d: Divergence) -> Iterator[Cause]:
    """Rates differ after the peak only."""
    c = Curves(d)
    if c.start < max(2, c.peak):
        return
    ends = float(c.x[-1]), float(c.y[-1])
    text = f"from update {c.start} on, B's rate decays to {ends[1]:.4g}, A's to {ends[0]:.4g}"
    if ends[1] < 0.2 * max(ends[0], 1e-30):
        yield Cause("minimum rate", f"{text}: another minimum", 0.9)
    if c.is_line(c.x) != c.is_line(c.y) and len(c.x) - c.peak > 3:
        yield Cause("decay shape", f"the decay of {'B' if c.is_line(c.y) else 'A'} is a line, the other a curve", 0.92)
    yield Cause("decay length", f"{text}: another length or shape", 0.65)


def resumed(d: Divergence) -> Iterator[Cause]:
    """Rates differ from an update on at which A's jumps, or at which B's does."""
    c = Curves(d)
    for which, z in (("A", c.x), ("B", c.y)):
        steps = np.abs(np.diff(z))
        if c.start > 1 and (steps[c.start - 2 : c.start + 1] > 4 * np.median(steps) + 1e-30).any():
            text = f"from update {c.start} on, where {which}'s rate jumps, as after a resume"
            yield Cause("resumed rate", text, 0.93)


def cycle(d: Divergence) -> Iterator[Cause]:
    c = Curves(d)
    signs = np.sign(c.y - c.x)[c.differ]
    if len(c.differ) > 1 and not ratio_of(c.x, c.y) and np.ptp(signs) > 0:
        text = "B's rate is above A's in some updates and below in others: a cycle of another phase, sign or shape"
        yield Cause("cycle", text, 0.68)
    if np.abs(c.x - c.y).max() < 0.1 * np.abs(c.x).max() and c.start <= 2:
        text = "rates differ by a few per cent from the start on: a cycle or a factor on the schedule"
        yield Cause("cycle", text, 0.66)


def unknown(d: Divergence) -> Iterator[Cause]:
    c = Curves(d)
    yield Cause("schedule", f"rates differ from update {c.start} to {c.end} of {len(c.x)}", 0.3)


RULES: tuple[Rule, ...] = (shifted, warmup, scaled, decay, resumed, cycle, unknown)
