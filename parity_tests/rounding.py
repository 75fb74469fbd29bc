"""`python -m parity_tests.rounding CASE_DIR...`: what rounding alone does, which tolerances.py goes by.

Each package does each case in float32 and in float64. Both start from the same float32 weights and differ in nothing
but rounding, so that two float32 computations of the same mathematics may be up to twice that far apart.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from jaxlm.errors import reported
from parity_tests import case as cases
from parity_tests import trajectory
from parity_tests.compare.rows import Row, table, worst
from parity_tests.compare.tolerances import FLOAT32, Bound, Tolerances
from parity_tests.packages import PACKAGES, Torchlm
from parity_tests.plan import Plan
from parity_tests.trajectory import Trajectory

SAMPLES = 4  # of rounding in a run that torchlm does: one alone may be small by chance
ROOM = 8  # times the largest of these


def measure(plan: Plan) -> list[Row]:
    """Return how far float32 is from float64 in each package."""
    rows = []
    for package in PACKAGES:
        single, double = (trajectory.run(package, plan, precision) for precision in ("float32", "float64"))
        rows += trajectory.compare(plan.name, package.name, single, double, FLOAT32)
    return rows


def bounds(plan: Plan, single: Trajectory) -> Tolerances:
    """Return FLOAT32, loosened where rounding goes far in a run that torchlm has done in float32 as `single`.

    Where training blows up rounding, how far it goes is a matter of chance: it is sampled, from weights that are off
    by a rounding. Losses and norms get a bound for each update, so that what comes late excuses nothing early.
    """
    double = trajectory.run(Torchlm, plan, "float64")
    samples = [single, *(trajectory.run(Torchlm, _nudged(plan, seed)) for seed in range(1, SAMPLES))]
    found: dict[str, list[float]] = {}
    for sample in samples:
        for row in trajectory.compare(plan.name, Torchlm.name, sample, double, FLOAT32):
            found.setdefault(row.quantity, []).append(row.difference)

    def loosened(bound: float, *quantities: str) -> float:
        return max([bound, *(ROOM * x for quantity in quantities for x in found[quantity])])

    def loosened_updates(bound: float, name: str) -> Bound:
        exact = getattr(double, name)
        apart = np.max([np.abs(getattr(sample, name) - exact) / np.abs(exact) for sample in samples], axis=0)
        return np.fmax(bound, ROOM * np.maximum.accumulate(apart)) if ROOM * apart.max() > bound else bound

    return dataclasses.replace(
        FLOAT32,
        gradients=loosened(FLOAT32.gradients, "gradients of batch 0"),
        losses=loosened_updates(FLOAT32.losses, "losses"),
        grad_norms=loosened_updates(FLOAT32.grad_norms, "grad_norms"),
        moments=loosened(FLOAT32.moments, "first moments", "roots of second moments"),
        weights=loosened(FLOAT32.weights, "saved weights", "final weights"),
        eval_loss=loosened(FLOAT32.eval_loss, "loss of the evaluation"),
    )


def _nudged(plan: Plan, seed: int) -> Plan:
    """Return a plan whose float32 weights are off by at most a rounding: up, down or not at all."""
    random = np.random.default_rng(seed)

    def nudge(x: np.ndarray) -> np.ndarray:
        return x * (1 + 2**-23 * random.integers(-1, 2, x.shape).astype(x.dtype))

    start, evaluated = (
        {name: nudge(x) for name, x in (weights or {}).items()} for weights in (plan.start, plan.evaluated_weights)
    )
    return dataclasses.replace(plan, start=start, evaluated_weights=evaluated or None)


def main(argv: list[str]) -> int:
    """Print the table for the cases of a command line, or for all recorded ones; return the exit status."""
    with reported(debug=False):
        loaded = [cases.load(Path(folder)) for folder in argv or map(str, sorted(cases.CASES.iterdir()))]
        rows = [row for case in loaded for row in measure(case.plan())]
        named = (row._replace(where=f"{row.case} {row.where}", case="all") for row in rows)
        print(table(worst(named)))
        return 0
    raise AssertionError("reported() exits on the errors it does not pass on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
