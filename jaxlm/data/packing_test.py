"""Packed rows: each sample once an epoch, as it is unpacked; the plan; and the stream."""

from itertools import islice
from typing import Any

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.config import TrainConfig
from jaxlm.data import packing
from jaxlm.data.cache import Split
from jaxlm.data.loader import evaluation_batches, training_batches
from jaxlm.data.position import Position
from jaxlm.data.samples import CausalSamples, ClassifiedSamples, MaskedSamples, PairSamples
from jaxlm.errors import UserError

SPECIALS = {"pad": 0, "mask": 1, "start": 2, "end": 3, "article": 4}
KINDS = (CausalSamples, MaskedSamples, ClassifiedSamples, PairSamples)
T, N = 32, 60


def split_of(sizes: Any) -> Split:
    tokens = np.arange(5, 5 + sum(sizes), dtype=np.uint16)  # no id occurs twice
    labels = np.arange(len(sizes), dtype=np.int32)
    return Split(tokens, np.concatenate([[0], np.cumsum(sizes)]), labels, np.asarray(sizes, np.int64))


def made(kind: type, pack: str = "documents", sizes: Any = None, **settings: Any) -> Any:
    sizes = np.random.default_rng(0).integers(1, 20, N) if sizes is None else sizes
    config = configs.build({"model.seq_len": T, "data.pack": pack, "data.n_labels": N, **settings})
    return packing.samples_of(kind, split_of(sizes), config, SPECIALS, 5 + int(np.sum(sizes)))


def documents(batch: dict[str, np.ndarray]) -> list[tuple[list[int], Any]]:
    """Return the ids of each document of a batch, packed or not, and its labels with their places in it."""
    found = []
    for i, tokens in enumerate(batch["tokens"]):
        segments = batch["segments"][i] if "segments" in batch else np.ones(T, int)
        for segment in range(1, segments.max() + 1):
            own = np.flatnonzero(segments == segment)
            assert own.tolist() == list(range(own[0], own[-1] + 1))
            labels = batch["labels"][i]
            if labels.ndim and len(labels) == T and "positions" not in batch:  # one at each position
                told = [(k, x) for k, x in enumerate(labels[own].tolist()) if x >= 0]
            else:
                places = np.atleast_1d(batch["positions"][i] if "positions" in batch else 0)
                told = [
                    (k - own[0], x) for k, x in zip(places, np.atleast_1d(labels), strict=True) if x >= 0 and k in own
                ]
            ids = tokens[own].tolist()
            found.append((ids, sorted(told)))
    return found


