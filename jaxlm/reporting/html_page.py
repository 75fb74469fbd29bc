"""Pieces of a page that is one file: its style, tables, and line charts as SVG. No scripts, nothing from elsewhere.

Colours are those of the style, light or dark as the reader has it; curves differ in their dashes, too, so that nobody
has to tell them by colour.
"""

import dataclasses
import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxlm import terminal

COLOURS = tuple(f"var(--c{i})" for i in range(1, 7))  # of curves
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "1 3.5")
BOUND = "var(--bound)"
WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 20, 10, 38  # around the curves
MOST_POINTS = 400  # of a curve; of more, the least and the largest of each part are drawn
LONG = 24  # characters of a table's head that stay on one line
MOST_HOVERS = 120  # areas of a chart that show their values where the pointer is

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f24; --soft: #5b6270; --grid: #d5d8de; --band: #f4f5f7;
  --c1: #0b63ce; --c2: #d06a00; --c3: #00825f; --c4: #aa3377; --c5: #836800; --c6: #555b66;
  --bound: #c2263a; --good: #14713d; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e8eaee; --soft: #a2a9b6; --grid: #3a3f49;
  --band: #1e2127; --c1: #6db1ff; --c2: #ffad4d; --c3: #4fd6a8; --c4: #ef94cf; --c5: #e3c84f; --c6: #b4bac5;
  --bound: #ff7183; --good: #6fd69a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p { max-width: 46rem; margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figure > b { font-size: .95rem; } figcaption { font-size: .85rem; color: var(--soft); display: flex; flex-wrap: wrap;
  gap: 0 1rem; overflow-wrap: anywhere; } figcaption svg { width: 2rem; height: .6rem; display: inline-block; }
