"""`python -m parity_tests.rounding CASE_DIR...`: what rounding alone does, which tolerances.py goes by.

Each package does each case in float32 and in float64. Both start from the same float32 weights and differ in nothing
but rounding, so that two float32 computations of the same mathematics may be up to twice that far apart.
"""

import sys
from pathlib import Path

from jaxlm.errors import reported
from parity_tests import case as cases
from parity_tests import trajectory
from parity_tests.packages import PACKAGES
from parity_tests.plan import Plan
from parity_tests.tolerances import FLOAT32
from parity_tests.trajectory import Row


def measure(plan: Plan) -> list[Row]:
    """Return how far float32 is from float64 in each package."""
    rows = []
    for package in PACKAGES:
        single, double = (trajectory.run(package, plan, precision) for precision in ("float32", "float64"))
        rows += trajectory.compare(plan.name, package.name, single, double, FLOAT32)
    return rows


def main(argv: list[str]) -> int:
    """Print the table for the cases of a command line, or for all recorded ones; return the exit status."""
    with reported(debug=False):
        loaded = [cases.load(Path(folder)) for folder in argv or map(str, sorted(cases.CASES.iterdir()))]
    rows = [row for case in loaded for row in measure(case.plan())]
    print(trajectory.table(trajectory.worst(row._replace(where=f"{row.case} {row.where}", case="all") for row in rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
