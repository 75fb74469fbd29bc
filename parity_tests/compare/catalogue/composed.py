"""What an array may be of those before it: functions of one, products and sums of several, some positions."""

import itertools
from collections.abc import Iterator

import numpy as np

from parity_tests.compare.catalogue.evidence import Cause, Formula, Rule, combined, explained
from parity_tests.compare.catalogue.modules import activations, is_norm
from parity_tests.compare.catalogue.place import Divergence
from parity_tests.compare.divergence import Side

Labelled = list[tuple[str, np.ndarray]]
MOST = 20_000  # elements of an array; slow formulas skip larger ones


def arrays_before(d: Divergence) -> Iterator[Cause]:
    """Each side is made of other arrays than the other side, or in another way."""
    yield from explained(d.x, d.y, _formulas(d, d.a, d.x), d.where, _formulas(d, d.b, d.y))


def _formulas(d: Divergence, side: Side, target: np.ndarray) -> Iterator[Formula]:
    before = d.earlier(side, 9)
    same = [(label, z) for label, z in before if z.shape == target.shape]
    yield from _of_one(before, same[:4], target)
    yield from _gates(same[:4], before[:4], target)
    yield from _capped(same[:3], d)
    yield from _sums(same[:7], target, _key_of_sums(d))
    for label, z in before:
        if z.ndim == target.ndim + 1 and z.shape[0] == target.shape[0] and z.shape[-1] == target.shape[-1]:
            yield from _pooled(d, label, z)
        elif z.ndim == 3 and z.shape[-1] == target.shape[-1]:
            yield from _at_positions(d, label, z)


def _of_one(before: Labelled, same: Labelled, target: np.ndarray) -> Iterator[Formula]:
    for label, z in same:
        yield from activations(z, f"of {label}") if z.size <= MOST else ()


def _gates(same: Labelled, before: Labelled, target: np.ndarray) -> Iterator[Formula]:
    """Yield products and sums of an activation and of what it gates."""
    halves = [np.split(z, 2, axis=-1) for _, z in before if z.shape == (*target.shape[:-1], 2 * target.shape[-1])]
    pairs = [((f"the first half of {label}", x), (f"the second half of {label}", y))
             for (label, _), (x, y) in zip(before, halves, strict=False)]  # fmt: skip
    turned = [(two, one) for one, two in pairs]
    for (one, x), (two, y) in [*itertools.permutations(same, 2), *pairs, *turned]:
        for formula in activations(x) if x.size <= MOST else ():
            for text, z in ((f"of {one} times {two}", formula.array * y), (f"of {one} plus {two}", formula.array + y)):
                yield Formula({"gate": text} | formula.choices, z, "gate", f"{formula.said} {text}")


def _capped(same: Labelled, d: Divergence) -> Iterator[Formula]:
    """Yield soft caps of an array, with the caps that its largest element tells of both sides."""
    for label, z in same:
        at = np.unravel_index(np.abs(z).argmax(), z.shape)
        caps = {_cap(float(abs(z[at])), float(abs(w[at]))) for w in (d.x, d.y)} | {float(np.abs(d.y).max())}
        for cap in (c for c in caps if 0 < c < abs(z[at])):
            for text, w in (
                ("cap * tanh(x / cap)", cap * np.tanh(z / cap)),
                ("tanh(x / cap)", np.tanh(z / cap)),
                ("cap * tanh(x)", cap * np.tanh(z)),
                ("a clip to the cap", np.clip(z, -cap, cap)),
            ):
                yield Formula({"soft cap": f"is {text} of {label}, with a cap of {cap:.4g}"}, w, "soft cap")


def _cap(z: float, y: float) -> float:
    """Return the cap c with c tanh(z / c) = y; 0 if there is none."""
    if not 0 < y < z:
        return 0.0
    low, high = y, 1e4 * z
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * np.tanh(z / middle) < y else (low, middle)
    return low if low < 1e3 * z else 0.0


def _key_of_sums(d: Divergence) -> str:
    """Return what it means if other arrays are summed: before a norm, that the norm has another place."""
    if d.first.kind == "input" and is_norm(d.module):
        return "norm placement"
    return "residual" if d.first.kind == "activation" else "another input"


def _sums(same: Labelled, target: np.ndarray, key: str) -> Iterator[Formula]:
    """Yield the sums of few earlier arrays that make an array, each perhaps times a number."""
    if not np.isfinite(target).all():
        return
    few = slice(None, None, max(1, target.size // 2000))
    size = float(np.linalg.norm(target.ravel()[few]))
    for n in (1, 2, 3):
        for chosen in itertools.combinations(same, n):
            weights, rest = combined(target.ravel()[few], *(z.ravel()[few] for _, z in chosen))
            if rest < 1e-6 * size and (np.abs(weights) > 1e-6).all():
                total = np.asarray(sum(w * z for w, (_, z) in zip(weights, chosen, strict=True)))
                if np.allclose(weights, 1, atol=1e-4):
                    text = f"is {' plus '.join(label for label, _ in chosen)}"
                    yield Formula({key: text, "scale": ""}, total, "module skipped" if n == 1 else key)
                else:
                    terms = [f"{w:.5g} times {label}" for w, (label, _) in zip(weights, chosen, strict=True)]
                    texts = {key: f"is a sum of {' and '.join(label for label, _ in chosen)}"}
                    yield Formula(texts | {"scale": f"is {' plus '.join(terms)}"}, total, "scale")
                return


def _pooled(d: Divergence, label: str, z: np.ndarray) -> Iterator[Formula]:
    """Yield what may be taken of a sequence [B, T, D]."""
    T, lasts = z.shape[1], [d.batch("last")]
    if d.tokens is not None and len(d.tokens) == len(z):
        lasts += [np.where(d.tokens != pad, np.arange(d.tokens.shape[1]), 0).max(1) for pad in pads_of(d.tokens)]
    taken = {"the first position": z[:, 0], "the last position": z[:, -1], "the mean over positions": z.mean(1)}
    for last in lasts:
        for shift, text in ((0, "the last token"), (-1, "the token before the last"), (1, "what is behind the text")):
            if last is not None and np.shape(last) == (len(z),):
                taken.setdefault(text, z[np.arange(len(z)), np.clip(np.asarray(last, int) + shift, 0, T - 1)])
    for text, w in taken.items():
        yield Formula({"pooling": f"takes {text} of {label}"}, w, "pooling")


def _at_positions(d: Divergence, label: str, z: np.ndarray) -> Iterator[Formula]:
    """Yield what is taken at the positions that the batch names."""
    positions = d.batch("positions")
    if positions is None or positions.ndim != 2 or len(positions) != len(z):
        return
    shifts = (1, -1) if z.shape == d.x.shape else (0, 1, -1)
    for shift in shifts if positions.size * z.shape[-1] == d.x.size else ():
        index = (np.asarray(positions, int) + shift) % z.shape[1]
        text = f"takes the positions {f'{shift:+d} ' if shift else ''}of {label}"
        taken = np.take_along_axis(z, index[:, :, None], 1).reshape(d.x.shape)
        yield Formula({"positions taken": text}, taken, "positions taken" if shift else "")


def pads_of(tokens: np.ndarray) -> list[int]:
    """Return which ids may be the pad: what rows end or begin with most, and 0."""
    values, counts = np.unique(np.concatenate([tokens[:, -1], tokens[:, 0]]), return_counts=True)
    return list(dict.fromkeys([0, *(int(v) for v in values[np.argsort(-counts)][:3])]))


RULES: tuple[Rule, ...] = (arrays_before,)