.hover { fill: transparent; } .hover:hover { fill: var(--ink); fill-opacity: .08; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { white-space: nowrap; } th.long { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
@media (max-width: 40rem) { table { font-size: .75rem; } th, td { padding: .25rem .35rem; } th { white-space: normal; }
  svg text { font-size: 14px; } }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
tbody tr:nth-child(even) { background: var(--band); }
.pass { color: var(--good); } .fail { color: var(--bound); font-weight: 700; }
summary { cursor: pointer; padding: .4rem 0; }
code { font-size: .85em; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; line-height: 1.4; margin: .3rem 0;
  background: var(--band); padding: .6rem; border-radius: .4rem; }
.totals { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.totals div { background: var(--band); padding: .6rem .9rem; border-radius: .5rem; flex: 1 1 9rem; }
.totals b { display: block; font-size: 1.35rem; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Values `y` at increasing places `x`; what is not finite, or has no place on a log scale, is left out."""

    label: str  # "": not in the legend
    x: np.ndarray
    y: np.ndarray
    colour: str = COLOURS[0]
    dashes: str = ""
    width: float = 1.8
    has_dots: bool = False
    best: float | None = None  # the place of the best value, which gets a ring


def page(title: str, parts: Sequence[str]) -> str:
    """Return a page, whose control characters are shown."""
    return terminal.shown(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def text(plain: str) -> str:
    """Return text as a page has it."""
    return html.escape(plain)


def totals(figures: Iterable[tuple[str, str]]) -> str:
    """Return figures, each with what it is, large."""
    shown = "".join(f"<div><b>{html.escape(x)}</b>{html.escape(name)}</div>" for name, x in figures)
    return f'<div class="totals">{shown}</div>'


def table(head: Sequence[str], lines: Iterable[Sequence[str]], label: str) -> str:
    """Return a table; cells that begin with a digit are numbers."""

    def cell(text: str) -> str:
        kind = {"pass": ' class="pass"', "FAIL": ' class="fail"', "MISSED": ' class="fail"'}.get(text, "")
        if re.match(r"-?\d", text) and " " not in text:
            kind = ' class="number"'
        return f"<td{kind}>{html.escape(text)}</td>"

    long = {True: ' class="long"', False: ""}
    heads = "".join(f'<th scope="col"{long[len(x) > LONG]}>{html.escape(x)}</th>' for x in head)
    body = "\n".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(label)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def folded(summary: str, content: str, is_open: bool = False) -> str:
    """Return content that is shown when its summary is asked to."""
    return f"<details{' open' if is_open else ''}><summary>{html.escape(summary)}</summary>{content}</details>"


def chart(
    title: str, curves: Sequence[Curve], x_label: str = "update", is_log: bool = False, levels: Sequence[Curve] = ()
) -> str:
    """Return curves over one another, with a legend if there are several, and their values where the pointer is.

    A level is a curve of one point, drawn as a line across at its value. How many values cannot be drawn is said below.
    "" if the curves have no values at all.
    """
    drawable = [(curve, *_drawable(curve, is_log)) for curve in curves]
    n_left_out = sum(len(curve.y) for curve in curves) - sum(len(x) for _, x, _ in drawable)
    drawable = [(curve, x, y) for curve, x, y in drawable if len(x)]
    levels = [level for level in levels if len(_drawable(level, is_log)[1])]
    scaled = f"<b>{html.escape(title)}</b>{' <small>(log scale)</small>' if is_log else ''}"
    rule = "zero, negative or not finite" if is_log else "not finite"
    if not drawable:
        nothing = f"All {n_left_out:,} values are {rule}."
        return f"<figure>{scaled}<p>{nothing}</p></figure>" if n_left_out else ""
    scale = np.log10 if is_log else np.asarray
    left, right = _span(np.concatenate([x for _, x, _ in drawable]), margin=0)
    values = [y for _, _, y in drawable] + [level.y for level in levels]
    low, high = _span(np.concatenate([scale(y) for y in values]), margin=0.04)
    place_x = lambda x: LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    place_y = lambda y: HEIGHT - BOTTOM - (scale(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    parts = []
    for value in _log_ticks(low, high) if is_log else _ticks(low, high):
        at = f"{place_y(value):.1f}"
        parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" stroke="var(--grid)" stroke-width=".7"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at}" dy=".35em" text-anchor="end">{_short(value)}</text>')
    are_whole = all(np.all(x == np.round(x)) for _, x, _ in drawable)  # as updates are
    for value in [tick for tick in _ticks(left, right, most=6) if tick == round(tick) or not are_whole]:
        at = f"{place_x(value):.1f}"
        parts.append(f'<path d="M{at} {HEIGHT - BOTTOM}v4" stroke="var(--soft)"/>')
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_short(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    for level in levels:
        line = f'stroke="{level.colour}" stroke-width="{level.width}" stroke-dasharray="{level.dashes}"'
        parts.append(f'<path class="level" d="M{LEFT} {place_y(level.y[0]):.1f}H{WIDTH - RIGHT}" {line}/>')
    for curve, x, y in drawable:
        shown_x, shown_y = _thinned(x, y)
        points = [f"{a:.1f} {b:.1f}" for a, b in zip(place_x(shown_x), place_y(shown_y), strict=True)]
        if len(points) > 1:
            line = f'stroke="{curve.colour}" stroke-width="{curve.width}" stroke-dasharray="{curve.dashes}"'
            parts.append(f'<path d="M{" ".join(points)}" fill="none" stroke-linejoin="round" {line}/>')
        if curve.has_dots or len(points) == 1:
            dots = "".join(f"M{point}h0" for point in points)
            parts.append(
                f'<path class="dots" d="{dots}" stroke="{curve.colour}" stroke-width="5" stroke-linecap="round"/>'
            )
        for value in y[x == curve.best]:
            at = f'cx="{place_x(curve.best):.1f}" cy="{place_y(value):.1f}"'
            parts.append(f'<circle class="best" {at} r="6" fill="none" stroke="{curve.colour}" stroke-width="2"/>')
    parts += _hovers(drawable, levels, title, x_label, place_x)
    spans = "; ".join(f"{curve.label or title} from {_short(y[0])} to {_short(y[-1])}" for curve, _, y in drawable)
    name = html.escape(f"{title}{', log scale' if is_log else ''}: {spans}")
    shown = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
    below = _legend([*(curve for curve, _, _ in drawable), *levels])
    if n_left_out:
        below += f"<span>{n_left_out:,} {'value is' if n_left_out == 1 else 'values are'} {rule}, and left out.</span>"
    if longest := max((len(x) for _, x, _ in drawable if len(x) > MOST_POINTS), default=0):
        below += f"<span>Of {longest:,} values, the lowest and the highest of each stretch are drawn.</span>"
    caption = f"<figcaption>{below}</figcaption>" if below else ""
    return f"<figure>{scaled}{shown}{''.join(parts)}</svg>{caption}</figure>"


def _legend(curves: Sequence[Curve]) -> str:
    named = [curve for curve in curves if curve.label]
    entries = [
        f'<span><svg viewBox="0 0 40 12" aria-hidden="true"><path d="M1 6H39" fill="none" stroke="{curve.colour}" '
        f'stroke-width="{max(curve.width, 2)}" stroke-dasharray="{curve.dashes}"/></svg> '
        f"{html.escape(curve.label)}</span>"
        for curve in (named if len(named) > 1 else [])
    ]
    if any(curve.best is not None for curve in curves):
        ring = '<circle cx="20" cy="6" r="5" fill="none" stroke="currentColor" stroke-width="2"/>'
        entries.append(f'<span><svg viewBox="0 0 40 12" aria-hidden="true">{ring}</svg> best step</span>')
    return "".join(entries)


def _drawable(curve: Curve, is_log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a curve that have a place."""
    x, y = np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)
    is_fine = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not is_log))
    return x[is_fine], y[is_fine]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that are worth drawing."""
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS // 2)
    kept = {int(i) for part in parts for i in (part[y[part].argmin()], part[y[part].argmax()])}
    indices = sorted(kept | {0, len(x) - 1})
    return x[indices], y[indices]


def _hovers(
    drawable: Sequence[tuple[Curve, np.ndarray, np.ndarray]],
    levels: Sequence[Curve],
    title: str,
    x_label: str,
    place_x: Callable[[Any], Any],
) -> list[str]:
    """Return areas from the left to the right, each with the values there as its tooltip."""
    every = np.unique(np.concatenate([x for _, x, _ in drawable]))
    stretch = (MOST_HOVERS * (every - every[0]) / max(every[-1] - every[0], 1e-9)).clip(0, MOST_HOVERS - 1).astype(int)
    groups = np.split(every, np.flatnonzero(np.diff(stretch)) + 1)
    middles = place_x(np.array([group.mean() for group in groups]))
    borders = [LEFT, *(middles[1:] + middles[:-1]) / 2, WIDTH - RIGHT]
    areas = []
    for group, start, end in zip(groups, borders[:-1], borders[1:], strict=True):
        lines = [f"{x_label} {_range(group)}"]
        for curve, x, y in drawable:
            if len(here := y[(x >= group[0]) & (x <= group[-1])]):
                is_best = curve.best is not None and group[0] <= curve.best <= group[-1]
                lines.append(f"{curve.label or title}: {_range(here)}{' (best step)' if is_best else ''}")
        lines += [f"{level.label}: {_range(level.y)}" for level in levels]
        area = f'x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        shown = html.escape("\n".join(lines))
        areas.append(f'<rect class="hover" {area}><title>{shown}</title></rect>')
    return areas


def _range(values: np.ndarray) -> str:
    low, high = (f"{x:,.0f}" if abs(x) >= 10_000 else f"{x:,.5g}" for x in (float(values.min()), float(values.max())))
    return low if low == high else f"{low} to {high}"


def _span(values: np.ndarray, margin: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if low == high:
        more = abs(low) / 10 or 1.0
        return low - more, high + more
    more = margin * (high - low)
    return low - more, high + more


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from low to high, about `most`."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between the logarithms, or few round numbers where there is no room for two powers."""
    first, last = math.ceil(low), math.floor(high)
    if last - first >= 1:
        every = -(-(last - first + 1) // 6)
        return [10.0**i for i in range(first, last + 1, every)]
    return [x for x in _ticks(10**low, 10**high, most=4) if x > 0]


def _short(x: float) -> str:
    """Return a number of few letters."""
    x = float(x) + 0.0  # no minus before zero
    for unit, size in (("M", 1e6), ("k", 1e4)):
        if abs(x) >= size:
            size = 1e3 if unit == "k" else size
            return f"{x / size:.4g}{unit}"
    return f"{x:.4g}"
