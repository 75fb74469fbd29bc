"""`python -m parity_tests.report`: one page that shows how near the two packages are, readable anywhere.

Loss curves of both frameworks, their difference by update with the tolerance, each tensor, the recorded cases, the
planted faults (`--faults FILE`, which `python -m parity_tests.faults --json FILE` writes), and versions. The
page is one file without scripts; `--png FILE` writes one of its pictures for the README.

It takes about 12 minutes on 2 cores, and says on standard error what it computes. `--quick` takes one or two: fewer
updates, tasks and cases, and no bfloat16.
"""

import argparse
import dataclasses
import html
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxlm.errors import UserError, reported
from jaxlm.io import utf8
from jaxlm.reporting import html_page
from parity_tests import case as cases
from parity_tests import packages, replay, trajectory
from parity_tests.compare.page import BOUND, FIRST, SECOND, Curve, number, of_rows, svg, versions
from parity_tests.compare.rows import Row, worst
from parity_tests.compare.tolerances import BFLOAT16_FACTOR, FLOAT32, FLOAT64
from parity_tests.drift import DRIFT_UPDATES, N_DRIFTS, SEEDS, Drift, bfloat16, bfloat16_rows, config_of
from parity_tests.plan import random_plan
from parity_tests.trajectory import Trajectory

TASKS = ("mlm", "gpt", "sst2", "cola")
N_UPDATES, N_BATCHES = 200, 25  # the same batches again and again, so that there is something to learn
# In float32, what rounding does to single tensors grows with the updates; tolerances are of runs as long as recorded.
N_SHORT = 15
QUICK_TASKS, QUICK_CASES = ("mlm", "gpt", "sst2"), ("cola",)
INK, GRID = "#1c1f24", "#d5d8de"  # of a picture

# Pictures


def draw(axes: Any, title: str, curves: Sequence[Curve], bounds: Sequence[Curve] = (), is_log: bool = False) -> None:
    """Draw curves and bounds; on a log scale, where differences of exactly zero have no place, with a dot for each."""
    for curve in [*curves, *bounds]:
        (updates,) = np.nonzero(curve.values > 0) if is_log else (np.arange(len(curve.values)),)
        dots = {"marker": "o", "markersize": 2} if is_log and curve in curves else {}
        style = {"color": curve.colour, "linewidth": 0.6 if dots else curve.width, **dots}
        axes.plot(updates, curve.values[updates], curve.style, label=curve.label, **style)
    if is_log:
        axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("update", color=INK, fontsize=10)
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=9, which="both")
    for spine in axes.spines.values():
        spine.set_color(GRID)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 3}  # where no curve is
    axes.legend(fontsize=9, labelcolor=INK, frameon=False, **below)


# The page of both packages


@dataclasses.dataclass(frozen=True)
class Pair:
    """Runs of both packages in one precision, and how far they are apart."""

    jaxlm: Trajectory
    torchlm: Trajectory
    rows: list[Row]

    def differences(self) -> np.ndarray:
        """Return the relative difference of the losses at each update."""
        return np.abs(self.jaxlm.losses - self.torchlm.losses) / np.abs(self.torchlm.losses)


def pair(task: str, precision: Any, n_updates: int = N_UPDATES) -> Pair:
    """Return runs of a task in both packages."""
    config = config_of(task, **{"train.max_steps": n_updates})
    plan = random_plan(f"{task} in {precision}", config, SEEDS[task])
    plan = dataclasses.replace(plan, batches=[plan.batches[i % N_BATCHES] for i in range(n_updates)])
    jaxlm, torchlm = (trajectory.run(package, plan, precision) for package in packages.PACKAGES)
    bounds = FLOAT64 if precision == "float64" else FLOAT32
    return Pair(jaxlm, torchlm, trajectory.compare(plan.name, "jaxlm, torchlm", jaxlm, torchlm, bounds))


def losses(task: str, single: Pair) -> tuple[str, list[Curve]]:
    """Return title and curves of the losses."""
    jaxlm = Curve("jaxlm", single.jaxlm.losses, FIRST, width=3.5)
    return f"{task}: loss", [jaxlm, Curve("torchlm", single.torchlm.losses, SECOND, "--", 1.3)]


def differences(task: str, single: Pair, double: Pair) -> tuple[str, list[Curve], list[Curve]]:
    """Return title, curves and bounds of the differences of losses."""
    curves = [Curve("float32", single.differences(), FIRST), Curve("float64", double.differences(), SECOND)]
    bounds = [
        Curve("tolerance" if i == 0 else "_", np.full(len(single.jaxlm.losses), bound), BOUND, ":")
        for i, bound in enumerate((FLOAT32.losses, FLOAT64.losses))
    ]
    return f"{task}: difference of losses, relative", curves, bounds


