"""Pages of comparisons: curves, tables of rows, versions. Each is one HTML file without scripts."""

import dataclasses
import html
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence

import numpy as np

from jaxlm.reporting import html_page, line_chart
from parity_tests.compare.rows import Row, worst

# Of a picture; a page has them in its own style.
FIRST, SECOND, BOUND = "#0b63ce", "#d06a00", "#c2263a"
IN_PAGE = {FIRST: line_chart.COLOURS[0], SECOND: line_chart.COLOURS[1], BOUND: line_chart.BOUND}
DASHES = {"-": "", "--": "6 4", ":": "2 3"}
PACKAGES_SHOWN = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Values by update number, and what they are."""

    label: str
    values: np.ndarray
    colour: str
    style: str = "-"
    width: float = 1.5


def svg(title: str, curves: Sequence[Curve], bounds: Sequence[Curve] = (), is_log: bool = False) -> str:
    """Return a picture for a page."""
    shown = [
        line_chart.Curve(
            curve.label.strip("_"),
            np.arange(len(curve.values)),
            curve.values,
            IN_PAGE[curve.colour],
            DASHES[curve.style],
            0.8 if is_log and curve in curves else curve.width,
            has_dots=is_log and curve in curves,
        )
        for curve in [*curves, *bounds]
    ]
    return line_chart.chart(title, shown, is_log=is_log)


def of_rows(rows: Iterable[Row], label: str) -> str:
    """Return rows of a comparison as a table."""
    head = ["quantity", "", "difference", "tolerance", "where", "package"]
    return html_page.table(head, [[row.quantity, *_numbers(row), row.where, row.package] for row in rows], label)


def _numbers(row: Row) -> tuple[str, str, str]:
    return "pass" if row.passes else "FAIL", number(row.difference), number(row.tolerance) if row.tolerance else "exact"


def number(value: float) -> str:
    """Return a difference in two digits, zero as 0."""
    return f"{value:.1e}" if value else "0"


def versions() -> str:
    """Return the versions of what computed."""
    found = []
    for name in PACKAGES_SHOWN:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f'<h2>Versions</h2><p class="soft">{html.escape(", ".join([*found, system]))}</p>'


def page_of_two(name_a: str, name_b: str, a: Arrays, b: Arrays, rows: list[Row]) -> str:
    """Return the page of parity_tests.compare: curves of what has a number an update, and all rows."""
    figures = []
    for key in a:
        if "/" not in key and a[key].ndim == 1 and key in b and a[key].shape == b[key].shape:
            bound = next(row.tolerance for row in rows if row.quantity == key)
            x, y = (z[key].astype(np.float64) for z in (a, b))
            scale = np.abs(y).max() if key.startswith("rate") else np.abs(y)
            apart = np.divide(np.abs(x - y), scale, out=np.zeros_like(x), where=np.broadcast_to(scale > 0, x.shape))
            figures.append(svg(key, [Curve(name_a, x, FIRST, width=3.5), Curve(name_b, y, SECOND, "--", 1.3)]))
            bounds = [Curve("tolerance", np.full(len(x), bound), BOUND, ":")]
            figures.append(
                svg(f"{key}: difference, relative", [Curve("difference", apart, FIRST)], bounds, is_log=True)
            )
    parts = [
        f'<div class="figures">{"".join(figures)}</div>',
        "<h2>Every quantity</h2><p>The worst tensor or update.</p>",
        of_rows(worst(rows), "every quantity"),
        f"<h2>All</h2><details><summary>{len(rows)} numbers and tensors</summary>",
        of_rows(rows, "all"),
        "</details>",
    ]
    return html_page.page(f"{name_a} and {name_b}", [*parts, versions()])
