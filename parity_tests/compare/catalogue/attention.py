"""Attention, computed again from queries, keys and values, with each of the settings in which ports of it differ."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity_tests.compare.catalogue.composed import pads_of
from parity_tests.compare.catalogue.evidence import NEAR, Cause, Rule, distance, size_of_difference
from parity_tests.compare.catalogue.place import Divergence

FUTURE = 10**6  # a side of a window that has no end
MOST = 10**6  # elements times positions, above which windows of unknown size are not searched for
DIVISORS: dict[str, Callable[[int, int, int, int], float]] = {  # of D (queries), K (a head), H (heads), W (model)
    "root of the head size": lambda D, K, H, W: K**0.5,
    "1": lambda D, K, H, W: 1.0,
    "root of the width": lambda D, K, H, W: D**0.5,
    "root of the model's width": lambda D, K, H, W: W**0.5,
    "root of the model's width over heads": lambda D, K, H, W: (W / H) ** 0.5,
    "the head size": lambda D, K, H, W: float(K),
}
ROTARY = ("none", "halves", "interleaved", "interleaved, apart", "halves, half the exponent", "halves, from 1",
          "halves, opposite")  # fmt: skip
BASES = (1e4, 5e5, 1e6, 1.6e5, 1e5, 1e3, 100.0, 50.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Attention:
    """How attention is computed from queries [B, T, H K], and keys and values [B, T, G K] of as many or fewer heads."""

    heads: int
    layout: str = "contiguous"
    rotary: str = "none"
    base: float = 10_000.0
    scale: str = "root of the head size"
    before: int = FUTURE  # how many positions before its own a query sees
    after: int = FUTURE
    pad: int | None = None
    masks: str = "keys"
    axis: int = -1
    merged: bool = True
    is_swapped: bool = False
    groups: str = "in stretches"
    documents: str = "seen"  # of packed rows
    width: int = 1  # of the model

    def compute(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, tokens: Any, segments: Any) -> np.ndarray | None:
        """Return the mixed values [B, T, H K], or None where the sizes do not allow it."""
        B, T, D = q.shape
        H, K = self.heads, D // self.heads
        if D % H or k.shape[-1] % K or H % (k.shape[-1] // K or 1) or (self.rotary != "none" and K % 2):
            return None
        if self.is_swapped:
            if q.shape != k.shape:
                return None
            q, k = k, q
        q, k, v = (self._split(x, K) for x in (q, k, v))
        if self.rotary != "none":
            q, k = self._turned(q, segments), self._turned(k, segments)
        k, v = (self._repeated(x, H) for x in (k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k) / DIVISORS[self.scale](D, K, H, self.width)
        if self.pad is not None and tokens is not None:
            is_pad = tokens == self.pad
            mask = is_pad[:, None, None, :] if self.masks == "keys" else is_pad[:, None, :, None]
            scores = np.where(mask, -1e9, scores)
        behind = np.arange(T)[:, None] - np.arange(T)  # how far a key is behind the query
        scores = np.where((behind > self.before) | (-behind > self.after), -np.inf, scores)
        if self.documents == "apart":
            scores = np.where((segments[:, :, None] != segments[:, None, :])[:, None], -1e9, scores)
        scores = scores - scores.max(self.axis, keepdims=True)
        weights = np.exp(scores)
        weights /= weights.sum(self.axis, keepdims=True)
        mixed = np.einsum("bhts,bshk->bthk", weights, v)
        return (mixed if self.merged else mixed.swapaxes(1, 2)).reshape(B, T, D)

    def _split(self, x: np.ndarray, K: int) -> np.ndarray:
        B, T, D = x.shape
        return x.reshape(B, T, D // K, K) if self.layout == "contiguous" else x.reshape(B, T, K, D // K).swapaxes(2, 3)

    def _repeated(self, x: np.ndarray, H: int) -> np.ndarray:
        G = x.shape[2]
        heads = {
            "in stretches": np.arange(H) * G // H,
            "in turn": np.arange(H) % G,
            "all of the first": np.zeros(H, int),
        }
        return x[:, :, heads[self.groups]]

    def _turned(self, x: np.ndarray, segments: Any) -> np.ndarray:
        T, K = x.shape[1], x.shape[3]
        positions = np.arange(T)[None] + ("from 1" in self.rotary)
        if segments is not None:  # they begin anew in each document
            is_start = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
            positions = positions - np.maximum.accumulate(np.where(is_start, np.arange(T), 0), axis=1)
        power = np.arange(0, K, 2) / K * (0.5 if "half the exponent" in self.rotary else 1.0)
        angle = (positions[:, :, None] * self.base**-power)[:, :, None]
        cos, sin = np.cos(angle), np.sin(angle)
        sin = -sin if "opposite" in self.rotary else sin
        is_paired = "interleaved" in self.rotary
        one, two = (x[..., ::2], x[..., 1::2]) if is_paired else np.split(x, 2, axis=-1)
        turned = one * cos - two * sin, two * cos + one * sin
        if is_paired and "apart" not in self.rotary:
            return np.stack(turned, axis=-1).reshape(x.shape)
        return np.concatenate(turned, axis=-1)

    def text(self) -> str:
        """Return the settings in words, the unusual ones last."""
        seen = {FUTURE: "all positions", 0: "positions up to its own"}.get(self.after, f"{self.after} positions ahead")
        sees = seen if self.before == FUTURE else f"a window of {self.before} before and {min(self.after, 999)} after"
        parts = [f"attends to {sees}, {self.heads} heads, scores over {self.scale}"]
        parts += [f"masks {self.masks} of pads"] if self.pad is not None else ["masks no pads"]
        parts += [f"rotary positions in {self.rotary}, base {self.base:g}"] if self.rotary != "none" else []
        parts += ["softmax over queries"] if self.axis == -2 else []
        parts += ["query and key swapped"] if self.is_swapped else []
        parts += [f"{self.layout} heads"] if self.layout != "contiguous" else []
        parts += ["heads not swapped back"] if not self.merged else []
        parts += [f"keys and values repeated {self.groups}"] if self.groups != "in stretches" else []
        parts += ["documents apart"] if self.documents == "apart" else []
        return ", ".join(parts)


# The cause of each setting that may differ, and the values that are tried; of pads and windows, those that fit.
CHANGES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("attention scale", "scale", tuple(DIVISORS)),
    ("attention mask", "after", (FUTURE, 0, 1)),
    ("attention mask", "masks", ("queries",)),
    ("softmax axis", "axis", (-2,)),
    ("head layout", "merged", (False,)),
    ("query and key swapped", "is_swapped", (True,)),
    ("head layout", "layout", ("interleaved",)),
    ("rotary layout", "rotary", ROTARY),
    ("rotary frequencies", "base", BASES),
    ("head layout", "groups", ("in turn", "all of the first")),
    ("packed documents", "documents", ("seen", "apart")),
)
FREQUENCIES = ("halves, half the exponent", "halves, from 1")


class _Block:
    """Queries, keys and values of the block that an array is in, and the array of both sides, of a few samples."""

    def __init__(self, d: Divergence, qkv: list[np.ndarray]):
        rows = slice(0, 3) if distance(d.x[:3], d.y[:3]) else slice(None)
        self.q, self.k, self.v = (z[rows] for z in qkv)
        self.x, self.y = d.x[rows], d.y[rows]
        self.near = NEAR * size_of_difference(self.x, self.y)
        self.tokens = d.tokens[rows] if d.tokens is not None and len(d.tokens) == len(d.x) else None
        segments = d.batch("segments")
        self.segments = segments[rows] if segments is not None and segments.shape == d.x.shape[:2] else None
        source = d.input(d.module.rpartition(".")[0])
        self.width = self.q.shape[-1] if source is None else source.shape[-1]
        self.pads = [None, *([] if self.tokens is None else pads_of(self.tokens))]

    def fits(self, how: Attention, target: np.ndarray) -> bool:
        z = how.compute(self.q, self.k, self.v, self.tokens, self.segments)
        return z is not None and distance(z, target) < self.near

    def usual(self) -> Iterator[Attention]:
        """Yield usual settings: first without, then with windows, documents apart, and other bases."""
        for how in self._usual():
            yield dataclasses.replace(how, width=self.width)

    def _usual(self) -> Iterator[Attention]:
        D, T = self.q.shape[-1], self.q.shape[1]
        heads = [h for h in range(1, D + 1) if D % h == 0 and D // h <= 512]
        documents = ["seen"] if self.segments is None else ["apart", "seen"]
        windows = [(FUTURE, FUTURE), (FUTURE, 0)]
        for kind in documents:
            for h, (before, after), pad in itertools.product(heads, windows, self.pads):
                for rotary in ("none", "halves", "interleaved"):
                    for base in BASES if rotary == "halves" else BASES[:1]:
                        yield Attention(
                            h, rotary=rotary, base=base, before=before, after=after, pad=pad, documents=kind
                        )
        widths = range(1, min(T, 9)) if self.q.size * T < MOST else ()
        for h, n, pad, kind in itertools.product(heads, widths, self.pads, documents):
            for after, (rotary, base) in itertools.product((n, 0), (("none", 1e4), *(("halves", b) for b in BASES))):
                yield Attention(h, rotary=rotary, base=base, before=n, after=after, pad=pad, documents=kind)

    def changes(self, how: Attention) -> list[tuple[str, dict[str, Any]]]:
        """Return what may be otherwise, with its cause."""
        found: list[tuple[str, dict[str, Any]]] = []
        for kind, key, values in CHANGES:
            found += [(kind, {key: x}) for x in values if key != "documents" or self.segments is not None]
        found += [("attention mask", {"pad": pad}) for pad in self.pads]
        found += [("attention mask", {"pad": pad, "masks": "queries"}) for pad in self.pads if pad is not None]
        D = self.q.shape[-1]
        return found + [("head layout", {"heads": h}) for h in range(1, min(D, 64) + 1) if D % h == 0]

    def windows(self, how: Attention) -> list[tuple[str, dict[str, Any]]]:
        """Return other windows, to both sides or one."""
        sizes = [*range(min(self.q.shape[1], 9)), FUTURE]
        pairs = [(n, m) for n in sizes for m in {n, 0, FUTURE, n + 1, max(0, n - 1), how.after}]
        return [("attention mask", {"before": n, "after": m}) for n, m in pairs]


def settings(d: Divergence) -> Iterator[Cause]:
    """One side is usual attention; the other is, with one or two settings otherwise."""
    qkv = _queries_keys_values(d) if d.x.ndim == 3 else None
    if not qkv:
        return
    block = _Block(d, qkv)
    for one, two, which, other in ((block.x, block.y, "B", "A"), (block.y, block.x, "A", "B")):
        how = next((how for how in block.usual() if block.fits(how, one)), None)
        if how is None:
            continue
        found = _change(block, how, two)
        if found:
            kind, changed = found
            yield Cause(kind, f"{d.where}: {which} {changed.text()}; {other} {how.text()}", 0.99)
        else:
            yield Cause("attention", f"{d.where}: {other} {how.text()}; {which} does not", 0.45)
            yield from _guesses(d, how.rotary != "none")
        return
    yield from _guesses(d, False)


def norms_of_queries_and_keys(d: Divergence) -> Iterator[Cause]:
    """What a norm of queries or keys gets differs, or what is made of their outputs."""
    is_norm_of_one = d.module.rpartition(".")[2] in NORMS
    parent = d.module.rpartition(".")[0]
    has_norms = any(f"{parent}.{name}" in d.modules for name in NORMS)
    if has_norms and (is_norm_of_one or d.first.kind == "input"):
        text = "heads are split otherwise, or a norm is of the other one, missing or over another axis"
        yield Cause("query and key norm", f"{d.where}: {text}", 0.6)


NORMS = ("query_norm", "key_norm", "q_norm", "k_norm")


def _change(block: _Block, how: Attention, target: np.ndarray) -> tuple[str, Attention] | None:
    """Return the first change of one setting, or else of two, with which settings make an array."""
    changes = [(change,) for change in (*block.changes(how), *block.windows(how))]
    pairs = itertools.combinations(block.changes(how), 2) if block.q.shape[-1] <= 256 else ()
    for chosen in itertools.chain(changes, pairs):
        change = {key: x for _, part in chosen for key, x in part.items()}
        changed = dataclasses.replace(how, **change)
        if len(change) >= len(chosen) and changed != how and block.fits(changed, target):
            is_frequency = change.get("rotary") in FREQUENCIES
            return "rotary frequencies" if is_frequency else chosen[0][0], changed
    return None


def _guesses(d: Divergence, is_rotary: bool) -> Iterator[Cause]:
    """Yield what attention may have otherwise where no settings fit: by the names of parameters and by positions."""
    at = np.abs(d.y - d.x).max(axis=(0, 2))
    first_agrees = at[0] < 1e-6 * at.max()
    has_positions = any("position" in name or "wpe" in name for name in d.pairs)
    text = f"{d.where}: queries, keys and values agree, and what attention makes of them does not"
    if is_rotary or (first_agrees and not has_positions):
        yield Cause("rotary frequencies", f"{text}: other angles of rotary positions?", 0.5)
    yield Cause("attention mask", f"{text}: another mask or window?", 0.4)


QUERIES_KEYS_VALUES = (
    ("query_norm", "q_norm", "query", "q", "q_proj", "q_lin", "wq"),
    ("key_norm", "k_norm", "key", "k", "k_proj", "k_lin", "wk"),
    ("value", "v", "v_proj", "v_lin", "wv"),
)


def _queries_keys_values(d: Divergence) -> list[np.ndarray] | None:
    """Return the queries, keys and values of the attention that an array is in: by name, or three in one."""
    before, outputs = d.earlier(d.a, 14), dict[str, np.ndarray]()
    for label, z in before:
        parent, _, name = label.rpartition(" ")[2].rpartition(".")
        if label.startswith("the output") and d.module.startswith(parent):
            outputs.setdefault(name.lower(), z)
    named = [next((outputs[name] for name in names if name in outputs), None) for names in QUERIES_KEYS_VALUES]
    found = [z.reshape(*z.shape[:2], -1) if z.ndim == 4 else z for z in named if z is not None]
    if len(found) < 3:
        joined = [z for _, z in before[:3] if z.shape == (*d.x.shape[:2], 3 * d.x.shape[2])]
        found = list(np.split(joined[0], 3, axis=-1)) if joined else []
    return found if len(found) == 3 and all(z.ndim == 3 and z.shape[:2] == d.x.shape[:2] for z in found) else None


RULES: tuple[Rule, ...] = (settings, norms_of_queries_and_keys)
