"""Activations: where they come from, and what the difference of any two arrays tells."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity_tests.compare.catalogue import attention, composed, embedding, modules
from parity_tests.compare.catalogue.composed import pads_of
from parity_tests.compare.catalogue.evidence import NEAR, Cause, Rule, distance, listed, meaning, ratio_of
from parity_tests.compare.catalogue.modules import is_norm
from parity_tests.compare.catalogue.place import Divergence


def shapes(d: Divergence) -> Iterator[Cause]:
    if d.x.ndim != d.y.ndim:
        yield Cause("pooling", f"{d.where}: one takes a position, the other has all", 0.85)
    if d.x.shape != d.y.shape:
        yield Cause("shape", f"{d.where}: shape {list(d.y.shape)} in B, {list(d.x.shape)} in A", 0.8)


def not_finite(d: Divergence) -> Iterator[Cause]:
    bad = [~np.isfinite(z) for z in (d.x, d.y)]
    if bad[0].any() == bad[1].any():
        return
    which, is_bad, other = ("B", bad[1], d.x) if bad[1].any() else ("A", bad[0], d.y)
    largest = np.abs(other[np.isfinite(other)]).max(initial=0)
    if largest > 6e4:
        yield Cause("overflow", f"{d.where}: {which} overflows, where the other has {largest:.3g}", 1.0)
    rows = np.unique(np.nonzero(is_bad)[0])
    tokens = d.tokens
    is_pads = tokens is not None and len(tokens) == len(d.x) and all(len(set(tokens[r])) == 1 for r in rows)
    note = "in rows of pads alone, as a softmax of masks of -inf is" if is_pads else "as a mask of -inf may make it"
    yield Cause("mask value", f"{d.where}: {which} is not finite {note}", 0.95 if is_pads else 0.8)


def another_source(d: Divergence) -> Iterator[Cause]:
    """A module gets the output of another module than in A, or what is no module's output."""
    if d.first.kind != "input":
        return
    one, two = (_source(d, side) for side in d.sides)
    if one == two:
        return
    texts = [f"the output of {name}" if name else "what it computes itself" for name in (one, two)]
    text = f"{d.where}: B gives it {texts[1]}, A {texts[0]}"
    if is_norm(one) != is_norm(two) or is_norm(d.module):
        norm, side = (one, d.b) if is_norm(one) else (two, d.a)
        is_called = norm == "" or any(kind == "activation" and name == norm for _, kind, name, _ in side.entries)
        kinds = ("norm placement", "norm missing") if is_called else ("norm missing", "norm placement")
        yield Cause(kinds[0], text, 0.97)
        yield Cause(kinds[1], text, 0.5)
    else:
        yield Cause("another input", text, 0.96 if one and two else 0.75)


def _source(d: Divergence, side: Any) -> str:
    """Return the module whose output, as it is, is the input of the module; "" if there is none that both have.

    A norm that the other side has not counts as well.
    """
    source = d.entry(side).source
    name = source.name.partition("#")[0]
    known = {(b if side.is_b else a): a for a, b in side.names.modules.items()}
    return known.get(name, name if is_norm(name) else "") if source.kind == "activation" else ""


def never_called(d: Divergence) -> Iterator[Cause]:
    """A module of A before the divergence, or next to it, is never called in B."""
    called = {name for update, kind, name, _ in d.b.entries if kind == "activation" and update == d.update}
    here = d.modules.index(d.module) if d.module in d.modules else 0
    for name in d.modules[max(0, here - 3) : here + 10]:
        if name not in called and d.parameters(name):
            yield Cause("module skipped", f"A calls {name}, B never does", 0.55)


def dropout(d: Divergence) -> Iterator[Cause]:
    x, y = d.x, d.y
    if x.shape != y.shape:
        return
    zeros = [float((z == 0).mean()) for z in (x, y)]
    is_kept = (x != 0) & (y != 0)
    if 0.02 < max(zeros) < 0.98 and abs(zeros[0] - zeros[1]) > 5 * (0.25 / x.size) ** 0.5:
        text = f"{d.where}: {zeros[1]:.0%} zeros in B, {zeros[0]:.0%} in A"
        if min(zeros) > 0.01:
            yield Cause("dropout rate", f"{text}: another rate", 0.9)
        else:  # what is kept of a dropout is scaled, that of a ReLU is not
            is_scaled = is_kept.any() and bool(ratio_of(x[is_kept], y[is_kept]))
            yield Cause("dropout", f"{text}: it is off in one", 0.9 if is_scaled else 0.5)
    elif min(zeros) > 0.02 and is_kept.any():
        if np.array_equal(x == 0, y == 0):
            if ratio := ratio_of(x[is_kept], y[is_kept]):
                yield Cause("dropout scale", f"{d.where}: what dropout keeps is {ratio:.4g} times A's in B", 0.95)
            return
        yield Cause("dropout masks", f"{d.where}: both have {zeros[0]:.0%} zeros, at other places: other masks", 0.6)
        ratio = float(np.median(y[is_kept] / x[is_kept]))
        if abs(ratio - 1) > 0.02:
            yield Cause("dropout scale", f"{d.where}: what is kept is {ratio:.4g} times A's in B", 0.65)


