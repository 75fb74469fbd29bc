"""One measured difference, and tables of them."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One measured difference."""

    case: str
    package: str  # whose number was checked; "jaxlm, torchlm" where each is the other's reference
    quantity: str
    difference: float
    tolerance: float
    where: str = ""  # the tensor or update

    @property
    def passes(self) -> bool:
        """Return whether the difference is within its tolerance; NaN is not."""
        return self.difference <= self.tolerance


def norm(arrays: Mapping[str, np.ndarray]) -> float:
    """Return the norm of all arrays as one vector, in float64."""
    return math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in arrays.values()))


def worst(rows: Iterable[Row]) -> list[Row]:
    """Return for each case, package and quantity the row that is nearest to its tolerance, or farthest beyond it."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.case, row.package, row.quantity)
        if key not in found or badness(row) > badness(found[key]):
            found[key] = row
    return list(found.values())


def table(rows: Iterable[Row]) -> str:
    """Return rows as lines of text with aligned columns."""
    lines = [("case", "package", "quantity", "worst difference", "tolerance", "", "where")]
    for row in rows:
        verdict = "pass" if row.passes else "FAIL"
        numbers = f"{row.difference:.1e}", f"{row.tolerance:.3g}" if row.tolerance else "exact"
        lines.append((row.case, row.package, row.quantity, *numbers, verdict, row.where))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip() for line in lines)


def ratio(difference: float, scale: float) -> float:
    """Return a difference over a scale; 0 without a difference, infinite if the scale alone is 0."""
    if difference == 0:
        return 0.0
    return float(difference / scale) if scale else math.inf


def badness(row: Row) -> tuple[bool, float]:
    """Return by what rows are sorted: how far they are beyond their tolerance."""
    return not row.passes, math.inf if math.isnan(row.difference) else ratio(row.difference, row.tolerance)
