"""Rows of several samples each, so that short texts do not fill a model with padding; and one stream without borders.

Which samples share a row follows from their lengths, the seed and the epoch alone: rows have numbers, as samples have,
and order, resume and processes know nothing of packing.
"""

import bisect
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data.cache import Split
from jaxlm.data.samples import IGNORED, Batch, CausalSamples, Samples, uniform
from jaxlm.errors import UserError


def samples_of(samples_class: type[Any], split: Split, config: Config, specials: dict[str, int], n_ids: int) -> Any:
    """Return the samples of a split, packed as data.pack says. Raises UserError for what cannot be packed so."""
    pack = config.data.pack
    if pack == "stream" and samples_class is not CausalSamples:
        raise UserError(f"data.pack=stream: only task=gpt reads one; set data.pack=documents for task={config.task}")
    if pack == "documents" and samples_class.reads == "sets":
        raise UserError(f"data.pack=documents: task={config.task} reads a text a row; leave it out")
    if pack == "stream":
        return StreamSamples(split, config, specials, n_ids)
    samples = samples_class(split, config, specials, n_ids)
    return PackedSamples(samples, config) if pack == "documents" else samples


class PackedSamples:
    """Rows of several samples of another kind, which `segments` [B, T] number from 1 in each row; 0 is padding.

    What these samples have for each position, rows have, too. Labels of a fixed number are in `labels` and `positions`
    [B, N], N of which a row has room for. In each epoch, samples of equal length change places.
    """

    def __init__(self, samples: Samples, config: Config):
        self.unpacked, self.seq_len, self.seed = samples, config.model.seq_len, config.train.seed
        self.pad = max(config.model.pad_id, 0)
        lengths = samples.lengths(np.arange(len(samples)))
        counts = np.bincount(lengths, minlength=self.seq_len + 1)
        kinds = plan(counts, samples.slots(np.arange(self.seq_len + 1)), samples.n_slots)
        n_rows = [n for _, n in kinds]
        self.ends = np.cumsum(np.repeat([len(row) for row, _ in kinds], n_rows), dtype=np.int64)
        # A place in a row is for any sample of one length: the k-th place of that length, for the k-th sample of it.
        of_places = np.concatenate([np.tile(row, n) for row, n in kinds] or [np.zeros(0, np.int64)])
        self.ranks = np.empty(len(of_places), np.int64)
        self.ranks[np.argsort(of_places, kind="stable")] = np.arange(len(of_places))
        shuffled = uniform(self.seed, np.zeros(len(lengths)), np.arange(len(lengths)), 1)[:, 0]
        self.by_length = np.lexsort((shuffled, lengths))
        self.counts, self.firsts = counts, np.cumsum(counts) - counts

    def __getattr__(self, name: str) -> Any:
        """Return what is the same of rows and samples: the split, what it counts, what is read."""
        if name == "unpacked":  # not there yet, as in a copy
            raise AttributeError(name)
        return getattr(self.unpacked, name)

    def __len__(self) -> int:
        return len(self.ends)

    def members(self, indices: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the samples of rows, one row after the other, and for each the place of its row in `indices`."""
        begins = np.where(indices > 0, self.ends[indices - 1], 0)
        rows = np.repeat(np.arange(len(indices)), self.ends[indices] - begins)
        ranks = self.ranks[begins[rows] + _before(np.ones_like(rows), rows)]
        length = np.searchsorted(self.firsts, ranks, side="right") - 1
        first, n = self.firsts[length], self.counts[length]
        turns = (uniform(self.seed, epochs[rows], length, 1)[:, 0] * n).astype(np.int64)
        return self.by_length[first + (ranks - first + turns) % n], rows

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        members, rows = self.members(indices, epochs)
        alone, lengths = self.unpacked.batch(members, epochs[rows]), self.unpacked.lengths(members)
        begins, B = _before(lengths, rows)[:, None], len(indices)
        number = 1 + _before(np.ones_like(rows), rows)
        numbers = np.repeat(number[:, None].astype(np.int32), self.seq_len, axis=1)
        batch = {
            "tokens": _joined(alone["tokens"], lengths, rows, (B, self.seq_len), self.pad),
            "segments": _joined(numbers, lengths, rows, (B, self.seq_len), 0),
        }
        if "types" in alone:
            batch["types"] = _joined(alone["types"], lengths, rows, (B, self.seq_len), 0)
        if not self.unpacked.n_slots:
            return batch | {"labels": _joined(alone["labels"], lengths, rows, (B, self.seq_len), IGNORED)}
        shape, n_slots = (B, self.unpacked.n_slots), self.unpacked.slots(lengths)
        places = alone.get("positions", alone.get("last", np.zeros(len(rows), np.int32))).reshape(len(rows), -1)
        positions = (places + begins).astype(np.int32)
        return batch | {
            "positions": _joined(positions, n_slots, rows, shape, 0),
            "labels": _joined(alone["labels"].reshape(len(rows), -1), n_slots, rows, shape, IGNORED),
        }

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Return how many positions of each row are not padding, which is the same in all epochs."""
        members, rows = self.members(indices, np.zeros_like(indices))
        return np.bincount(rows, self.unpacked.lengths(members), minlength=len(indices)).astype(np.int64)

    def n_tokens(self, batch: Batch) -> int:
        return int(np.count_nonzero(batch["segments"]))


def plan(counts: np.ndarray, slots: np.ndarray, n_slots: int) -> list[tuple[tuple[int, ...], int]]:
    """Return kinds of rows: the lengths of the samples in a row, and the number of such rows.

    There are counts[l] samples of l positions, each of which takes slots[l] of the `n_slots` of a row. The longest
    first, each into the fullest row that it fits into, but all of one length and into rows of one kind at once, so that
    millions of samples take no longer than thousands. Source: LPFHP of arXiv 2107.02027, section 3.
    """
    T = len(counts) - 1
    open_kinds: list[tuple[int, tuple[int, ...], int, int]] = []  # by room left: that, lengths, rows, slots left
    full = []
    for length in range(T, 0, -1):
        n, taken = int(counts[length]), int(slots[length])
        while n:
            i = bisect.bisect_left(open_kinds, length, key=lambda kind: kind[0])
            if i < len(open_kinds):
                room, row, n_rows, left = open_kinds.pop(i)
            else:
                most = min(T // length, n_slots // taken if taken else T)
                room, row, n_rows, left = T, (), -(-n // most), n_slots
            if left < taken:
                full.append((row, n_rows))
                continue
            k = min(n, n_rows)
            n -= k
            for kind in ((room, row, n_rows - k, left), (room - length, (*row, length), k, left - taken)):
                if kind[2]:
                    bisect.insort(open_kinds, kind, key=lambda kind: kind[0])
    return full + [(row, n_rows) for _, row, n_rows, _ in open_kinds]


def _before(sizes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the sum of the sizes that stand before each in its row; `rows` says which row each is in, in order."""
    before = np.cumsum(sizes) - sizes
    return before - before[np.searchsorted(rows, rows)]


def _joined(values: np.ndarray, sizes: np.ndarray, rows: np.ndarray, shape: tuple[int, int], fill: int) -> np.ndarray:
    """Return rows in which the first `sizes` of each line of `values` stand one after another, and then `fill`."""
    column = np.arange(values.shape[1])
    is_kept = column < sizes[:, None]
    result = np.full(shape, fill, values.dtype)
    into = (_before(sizes, rows)[:, None] + column)[is_kept]
    result[np.broadcast_to(rows[:, None], is_kept.shape)[is_kept], into] = values[is_kept]
    return result


class StreamSamples(CausalSamples):
    """Windows of one stream, [end of text] article [end of text] article ..., that is cut anywhere, as nanoGPT does.

    The stream is a circle, so that each id is a label once in an epoch. The first epoch, and so each evaluation, begins
    at its begin, the others anywhere.
    """

    def __init__(self, split: Split, config: Config, specials: dict[str, int], vocab_size: int):
        super().__init__(split, config, specials, vocab_size)
        self.seed = config.train.seed
        offsets = split.offsets[np.flatnonzero(np.diff(split.offsets))]
        self.begins = offsets + np.arange(len(offsets))  # where each article's [end of text] is in the stream
        self.n_ids = len(split.tokens) + len(offsets)

    def __len__(self) -> int:
        return -(-self.n_ids // self.seq_len)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        turns = uniform(self.seed, epochs, np.zeros_like(epochs), 1) * (epochs > 0)[:, None]
        place = indices[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        is_label = place[:, :-1] < self.n_ids
        place = (place + (turns * self.n_ids).astype(np.int64)) % self.n_ids
        article = np.searchsorted(self.begins, place, side="right") - 1
        inside = place - article - 1  # of the tokens: each article so far has added an id
        ids = self.split.tokens[np.maximum(inside, 0)].astype(np.int32)
        ids = np.where(place == self.begins[article], self.article, ids)
        labels = np.where(is_label & (ids[:, 1:] != self.pad_id), ids[:, 1:], IGNORED)
        return {"tokens": ids[:, :-1], "labels": labels}

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.minimum(self.seq_len, self.n_ids - indices * self.seq_len)
