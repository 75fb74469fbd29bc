"""Embeddings: the scale of tokens, and what differs between two tables of positions."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity_tests.compare.catalogue.evidence import NEAR, Cause, Rule, distance
from parity_tests.compare.catalogue.place import Divergence

ROWS = 256  # of an embedding's output that are looked for in its table


def token_and_position(d: Divergence) -> Iterator[Cause]:
    """Token embeddings are scaled, or positions differ, where both sides are a sum of the two."""
    tokens, x, y = d.tokens, d.x, d.y
    if tokens is None or x.ndim != 3 or x.shape[:2] != tokens.shape:
        return
    for table in [table for table in _tables(d) if len(table) > tokens.max()][:2]:
        embedded = table[tokens]
        rests = x - embedded, y - embedded
        is_table = [float(np.abs(z - z[:1]).max()) < 1e-5 * (np.abs(z).max() + 1e-9) for z in rests]
        if not all(is_table):
            yield from _numbered_otherwise(d, rests)
        if not any(is_table):
            continue
        positions = rests[0 if is_table[0] else 1][0]
        for which, side in (("B", y), ("A", x)):
            scaled = side - positions
            weight = float((embedded * scaled).sum() / (embedded**2).sum())
            if abs(weight - 1) > 1e-3 and distance(weight * embedded, scaled) < NEAR * distance(x, y):
                note = " = sqrt(d)" if abs(weight - x.shape[-1] ** 0.5) < 1e-3 else ""
                text = f"{d.where}: {which} scales token embeddings by {weight:.5g}{note}"
                yield Cause("embedding scale", text, 1.0)
        if all(is_table):
            yield from of_positions(d.where, rests[0][0], rests[1][0])


def _tables(d: Divergence, names: str = "token|embed|wte|word") -> list[np.ndarray]:
    """Return A's tables of as many columns as the array has, by their names."""
    found = []
    for name, pair in d.pairs.items():
        table = d.a.tensor("parameter", d.update, pair)
        if table is not None and table.ndim == 2 and re.search(names, name):
            table = table if table.shape[1] == d.x.shape[-1] else table.T
            if table.shape[1] == d.x.shape[-1]:
                found.append(table)
    return found


def _numbered_otherwise(d: Divergence, rests: tuple[np.ndarray, np.ndarray]) -> Iterator[Cause]:
    """Both sides add rows of one table of positions, but other rows, as where documents share a row of tokens."""
    for table in _tables(d, "position|wpe"):
        apart = [np.linalg.norm(rest[:, :, None] - table, axis=-1) for rest in rests]
        if max(z.min(-1).max() for z in apart) < 1e-4 * np.abs(table).max():
            one, two = (z.argmin(-1) for z in apart)
            at = tuple(np.argwhere(one != two)[0])
            text = f"token {at[1]} of row {at[0]} has position {two[at]} in B, {one[at]} in A"
            yield Cause("position offset", f"{d.where}: {text}", 0.95)


# What may differ between two tables of positions p and q [T, D]: cause, score, what it says, and when it is so.
TABLE = tuple[str, float, str, Callable[[np.ndarray, np.ndarray, float], Any]]
TABLES: tuple[TABLE, ...] = (
    ("position offset", 1.0, "B's positions are A's shifted", lambda p, q, near: _is_shifted(p, q, near)),
    ("position order", 1.0, "B counts positions from the other end",
     lambda p, q, near: np.linalg.norm(p[::-1] - q) < near),
    ("sine and cosine", 1.0, "sine and cosine are in each other's place",
     lambda p, q, near: np.linalg.norm(p - _pairs_swapped(q)) < near or _is_sine_for_cosine(p, q)),
    ("sine and cosine", 1.0, "sines and cosines are interleaved in one, and two halves in the other",
     lambda p, q, near: min(np.linalg.norm(p - _halves(q)), np.linalg.norm(_halves(p) - q)) < near),
    ("position frequencies", 0.9, "B's table has other frequencies: another base or exponent",
     lambda p, q, near: max(np.abs(p).max(), np.abs(q).max()) < 1.000001
     and bool(np.allclose(np.abs(p[:1]), np.abs(q[:1]), atol=1e-6))),
    ("positions missing", 1.0, "B adds no positions", lambda p, q, near: not q.any()),
    ("positions missing", 1.0, "A adds no positions", lambda p, q, near: not p.any()),
    ("positions", 0.6, "positions differ, and tokens do not", lambda p, q, near: True),
)  # fmt: skip


def of_positions(where: str, p: np.ndarray, q: np.ndarray) -> Iterator[Cause]:
    """Yield how two position tables [T, D] differ."""
    near = NEAR * float(np.linalg.norm(p - q))
    for kind, score, text, holds in TABLES:
        if holds(p, q, near):
            yield Cause(kind, f"{where}: {text}", score)


def _is_shifted(p: np.ndarray, q: np.ndarray, near: float) -> bool:
    return any(
        len(p) > n + 1 and min(np.linalg.norm(p[n:] - q[:-n]), np.linalg.norm(p[:-n] - q[n:])) < near for n in (1, 2)
    )


def _pairs_swapped(q: np.ndarray) -> np.ndarray:
    swapped, n = q.copy(), q.shape[1] // 2 * 2
    swapped[:, 0:n:2], swapped[:, 1:n:2] = q[:, 1:n:2], q[:, 0:n:2]
    return swapped


def _halves(q: np.ndarray) -> np.ndarray:
    return np.concatenate([q[:, ::2], q[:, 1::2]], axis=1)


def _is_sine_for_cosine(p: np.ndarray, q: np.ndarray) -> bool:
    """Return whether each column is a sine in one and a cosine in the other."""
    return max(np.abs(p).max(), np.abs(q).max()) < 1.000001 and bool(np.allclose(p**2 + q**2, 1, atol=1e-5))


def rows_taken(d: Divergence) -> Iterator[Cause]:
    """Both sides take rows of one table, but other rows: ids or positions are counted otherwise."""
    for table in d.parameters(d.module).values():
        x, y = (z.reshape(-1, z.shape[-1])[:ROWS] if z.ndim > 1 else z[None] for z in d.both)
        if table.ndim != 2 or x.shape != y.shape or table.shape[1] != x.shape[1]:
            continue
        apart = [np.abs(z[:, None] - table).max(-1) for z in (x, y)]
        if max(z.min(-1).max() for z in apart) < 1e-4 * np.abs(table).max():
            one, two = (z.argmin(-1) for z in apart)
            shifts = set((two - one).tolist())
            text = f"{d.where}: row {two[0]} of the table is taken in B, {one[0]} in A"
            if len(shifts) == 1 and re.search("pos|wpe", d.module):
                yield Cause("position offset", f"{text}: {shifts.pop():+d} at each position", 1.0)
            else:
                yield Cause("another input", text, 0.9)


RULES: tuple[Rule, ...] = (token_and_position, rows_taken)
