"""Names the likeliest causes of a first divergence, by the rules of the catalogue."""

import numpy as np

from parity_tests.compare.catalogue import forward, gradient, loss, muon, optimizer, rate, start
from parity_tests.compare.catalogue.evidence import Cause, Rule
from parity_tests.compare.catalogue.place import Divergence
from parity_tests.compare.divergence import Finding, Side

RULES: dict[str, tuple[Rule, ...]] = {
    "parameter": start.RULES,
    "batch": start.BATCH_RULES,
    "forward": forward.RULES,
    "loss": loss.RULES,
    "gradient": gradient.RULES,
    "rate": rate.RULES,
    "moment": muon.MOMENT_RULES + optimizer.MOMENT_RULES,
    "update": muon.RULES + optimizer.RULES,
}
MOST = 5


def causes(a: Side, b: Side, found: list[Finding], first: Finding) -> list[Cause]:
    """Return the likeliest causes of the first divergence, the likeliest first, each kind once."""
    place = Divergence(a, b, found, first)
    with np.errstate(all="ignore"):
        listed = [cause for rule in RULES[first.stage] for cause in rule(place)]
    best: dict[str, Cause] = {}
    for cause in sorted(listed, key=lambda cause: -cause.score):
        best.setdefault(cause.kind, cause)
    return list(best.values())[:MOST]


__all__ = ["Cause", "causes"]