def drift_curves(task: str, drift: Drift) -> tuple[str, list[Curve], list[Curve]]:
    """Return title, curves and bound of how far losses in bfloat16 are from those in float32, as the mean so far."""
    n = 1 + np.arange(len(drift.losses("jaxlm")))
    jaxlm, torchlm = (np.cumsum(drift.losses(name)) / n for name in ("jaxlm", "torchlm"))
    curves = [Curve("jaxlm", jaxlm, FIRST), Curve("torchlm", torchlm, SECOND)]
    bound = Curve("tolerance", BFLOAT16_FACTOR * torchlm, BOUND, ":")
    return f"{task}: drift of the loss, mean so far", curves, [bound]


def drift_table(drifted: dict[str, Drift]) -> str:
    """Return a table of the drifts that bfloat16_rows compares."""
    lines = []
    for task, drift in drifted.items():
        means = [number(drift.losses(name).mean()) for name in ("jaxlm", "torchlm")]
        weights = [number(drift.weights[name]) for name in ("jaxlm", "torchlm")]
        for row, values in zip(bfloat16_rows(task, drift), (means, weights), strict=True):
            lines.append([task, row.quantity, *values, f"{row.difference:.2f}", "pass" if row.passes else "FAIL"])
    return html_page.table(["task", "", "jaxlm", "torchlm", "ratio", ""], lines, "drift in bfloat16")


def tensors(rows: Iterable[Row]) -> str:
    """Return a table with a line for each tensor."""
    kinds = {"gradients of batch 0": "gradient", "first moments": "first moment", "final weights": "final weights"}
    kinds |= {"roots of second moments": "root of second moment"}
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        kind = kinds.get(row.quantity.removesuffix(" (key biases)"))
        if kind:
            mark = "" if row.passes else " FAIL"
            note = "*" if row.quantity.endswith("(key biases)") else ""
            found.setdefault(row.where, {})[kind] = number(row.difference) + note + mark
    columns = list(kinds.values())
    return html_page.table(
        ["tensor", *columns], [[name, *(x.get(c, "") for c in columns)] for name, x in found.items()], "each tensor"
    )


def faults(path: Path) -> str:
    """Return the table of planted faults. Raises UserError if the file has none."""
    try:
        results = utf8.from_json(utf8.read(path))
        lines: dict[str, dict[str, str]] = {}
        for result in results:
            line = lines.setdefault(result["name"], {"description": result["description"]})
            by = f"{result['caught_by']}: {result['quantity']}" if result["caught_by"] else "MISSED"
            line[result["package"]] = by
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no table of python -m parity_tests.faults --json: {error}") from error
    caught = {
        package: [bool(x["caught_by"]) for x in results if x["package"] == package] for package in ("jaxlm", "torchlm")
    }
    totals = " and ".join(f"{sum(x)} of {len(x)} in {package}" for package, x in caught.items())
    body = [[name, x["description"], x.get("jaxlm", ""), x.get("torchlm", "")] for name, x in lines.items()]
    head = ["fault", "what is wrong", "caught in jaxlm by", "caught in torchlm by"]
    return (
        f"<h2>Planted faults</h2><p>Realistic mistakes of ports, planted one at a time: the checks caught {totals}.</p>"
        + html_page.folded("All faults, and what caught each", html_page.table(head, body, "planted faults"))
    )


def both_packages(
    pairs: dict[str, tuple[Pair, Pair]],
    short: Pair,
    drifted: dict[str, Drift],
    replayed: list[Row],
    fault_table: Path | None,
    note: str = "",
) -> str:
    """Return the page; `pairs` has float32 and float64 of each task, `short` a shorter run of the first in float32.

    `note` says what the page leaves out.
    """
    first = next(iter(pairs))
    n_updates = len(pairs[first][0].jaxlm.losses)
    singles = [row for single, _ in pairs.values() for row in single.rows if row.quantity == "losses"]
    doubles = [row for _, double in pairs.values() for row in double.rows]
    halves = [row for task, drift in drifted.items() for row in bfloat16_rows(task, drift)]
    rows = [*singles, *doubles, *short.rows, *halves, *replayed]
    n_failed = sum(not row.passes for row in rows)

    def largest(rows: Iterable[Row], quantity: str) -> str:
        return number(max(row.difference for row in rows if row.quantity == quantity))

    totals = {
        f"of {len(rows)} numbers and tensors within tolerance": str(len(rows) - n_failed),
        f"largest relative difference of losses in {n_updates} updates, float32": largest(singles, "losses"),
        "the same in float64": largest(doubles, "losses"),
        f"of weights after {n_updates} updates, float64": largest(doubles, "final weights"),
    }
    figures = []
    for task, (single, double) in pairs.items():
        figures += [svg(*losses(task, single)), svg(*differences(task, single, double), is_log=True)]
    parts = [
        *([f"<p><b>{html.escape(note)}</b></p>"] if note else []),
        "<p>Two implementations of one trainer, with the same weights and batches: every number is compared between "
        "them, and with recorded runs of the original.</p>",
        html_page.totals(totals.items()),
        f"<h2>{n_updates} updates</h2><p>For each task, the losses of both packages and their relative "
        "difference. In float64 it nearly vanishes: the difference in float32 is rounding.</p>",
        f'<div class="figures">{"".join(figures)}</div>',
        *_bfloat16(drifted),
        f"<h2>Each tensor</h2><p>For {first}: the norm of the difference, divided by the norm of the tensor, or for "
        "weights by the norm of their change.</p>",
        f"<details open><summary>float32, {len(short.jaxlm.losses)} updates</summary>{tensors(short.rows)}</details>",
        f"<details><summary>float64, {n_updates} updates</summary>{tensors(pairs[first][1].rows)}</details>",
        '<p class="soft">* Key biases shift all scores of a query equally, so their gradient is only rounding error. '
        "It is divided by the norm of all tensors; for weights, by the sum of the rates.</p>",
    ]
    if replayed:
        shown = of_rows(
            worst(row._replace(case="all", where=f"{row.case} {row.where}") for row in replayed), "recorded cases"
        )
        parts.append(f"<h2>Recorded cases of the original</h2><p>The worst of all cases.</p>{shown}")
    parts += [
        f"<h2>Every quantity</h2><p>The worst tensor or update of {n_updates} in float64.</p>",
        *(
            f"<details><summary>{task}</summary>{of_rows(worst(b.rows), task)}</details>"
            for task, (_, b) in pairs.items()
        ),
    ]
    if fault_table:
        parts.append(faults(fault_table))
    return html_page.page("jaxlm and torchlm, number for number", [*parts, versions()])