def dropout_of_modules(d: Divergence) -> Iterator[Cause]:
    """The rates that modules of dropout say they have."""
    infos: list[dict[str, dict[str, Any]]] = [
        {name: e.info for (_, kind, name, _), e in side.entries.items() if kind == "activation" and e.info}
        for side in d.sides
    ]
    for name in infos[0].keys() & infos[1].keys():
        one, two = ([x[name][key] for key in ("p", "rate") if key in x[name]] for x in infos)
        if "ropout" in str(infos[0][name].get("class")) and one and two and one[0] != two[0]:
            yield Cause("dropout rate", f"{name}: dropout of {two[0]} in B, of {one[0]} in A", 0.5)


def factor(d: Divergence) -> Iterator[Cause]:
    if ratio := ratio_of(d.x, d.y):
        yield Cause("scale", f"{d.where}: B's is {ratio:.6g} times A's{meaning(ratio, d.x.shape)}", 0.7)
    elif d.x.ndim > 1:
        rows = [z.reshape(-1, z.shape[-1]) for z in d.both]
        if (ratio := ratio_of(*(z - z.mean(0) for z in rows))) and abs(ratio - 1) > 1e-6:
            text = f"but for a bias, B's is {ratio:.6g} times A's{meaning(ratio, _widths(d))}"
            yield Cause("scale", f"{d.where}: {text}", 0.7)


def _widths(d: Divergence) -> list[int]:
    x = d.input(d.module)
    return [*d.x.shape, *([] if x is None else x.shape[-1:])]


def order_of_elements(d: Divergence) -> Iterator[Cause]:
    x, y = d.x, d.y
    if x.shape != y.shape:
        return
    is_flipped = x.ndim == 3 and distance(np.flip(x, 1), y) < NEAR * distance(x, y)
    apart = np.abs(np.sort(x.ravel()) - np.sort(y.ravel())).max(initial=0)
    if apart < 1e-4 * np.abs(x - y).max(initial=0):
        kind = "position order" if is_flipped else "layout"
        yield Cause(kind, f"{d.where}: B has A's numbers in another order", 0.8)


def constant_vector(d: Divergence) -> Iterator[Cause]:
    difference = d.y - d.x if d.x.shape == d.y.shape else np.zeros(1)
    rows = difference.reshape(-1, difference.shape[-1])
    if len(rows) > 1 and np.abs(rows - rows[0]).max() < 1e-4 * np.abs(rows).max():
        text = "B differs by the same vector everywhere: a bias is missing or added"
        yield Cause("bias", f"{d.where}: {text}", 0.9)


def few_positions(d: Divergence) -> Iterator[Cause]:
    """Only pads differ, or only some samples."""
    if d.x.shape != d.y.shape or d.x.ndim < 3:
        return
    apart = np.abs(d.y - d.x).reshape(*d.x.shape[:2], -1).max(-1)
    if d.tokens is not None and d.tokens.shape == apart.shape:
        for pad in pads_of(d.tokens):
            is_pad = d.tokens == pad
            if is_pad.any() and apart[is_pad].max() > 0 and apart[~is_pad].max(initial=0) < 1e-3 * apart.max():
                yield Cause("pad handling", f"{d.where}: only positions of pads (id {pad}) differ", 0.75)
    differ = apart.max(1) >= 1e-3 * apart.max()
    if not differ.all():
        text = f"only samples {listed(np.flatnonzero(differ), 5)} differ, as with another mask"
        yield Cause("some samples", f"{d.where}: {text}", 0.35)


def precision(d: Divergence) -> Iterator[Cause]:
    if d.first.difference < 1e-3:
        text = f"a difference of {d.first.difference:.1e}: a lower precision, or another epsilon"
        yield Cause("precision", f"{d.where}: {text}", 0.2)


def unknown(d: Divergence) -> Iterator[Cause]:
    if d.first.kind == "activation":
        yield Cause("another formula", f"{d.where}: its input agrees and its output does not", 0.1)
    else:
        text = "all modules before it agree: what is computed between them differs"
        yield Cause("between modules", f"{d.where}: {text}", 0.1)


def where_shapes_agree(rule: Rule) -> Callable[[Divergence], Iterator[Cause]]:
    """Return a rule for arrays of one shape."""

    def checked(d: Divergence) -> Iterator[Cause]:
        if d.x.shape == d.y.shape:
            yield from rule(d)

    return checked


RULES: tuple[Rule, ...] = (
    shapes,
    *map(where_shapes_agree, (not_finite, *modules.RULES, *composed.RULES, *attention.RULES, *embedding.RULES)),
    *(another_source, never_called, dropout, dropout_of_modules, where_shapes_agree(factor), order_of_elements),
    constant_vector,
    *(few_positions, precision, unknown),
)
