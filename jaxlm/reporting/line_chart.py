"""Line charts as SVG, in the colours of page.css. Curves also differ in dashes, for colour-blind readers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.reporting.html_page import text

COLOURS = tuple(f"var(--c{i})" for i in range(1, 7))  # of curves
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "1 3.5")
BOUND = "var(--bound)"
WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 20, 10, 38  # margins of the plot
MOST_POINTS = 400  # of a curve; for longer ones, minimum and maximum of each stretch are drawn
MOST_HOVERS = 120  # areas of a chart with tooltips
KEY = '<svg viewBox="0 0 40 12" aria-hidden="true">'  # of an entry of the legend


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Values `y` at increasing `x`. Values that are not finite, or not positive on a log scale, are not drawn."""

    label: str  # "": not in the legend
    x: np.ndarray
    y: np.ndarray
    colour: str = COLOURS[0]
    dashes: str = ""
    width: float = 1.8
    has_dots: bool = False
    best: float | None = None  # x of the best value, which gets a ring

    def stroke(self, width: float) -> str:
        return f'stroke="{self.colour}" stroke-width="{width}" stroke-dasharray="{self.dashes}"'


class _Plane:
    """Maps values to picture coordinates."""

    def __init__(self, curves: Sequence[Curve], levels: Sequence[Curve], is_log: bool):
        self.scale: Any = np.log10 if is_log else np.asarray
        self.left, self.right = _span(np.concatenate([curve.x for curve in curves]), margin=0)
        values = self.scale(np.concatenate([curve.y for curve in [*curves, *levels]]))
        self.low, self.high = _span(values, margin=0.04)

    def x(self, x: Any) -> Any:
        return LEFT + (x - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, y: Any) -> Any:
        return HEIGHT - BOTTOM - (self.scale(y) - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def chart(
    title: str, curves: Sequence[Curve], x_label: str = "update", is_log: bool = False, levels: Sequence[Curve] = ()
) -> str:
    """Return a chart of curves, with a legend if there are several, and tooltips with their values.

    A level is a curve of one point, drawn as a horizontal line. A note tells how many values cannot be drawn. Returns
    "" if the curves have no values at all.
    """
    n_values = sum(len(curve.y) for curve in curves)
    curves, levels = _drawable(curves, is_log), _drawable(levels, is_log)
    n_left_out = n_values - sum(len(curve.y) for curve in curves)
    heading = f"<b>{text(title)}</b>{' <small>(log scale)</small>' if is_log else ''}"
    rule = "zero, negative or not finite" if is_log else "not finite"
    if not curves:
        return f"<figure>{heading}<p>All {n_left_out:,} values are {rule}.</p></figure>" if n_left_out else ""
    plane = _Plane(curves, levels, is_log)
    drawn = _axes(plane, x_label, is_log, are_whole=all(np.all(curve.x == np.round(curve.x)) for curve in curves))
    for level in levels:
        line = f"M{LEFT} {plane.y(level.y[0]):.1f}H{WIDTH - RIGHT}"
        drawn += f'<path class="level" d="{line}" {level.stroke(level.width)}/>'
    drawn += "".join(_line(curve, plane) for curve in curves)
    drawn += "".join(_hovers(curves, levels, title, x_label, plane))
    spans = "; ".join(f"{curve.label or title} from {_short(curve.y[0])} to {_short(curve.y[-1])}" for curve in curves)
    name = text(f"{title}{', log scale' if is_log else ''}: {spans}")
    below = _legend([*curves, *levels])
    if n_left_out:
        below += f"<span>{n_left_out:,} {'value is' if n_left_out == 1 else 'values are'} {rule}, and left out.</span>"
    if (longest := max(len(curve.x) for curve in curves)) > MOST_POINTS:
        below += f"<span>Of {longest:,} values, the lowest and the highest of each stretch are drawn.</span>"
    caption = f"<figcaption>{below}</figcaption>" if below else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{drawn}</svg>'
    return f"<figure>{heading}{svg}{caption}</figure>"


def _drawable(curves: Sequence[Curve], is_log: bool) -> list[Curve]:
    """Return curves with only the points that can be drawn, without curves that have none."""
    drawable = []
    for curve in curves:
        x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
        is_drawn = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not is_log))
        if is_drawn.any():
            drawable.append(dataclasses.replace(curve, x=x[is_drawn], y=y[is_drawn]))
    return drawable


