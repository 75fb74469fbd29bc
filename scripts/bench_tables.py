"""What benchmark.py has found, as tables, a page, a picture, and beside what it found before."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxlm.errors import UserError

THRESHOLD = 0.1  # share by which a ratio may get worse before --compare says so
Row = dict[str, Any]  # of the results, or of the ratios, as in the JSON


def read_found(flag: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert all(isinstance(found[name], list) for name in ("results", "ratios"))
        assert {"quick", "sst2", "machine"} <= found.keys()
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f"{flag} {path}: cannot be read as what --json writes; measure it again") from error
    return found


def label(row: Row) -> str:
    """Return what the system of a row of the results is called."""
    compiled = row["compiled"] and not row["system"].startswith("jaxlm")  # which always is
    return f"{row['system']} {row['precision']}" + (" compiled" if compiled else "")


def results_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the cells of the table of results."""
    heads = ["work", "system", "tokens/s", "min to max", "first update", "peak memory", "loss", "remarks"]
    cells = []
    for row in rows:
        speed = row["tokens_per_s"]
        remarks = [row["note"]] + ([f"accuracy {row['accuracy']:.3f}"] if "accuracy" in row else [])
        cells.append(
            [
                row["work"],
                label(row),
                f"{speed['median']:,.0f}" if speed else "",
                f"{speed['min']:,.0f} to {speed['max']:,.0f}" if speed else "",
                f"{row['first_update_s']:.1f} s" if row["first_update_s"] else "",
                f"{row['peak_mb']:,.0f} MB" if row["peak_mb"] else "",
                f"{row['loss']:.3f}" if row["loss"] is not None else "",
                ", ".join(filter(None, remarks)),
            ]
        )
    return heads, cells


def ratios_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the cells of the table of ratios."""
    heads = ["work", "quantity", "against", "ratio", "range", "target", "reached", "remarks"]
    cells = []
    for row in rows:
        target = f"{'at most' if row['at_most'] else 'at least'} {row['target']:g}"
        numbers = [_number(row["ratio"]), f"{_number(row['low'])} to {_number(row['high'])}", target]
        cells.append(
            [row["work"], row["quantity"], row["against"], *numbers, "yes" if row["reached"] else "no", row["note"]]
        )
    return heads, cells


def show(console: Console, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    table = Table(*heads, box=box.SIMPLE)
    for row in cells:
        table.add_row(*row)
    console.print(table)


def markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def marks(is_on_gpu: bool) -> tuple[str, str]:
    """Return the lines around what --markdown writes."""
    name = "benchmark of a GPU" if is_on_gpu else "benchmark"
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"


def read_page(path: Path, is_on_gpu: bool) -> tuple[str, str]:
    """Return what a page has up to the tables and from their end. Raises UserError if it has no marks around them."""
    begin, end = marks(is_on_gpu)
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--markdown {path}: cannot be read ({error.strerror})") from error
    if any(page.count(mark) != 1 for mark in (begin, end)):
        raise UserError(f"--markdown {path}: it needs the lines {begin.strip()} and {end.strip()} once each")
    return page.partition(begin)[0] + begin, end + page.partition(end)[2]


def write_markdown(path: Path, found: dict[str, Any]) -> None:
    """Put the tables between the marks of a page."""
    before, after = read_page(path, "gpu" in found["machine"])
    tables = (markdown(*rows) for rows in (ratios_table(found["ratios"]), results_table(found["results"])))
    text = "\n".join([about(found) + "\n", *tables])
    path.write_text(before + text + after, encoding="utf-8")


def about(found: dict[str, Any]) -> str:
    machine = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if name != "jaxlm")
    sizes = " Tiny sizes: these figures mean nothing." if found["quick"] else ""
    device = f"one {machine['gpu']} and {machine['threads']}" if "gpu" in machine else machine["threads"]
    return (
        f"Measured on {machine['started'][:10]} on {device} cores of {machine['processor']} (load before: "
        f"{machine['load']}), commit "
        f"{machine['commit'] or 'unknown'}, with {packages}; sst2: {found['sst2']}.{sizes}"
    )


def draw(path: Path, found: dict[str, Any]) -> None:
    """Draw the tokens per second of the systems in each work that trains."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -e '.[bench]'") from error
    of_work: dict[str, list[Row]] = {}
    for row in found["results"]:
        if row["tokens_per_s"] and row["first_update_s"]:
            of_work.setdefault(row["work"], []).append(row)
    if not of_work:
        raise UserError(f"--plot {path}: nothing that trains was measured; leave out --only, or take mlm or gpt")
    works = list(of_work.items())
    lines = [works[i : i + 2] for i in range(0, len(works), 2)]
    heights = [2 + max(len(rows) for _, rows in line) for line in lines]  # bars of about one height in all panels
    figure = Figure(figsize=(11, 0.27 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(lines), 2, squeeze=False, height_ratios=heights)
    for axes in grid.flat[len(works) :]:
        axes.set_visible(False)
    for axes, (work, rows) in zip(grid.flat, works, strict=False):
        rows = sorted(rows, key=lambda row: row["tokens_per_s"]["median"])
        medians = [row["tokens_per_s"]["median"] for row in rows]
        errors = [
            [median - row["tokens_per_s"]["min"] for median, row in zip(medians, rows, strict=True)],
            [row["tokens_per_s"]["max"] - median for median, row in zip(medians, rows, strict=True)],
        ]
        colors = ["tab:orange" if row["system"].startswith("jaxlm") else "tab:blue" for row in rows]
        labels = [label(row).replace("original", "the original's design") for row in rows]
        axes.barh(labels, medians, xerr=errors, color=colors, ecolor="0.3")
        axes.set_title(f"{work}, tokens per second")
        axes.locator_params(axis="x", nbins=6)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: cannot be written: {error}") from error


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[list[str]], bool]:
    """Return the cells of a table of ratios now and before, and whether one is worse than noise explains.

    Ratios to other systems in the same run, not speeds: those are of a machine and what else it does. A ratio is worse
    if it is so by more than THRESHOLD and the ranges of the rounds do not meet.
    """
    # Not by what it is against: the fastest of several systems may be another one now.
    before = {(row["work"], row["quantity"], row["target"]): row for row in old["ratios"]}
    cells, is_worse = [], False
    for row in new["ratios"]:
        was = before.get((row["work"], row["quantity"], row["target"]))
        if was is None:
            continue
        change, low, high = row["ratio"] / was["ratio"], row["low"] / was["high"], row["high"] / was["low"]
        if row["at_most"]:
            change, low, high = 1 / change, 1 / high, 1 / low
        worse = change < 1 - THRESHOLD and high < 1
        is_worse |= worse
        verdict = "worse" if worse else "better" if change > 1 + THRESHOLD and low > 1 else "same"
        numbers = [_number(was["ratio"]), _number(row["ratio"]), f"{change:.2f}", f"{low:.2f} to {high:.2f}"]
        cells.append([row["work"], row["quantity"], row["against"], *numbers, verdict])
    return cells, is_worse


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
