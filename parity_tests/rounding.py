"""`python -m parity_tests.rounding CASE_DIR...`: what rounding alone does, which tolerances.py goes by.

Each package does each case in float32 and in float64. Both start from the same float32 weights and differ in nothing
but rounding, so that two float32 computations of the same mathematics may be up to twice that far apart.
"""

import dataclasses
import sys
from pathlib import Path

from jaxlm.errors import reported
from parity_tests import case as cases
from parity_tests import trajectory
from parity_tests.packages import PACKAGES, Torchlm
from parity_tests.plan import Plan
from parity_tests.tolerances import FLOAT32, Tolerances
from parity_tests.trajectory import Row, Trajectory

# Bounds of what updates make, by the quantities that have them.
UPDATES = {
    "losses": "losses",
    "norms of gradients": "grad_norms",
    "first moments": "moments",
    "roots of second moments": "moments",
    "saved weights": "weights",
    "final weights": "weights",
}


def measure(plan: Plan) -> list[Row]:
    """Return how far float32 is from float64 in each package."""
    rows = []
    for package in PACKAGES:
        single, double = (trajectory.run(package, plan, precision) for precision in ("float32", "float64"))
        rows += trajectory.compare(plan.name, package.name, single, double, FLOAT32)
    return rows


def bounds(plan: Plan, single: Trajectory) -> Tolerances:
    """Return FLOAT32, loosened where rounding goes far in a run that torchlm has done in float32 as `single`.

    Two packages round differently, each of them by about this much; eight times it leaves them room.
    """
    double = trajectory.run(Torchlm, plan, "float64")
    found = {name: 0.0 for name in UPDATES.values()}
    for row in trajectory.compare(plan.name, Torchlm.name, single, double, FLOAT32):
        if row.quantity in UPDATES:
            found[UPDATES[row.quantity]] = max(found[UPDATES[row.quantity]], row.difference)
    return dataclasses.replace(FLOAT32, **{name: max(getattr(FLOAT32, name), 8 * x) for name, x in found.items()})


def main(argv: list[str]) -> int:
    """Print the table for the cases of a command line, or for all recorded ones; return the exit status."""
    with reported(debug=False):
        loaded = [cases.load(Path(folder)) for folder in argv or map(str, sorted(cases.CASES.iterdir()))]
    rows = [row for case in loaded for row in measure(case.plan())]
    print(trajectory.table(trajectory.worst(row._replace(where=f"{row.case} {row.where}", case="all") for row in rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