def _axes(plane: _Plane, x_label: str, is_log: bool, are_whole: bool) -> str:
    """Return grid, ticks and their labels; with `are_whole`, only whole numbers on the x axis."""
    parts = []
    for value in (_log_ticks if is_log else _ticks)(plane.low, plane.high):
        at = f"{plane.y(value):.1f}"
        parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" stroke="var(--grid)" stroke-width=".7"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at}" dy=".35em" text-anchor="end">{_short(value)}</text>')
    for value in _ticks(plane.left, plane.right, most=6):
        if value == round(value) or not are_whole:
            at = f"{plane.x(value):.1f}"
            parts.append(f'<path d="M{at} {HEIGHT - BOTTOM}v4" stroke="var(--soft)"/>')
            parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_short(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{text(x_label)}</text>')
    return "".join(parts)


def _line(curve: Curve, plane: _Plane) -> str:
    """Return a curve with its dots, if any, and a ring around its best value."""
    x, y = _thinned(curve.x, curve.y)
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(plane.x(x), plane.y(y), strict=True)]
    parts = ""
    if len(points) > 1:
        parts += f'<path d="M{" ".join(points)}" fill="none" stroke-linejoin="round" {curve.stroke(curve.width)}/>'
    if curve.has_dots or len(points) == 1:
        dots = "".join(f"M{point}h0" for point in points)
        parts += f'<path class="dots" d="{dots}" stroke="{curve.colour}" stroke-width="5" stroke-linecap="round"/>'
    for value in curve.y[curve.x == curve.best]:
        at = f'cx="{plane.x(curve.best):.1f}" cy="{plane.y(value):.1f}"'
        parts += f'<circle class="best" {at} r="6" fill="none" stroke="{curve.colour}" stroke-width="2"/>'
    return parts


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about MOST_POINTS points, including peaks."""
    if len(x) <= MOST_POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(x)), MOST_POINTS // 2)
    kept = {int(i) for indices in stretches for i in (indices[y[indices].argmin()], indices[y[indices].argmax()])}
    indices = sorted(kept | {0, len(x) - 1})
    return x[indices], y[indices]


def _legend(curves: Sequence[Curve]) -> str:
    named = [curve for curve in curves if curve.label]
    entries = [
        f'<span>{KEY}<path d="M1 6H39" fill="none" {curve.stroke(max(curve.width, 2))}/></svg> '
        f"{text(curve.label)}</span>"
        for curve in (named if len(named) > 1 else [])
    ]
    if any(curve.best is not None for curve in curves):
        ring = '<circle cx="20" cy="6" r="5" fill="none" stroke="currentColor" stroke-width="2"/>'
        entries.append(f"<span>{KEY}{ring}</svg> best step</span>")
    return "".join(entries)


def _hovers(curves: Sequence[Curve], levels: Sequence[Curve], title: str, x_label: str, plane: _Plane) -> list[str]:
    """Return areas from left to right, each with the values there as its tooltip."""
    every = np.unique(np.concatenate([curve.x for curve in curves]))
    stretch = (MOST_HOVERS * (every - every[0]) / max(every[-1] - every[0], 1e-9)).clip(0, MOST_HOVERS - 1).astype(int)
    groups = np.split(every, np.flatnonzero(np.diff(stretch)) + 1)
    middles = plane.x(np.array([group.mean() for group in groups]))
    borders = [LEFT, *(middles[1:] + middles[:-1]) / 2, WIDTH - RIGHT]
    areas = []
    for group, start, end in zip(groups, borders[:-1], borders[1:], strict=True):
        first, last = group[0], group[-1]
        lines = [f"{x_label} {_range(group)}"]
        for curve in curves:
            if len(here := curve.y[(curve.x >= first) & (curve.x <= last)]):
                is_best = curve.best is not None and first <= curve.best <= last
                lines.append(f"{curve.label or title}: {_range(here)}{' (best step)' if is_best else ''}")
        lines += [f"{level.label}: {_range(level.y)}" for level in levels]
        area = f'x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        shown = text("\n".join(lines))
        areas.append(f'<rect class="hover" {area}><title>{shown}</title></rect>')
    return areas


# Numbers


def _range(values: np.ndarray) -> str:
    low, high = (f"{x:,.0f}" if abs(x) >= 10_000 else f"{x:,.5g}" for x in (float(values.min()), float(values.max())))
    return low if low == high else f"{low} to {high}"


def _span(values: np.ndarray, margin: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    more = margin * (high - low) if low < high else abs(low) / 10 or 1.0
    return low - more, high + more


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from low to high, about `most`."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two logarithms, or a few round numbers if there are not two powers."""
    first, last = math.ceil(low), math.floor(high)
    if last - first >= 1:
        every = -(-(last - first + 1) // 6)
        return [10.0**i for i in range(first, last + 1, every)]
    return [x for x in _ticks(10**low, 10**high, most=4) if x > 0]


def _short(x: float) -> str:
    """Return a number as short text."""
    x = float(x) + 0.0  # no minus before zero
    if abs(x) >= 1e6:
        return f"{x / 1e6:.4g}M"
    return f"{x / 1e3:.4g}k" if abs(x) >= 1e4 else f"{x:.4g}"