def _bfloat16(drifted: dict[str, Drift]) -> list[str]:
    if not drifted:
        return []
    n_updates = len(next(iter(drifted.values())).losses("jaxlm"))
    return [
        f"<h2>bfloat16</h2><p>How far rounding to bfloat16 moves the loss in {n_updates} updates: each package against "
        "itself in float32, torchlm by PyTorch's autocast. After the last update, jaxlm's mean drift and that of its "
        f"weights may be at most {BFLOAT16_FACTOR} times torchlm's.</p>",
        f'<div class="figures">{"".join(svg(*drift_curves(*x)) for x in drifted.items())}</div>',
        drift_table(drifted),
    ]


def picture(path: Path, pairs: dict[str, tuple[Pair, Pair]]) -> None:
    """Write the pictures of gpt as a file."""
    figure = Figure(figsize=(9, 3.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    single, double = pairs["gpt"]
    draw(left, *losses("gpt", single))
    title, curves, bounds = differences("gpt", single, double)
    draw(right, f"{title} (log scale)", curves, bounds, is_log=True)
    figure.savefig(path, dpi=160)


def main(argv: list[str]) -> int:
    """Write the page of a command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m parity_tests.report", description="Write the page of parity.")
    parser.add_argument("--out", type=Path, default=Path("parity.html"), help="file of the page (default: parity.html)")
    parser.add_argument("--png", type=Path, help="file for a picture")
    parser.add_argument("--faults", type=Path, help="table of python -m parity_tests.faults --json FILE")
    parser.add_argument("--quick", action="store_true", help="a minute or two: fewer updates, tasks and cases")
    with reported(debug=False):
        args = parser.parse_args(argv)
        if args.faults:
            faults(args.faults)  # before minutes of work
        tasks, n_updates = (QUICK_TASKS, N_SHORT) if args.quick else (TASKS, N_UPDATES)
        folders = [cases.CASES / name for name in QUICK_CASES] if args.quick else sorted(cases.CASES.iterdir())
        steps: list[tuple[str, Callable[[], Any]]] = [
            (f"{task} in {precision}, {n_updates} updates of both packages", partial(pair, task, precision, n_updates))
            for task in tasks
            for precision in ("float32", "float64")
        ]
        if not args.quick:
            steps += [(f"{tasks[0]} in float32, {N_SHORT} updates", partial(pair, tasks[0], "float32", N_SHORT))]
            steps += [
                (f"{task} in bfloat16, {N_DRIFTS} starts of {DRIFT_UPDATES} updates", partial(bfloat16, task))
                for task in tasks
            ]
        steps += [(f"recorded case {folder.name}", partial(replay.check, cases.load(folder))) for folder in folders]
        results = iter(replay.announced(steps))
        pairs = {task: (next(results), next(results)) for task in tasks}
        short = pairs[tasks[0]][0] if args.quick else next(results)
        drifted = {} if args.quick else {task: next(results) for task in tasks}
        replayed = [row for rows in results for row in rows]
        full = f"{N_UPDATES} updates of {', '.join(TASKS)}, bfloat16, and all recorded cases"
        note = f"Quick: a page made without --quick has {full}." if args.quick else ""
        args.out.write_text(both_packages(pairs, short, drifted, replayed, args.faults, note), encoding="utf-8")
        if args.png:
            picture(args.png, pairs)
        print(args.out)
        return 0
    raise AssertionError("reported() exits on the errors it does not pass on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
