"""The result of a comparison: whether two runs are the same, where they part first and why, and what was not seen."""

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.reporting import html_page
from parity_tests.compare import diagnose, divergence, pairing
from parity_tests.compare.diagnose import Cause
from parity_tests.compare.divergence import STAGES, Finding, Side
from parity_tests.compare.pairing import Names
from parity_tests.compare.rows import Row, table
from parity_tests.record.files import record_of

WORDS = {
    "parameter": "start value of {0}",
    "batch": "what the model is given: {0}",
    "forward": "{1} of {0}",
    "loss": "{0}",
    "gradient": "gradient of {0}",
    "rate": "{0}",
    "moment": "moment of {0}",
    "update": "update of {0}",
}


@dataclasses.dataclass
class Verdict:
    """What was found. `causes` are those of the first divergence, the likeliest first."""

    frameworks: tuple[str, str]
    found: list[Finding]
    first: Finding | None
    causes: list[Cause]
    unseen: list[str]
    names: Names
    bounds: str
    n_updates: int

    @property
    def passes(self) -> bool:
        return self.first is None

    def rows(self) -> list[Row]:
        """Return a row for each stage: its worst number."""
        rows = []
        for stage in STAGES:
            own = [x for x in self.found if x.stage == stage]
            if own:
                x = max(own, key=lambda x: (not x.passes, x.difference / x.tolerance if x.tolerance else x.difference))
                rows.append(Row("A, B", "B", f"{stage} ({len(own)})", x.difference, x.tolerance, place(x)))
        return rows

    def text(self) -> str:
        """Return the verdict as a few lines."""
        lines = [table(self.rows()), ""]
        n_failed = sum(not x.passes for x in self.found)
        if self.first:
            lines += [f"{n_failed} of {len(self.found)} numbers FAIL", f"first: {sentence(self.first)}"]
            lines += [f"  {i}. {cause.kind}: {cause.text}" for i, cause in enumerate(self.causes[:3], start=1)]
        else:
            lines += [f"all {len(self.found)} numbers pass, of {self.n_updates} updates"]
        lines += [f"tolerances: {self.bounds}"]
        lines += [f"not seen: {note}" for note in self.unseen]
        lines += [f"note: {note}" for note in self.names.notes]
        return "\n".join(lines)

    def json(self) -> str:
        """Return the verdict for other programs."""

        def plain(x: Any) -> Any:
            return str(x) if isinstance(x, float) and not math.isfinite(x) else x

        findings = [
            {key: plain(x) for key, x in dataclasses.asdict(f).items()} | {"passes": f.passes} for f in self.found
        ]
        first = findings[self.found.index(self.first)] if self.first else None
        value: dict[str, Any] = {
            "passes": self.passes,
            "first": first,
            "causes": [dataclasses.asdict(x) for x in self.causes],
        }
        value |= {"unseen": self.unseen, "tolerances": self.bounds, "updates": self.n_updates, "findings": findings}
        return json.dumps(value, indent=1)

    def html(self) -> str:
        """Return the verdict as a page."""
        n_failed = sum(not x.passes for x in self.found)
        head = ["", "difference", "tolerance", "where", "update"]
        body = [
            ["pass" if x.passes else "FAIL", f"{x.difference:.1e}", f"{x.tolerance:.1e}", place(x), str(x.update)]
            for x in sorted(self.found, key=lambda x: (x.passes, x.order))
        ]
        parts = [
            html_page.totals([(f"of {len(self.found)} numbers within tolerance", str(len(self.found) - n_failed))])
        ]
        if self.first:
            listed = "".join(f"<li><b>{html.escape(x.kind)}</b>: {html.escape(x.text)}</li>" for x in self.causes[:3])
            parts.append(
                f"<h2>Where it goes wrong first</h2><p>{html.escape(sentence(self.first))}</p><ol>{listed}</ol>"
            )
        if self.unseen:
            notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.unseen)
            parts.append(f"<h2>What this cannot see</h2><ul>{notes}</ul>")
        parts += [
            f"<h2>Every number</h2><p>Tolerances: {html.escape(self.bounds)}.</p>",
            html_page.table(head, body, "every number"),
            "<h2>Names</h2>",
            html_page.table(
                ["A", "B", "axes", "by"],
                [[str(x.a), str(x.b), str(list(x.axes)) if x.axes else "", x.by] for x in self.names.pairs],
                "names",
            ),
        ]
        return html_page.page(f"A ({self.frameworks[0]}) and B ({self.frameworks[1]})", parts)


def place(x: Finding) -> str:
    """Return what differs."""
    call = f", call {x.call}" if x.call else ""
    name = x.name or "the model"
    return (
        WORDS["loss" if x.kind == "loss" else x.stage].format(name, "input" if x.kind == "input" else "output") + call
    )


def sentence(x: Finding) -> str:
    """Return where two runs part, and by how much."""
    note = f" ({x.note})" if x.note else ""
    return f"update {x.update}, {place(x)}: {x.difference:.1e} apart, {x.tolerance:.1e} allowed{note}"


def runs(
    a: Any, b: Any, names: Names | Path | str = "auto", rounding: Sequence[Any] = (), until: int | None = None
) -> Verdict:
    """Compare two records, `a` the reference. Raises UserError if names cannot be paired, or nothing is in common.

    `a`, `b` and `rounding` are recorders, records or their folders. `names` is "auto", or a map or its file
    (pairing.py). `rounding` are further records of A's program that differ in rounding alone, from which tolerances
    come: float64, another order of summation. `until` is the number of updates to compare.
    """
    one, two, *others = (record_of(x) for x in (a, b, *rounding))
    if names == "auto":
        names = pairing.find(one, two)
    elif not isinstance(names, Names):
        names = pairing.read_names(names)
    sides = Side(one, names, False), Side(two, names, True)
    divergence.choose_groups(*sides)
    bounds = divergence.bounds_of(*sides, others)
    found = [x for x in divergence.findings(*sides, bounds) if until is None or x.update < until]
    if not found:
        listed = [", ".join(dict.fromkeys(e.name for e in r.entries if e.name)) or "nothing" for r in (one, two)]
        raise UserError(f"the runs have nothing in common: {listed[0][:200]} in A, {listed[1][:200]} in B")
    first = min((x for x in found if not x.passes), key=lambda x: x.order, default=None)
    causes = diagnose.causes(*sides, found, first) if first else []
    how = (
        f"{divergence.ROOM} times the rounding of {len(others)} further runs of A"
        if others
        else f"estimated from roundings of {bounds.epsilon:.1e} and sums of {bounds.width}; give rounding= to measure"
    )
    n_updates = min(side.n_updates for side in sides)
    unseen = divergence.unseen(*sides, found)
    return Verdict((one.framework, two.framework), found, first, causes, unseen, names, how, n_updates)


def assert_same_training(a: Any, b: Any, names: Names | Path | str = "auto", rounding: Sequence[Any] = ()) -> Verdict:
    """Raise AssertionError, with where and why, unless two records are the same but for rounding."""
    verdict = runs(a, b, names, rounding)
    assert verdict.passes, f"the runs differ\n{verdict.text()}"
    return verdict