def of_unpacked(samples: Any, epoch: int) -> list[tuple[list[int], Any]]:
    indices = np.arange(len(samples))
    lengths = samples.lengths(indices)
    whole = documents(samples.batch(indices, np.full_like(indices, epoch)))
    return [(ids[:length], told) for (ids, told), length in zip(whole, lengths, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_has_each_sample_once_as_it_is_unpacked(kind: type) -> None:
    rows, seen = made(kind), []
    indices = np.arange(len(rows))
    for epoch in (0, 1, 7):
        batch = rows.batch(indices, np.full_like(indices, epoch))
        assert batch["tokens"].shape == batch["segments"].shape == (len(rows), T)
        found = documents(batch)
        assert sorted(found) == sorted(of_unpacked(rows.unpacked, epoch))
        assert all((labels >= 0).sum() <= rows.n_slots for labels in batch["labels"]) or not rows.n_slots
        assert rows.n_tokens(batch) == rows.lengths(indices).sum() == sum(len(ids) for ids, _ in found)
        seen.append([tuple(ids) for ids, _ in found])
    assert len(rows) < 0.75 * len(rows.unpacked) and rows.lengths(indices).mean() > 0.85 * T
    assert seen[0] != seen[1] != seen[2]  # samples of one length have changed places
    assert [x[0] for x in of_unpacked(made(kind, "none"), 0)] == [x[0] for x in of_unpacked(rows.unpacked, 0)]


def test_what_shares_a_row_follows_the_seed() -> None:
    indices, zeros = np.arange(5), np.zeros(5, int)
    first, again, other = (made(CausalSamples, **{"train.seed": seed}).batch(indices, zeros) for seed in (3, 3, 4))
    assert np.array_equal(first["tokens"], again["tokens"]) and not np.array_equal(first["tokens"], other["tokens"])


def test_a_later_start_and_a_part_of_the_rows_have_the_same_batches() -> None:
    rows, train = made(MaskedSamples), TrainConfig(batch_size=6, accumulate=2)
    whole = list(islice(training_batches(rows, train), 9))
    later = islice(training_batches(rows, train, Position(4, Position().first(4, train))), 5)
    part = islice(training_batches(rows, train, rows=np.arange(2, 4)), 9)
    for a, b in zip(later, whole[4:], strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in b)
    for a, b in zip(part, whole, strict=True):
        assert all(np.array_equal(a[name], b[name][:, 2:4]) for name in b)


def test_an_evaluation_counts_each_label_once() -> None:
    rows = made(ClassifiedSamples)
    found = [batch["labels"][batch["labels"] >= 0] for batch in evaluation_batches(rows, 7)]
    assert sorted(np.concatenate(found)) == list(range(N))


def test_short_texts_keep_their_masks() -> None:
    rows = made(MaskedSamples, sizes=[1] * 50)  # each has one mask, of the 4 that a row has room for
    indices = np.arange(len(rows))
    assert (rows.batch(indices, indices)["labels"] >= 0).sum() == 50 and len(rows) == 13


def test_plans_fill_rows_and_keep_to_their_room() -> None:
    random = np.random.default_rng(0)
    for length, drawn in ((128, 3 + random.gamma(1.3, 9, 70_000)), (512, 3 + random.gamma(3, 90, 25_000))):
        counts = np.bincount(np.minimum(drawn, length).astype(int), minlength=length + 1)
        slots = np.ones(length + 1, int)
        kinds = packing.plan(counts, slots, length // 4)
        placed = np.zeros_like(counts)
        for row, n in kinds:
            assert sum(row) <= length and len(row) <= length // 4 and n > 0
            np.add.at(placed, list(row), n)
        assert np.array_equal(placed, counts)
        n_tokens = counts @ np.arange(length + 1)
        assert n_tokens > 0.99 * length * sum(n for _, n in kinds)
    assert packing.plan(np.zeros(9, int), np.zeros(9, int), 0) == []


# The stream


def test_each_id_of_a_stream_is_a_label_once_an_epoch() -> None:
    sizes = [3, 0, 50, 1, 29]
    samples = made(CausalSamples, "stream", sizes)
    indices = np.arange(len(samples))
    stream = [id for ids in np.split(np.arange(5, 88), np.cumsum(sizes)[:-1]) if len(ids) for id in (4, *ids)]
    assert samples.n_ids == len(stream) == 87 and len(samples) == 3
    for epoch in (0, 1, 2):
        batch = samples.batch(indices, np.full_like(indices, epoch))
        tokens, labels = batch["tokens"].ravel(), batch["labels"].ravel()
        first = stream.index(tokens[1]) - 1
        turned = stream[first:] + stream[:first]
        assert tokens[:87].tolist() == turned and labels[:86].tolist() == turned[1:]
        assert labels[86] == turned[0] and np.all(labels[87:] == -1)
        assert (first == 0) == (epoch == 0)
        assert samples.n_tokens(batch) == samples.lengths(indices).sum() == 87
    assert samples.counted_tokens().sum() == 87


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(UserError, match="set data.pack=documents for task=mlm"):
        made(MaskedSamples, "stream")
    with pytest.raises(UserError, match="data.pack=documents fills all rows"):
        configs.load(["--data.pack", "documents", "--train.group-by-length", "true"])
