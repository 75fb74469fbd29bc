"""The order of samples: permutations that no batch size, accumulation or start changes, and exact evaluation."""

from itertools import islice

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.config import TrainConfig
from jaxlm.data import loader
from jaxlm.data.cache import Split
from jaxlm.data.loader import evaluation_batches, training_batches
from jaxlm.data.position import Position
from jaxlm.data.samples import IGNORED, CausalSamples, ClassifiedSamples, MaskedSamples, PairSamples, Samples

N = 23
SPECIALS = {"pad": 0, "unknown": 1, "start": 2, "end": 3, "mask": 4}


@pytest.fixture(scope="module")
def split() -> Split:
    """N articles; the one of number i is ten times the id 100 + i, and has the label i."""
    tokens = np.repeat(np.arange(100, 100 + N), 10).astype(np.uint16)
    labels = np.arange(N, dtype=np.int32)
    return Split(tokens, np.arange(0, 10 * N + 1, 10), labels, np.full(N, 30, np.int64))


def make(kind: type, split: Split) -> Samples:
    config = configs.build({"model.seq_len": 12, "data.n_labels": N, "model.pad_id": 0})
    return kind(split, config, SPECIALS | {"article": 200}, 300)


@pytest.fixture(scope="module")
def samples(split) -> Samples:
    """N samples whose label is their number."""
    return make(ClassifiedSamples, split)


def order(samples: Samples, n_steps: int, batch_size: int, accumulate: int = 1, seed: int = 0, first: int = 0):
    """Return the numbers of the samples of some updates, [updates, A, B]."""
    train = TrainConfig(batch_size=batch_size, accumulate=accumulate, seed=seed)
    position = Position(first, Position().first(first, train))
    batches = islice(training_batches(samples, train, position), n_steps)
    return np.array([batch["labels"] for batch in batches])


def test_each_epoch_has_each_sample_once_in_a_new_order(samples):
    epochs = order(samples, 5, batch_size=N).reshape(5, N)
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
    assert list(range(N)) not in epochs.tolist()


def test_order_follows_the_seed_alone(samples):
    first = order(samples, 6, batch_size=5, seed=3)
    assert np.array_equal(order(samples, 6, batch_size=5, seed=3), first)
    assert not np.array_equal(order(samples, 6, batch_size=5, seed=4), first)


def test_order_does_not_depend_on_the_batch_size(samples):
    stream = order(samples, 60, batch_size=1).ravel()
    for batch_size in (4, 7, 30):  # none divides the samples, and the last is more than an epoch
        assert np.array_equal(
            order(samples, 60 // batch_size, batch_size).ravel(), stream[: 60 // batch_size * batch_size]
        )


def test_accumulation_reshapes_the_same_stream(samples):
    flat = order(samples, 12, batch_size=4)
    assert flat.shape == (12, 1, 4)
    assert np.array_equal(order(samples, 4, batch_size=4, accumulate=3), flat.reshape(4, 3, 4))
    assert np.array_equal(order(samples, 4, batch_size=12), flat.reshape(4, 1, 12))


@pytest.mark.parametrize("first", [1, 5, 11])
def test_a_later_start_goes_on_with_the_same_batches(split, first):
    # Masking, too: an update in a later epoch has the masks of that epoch.
    samples = make(MaskedSamples, split)
    train = TrainConfig(batch_size=4, accumulate=2)
    whole = list(islice(training_batches(samples, train), 14))
    part = list(islice(training_batches(samples, train, Position(first, 8 * first)), 14 - first))
    for one, other in zip(whole[first:], part, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_batches_carry_the_epoch_of_each_sample(split):
    # The third batch lies in two epochs. Each row must be masked as its own epoch says.
    samples = make(MaskedSamples, split)
    places = np.arange(16, 24)
    stream = np.concatenate(
        [b["tokens"].reshape(-1, 12) for b in islice(training_batches(samples, TrainConfig(batch_size=8)), 3)]
    )
    numbers = np.array([row[row >= 100].max() - 100 for row in stream[16:24]])
    assert (places // N).tolist() == [0] * 7 + [1]
    assert np.array_equal(samples.batch(numbers, places // N)["tokens"], stream[16:24])
    assert not np.array_equal(samples.batch(numbers, np.zeros(8, int))["tokens"][7], stream[23])


@pytest.mark.parametrize("batch_size", [1, 5, N, 40])
def test_evaluation_covers_every_sample_once_and_in_order(samples, batch_size):
    batches = list(evaluation_batches(samples, batch_size))
    assert {batch["labels"].shape for batch in batches} == {(batch_size,)}
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 12)}
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert labels[:N].tolist() == list(range(N)) and set(labels[N:].tolist()) <= {IGNORED}
    assert len(batches) == -(-N // batch_size)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert tokens[:N, 1].tolist() == list(range(100, 100 + N))
    assert tokens.max() < 100 + N  # what fills the last batch are real tokens, so that nothing is out of range


@pytest.mark.parametrize("kind", [CausalSamples, MaskedSamples])
def test_evaluation_counts_every_label_once_on_an_uneven_split(split, kind):
    samples = make(kind, split)
    whole = samples.batch(np.arange(len(samples)), np.zeros(len(samples), int))
    assert len(samples) % 4
    batches = list(evaluation_batches(samples, 4))
    for name in whole:
        joined = np.concatenate([batch[name] for batch in batches])
        assert np.array_equal(joined[: len(samples)], whole[name])
    assert np.all(batches[-1]["labels"][len(samples) % 4 :] == IGNORED)
    again = list(evaluation_batches(samples, 4))  # and each time the same masks
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(batches, again, strict=True) for name in a)


def uneven(n_articles: int) -> CausalSamples:
    """Samples of articles of 1 to 40 tokens."""
    sizes = np.random.default_rng(0).integers(1, 41, n_articles)
    tokens = np.arange(sizes.sum()) % 90 + 100
    labels = np.full(n_articles, -1, np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return make(CausalSamples, Split(tokens.astype(np.uint16), offsets, labels, 7 * sizes))  # type: ignore[return-value]


def test_a_bounded_evaluation_scores_a_sample_that_only_the_seed_changes():
    samples = uneven(300)
    lengths = samples.lengths(np.arange(len(samples)))
    chosen = loader.choose(samples, "validation", [1000], seed=3)[0]
    assert 1000 <= chosen.n_tokens < 1000 + 12 and chosen.n_tokens == lengths[chosen.indices].sum()
    assert np.all(np.diff(chosen.indices) > 0) and len(chosen.indices) < len(samples) / 3
    assert chosen.share == chosen.n_tokens / lengths.sum()
    assert np.array_equal(loader.choose(samples, "validation", [1000], seed=3)[0].indices, chosen.indices)
    assert not np.array_equal(loader.choose(samples, "validation", [1000], seed=4)[0].indices, chosen.indices)
    more = loader.choose(samples, "validation", [2000], seed=3)[0]
    assert set(chosen.indices) < set(more.indices)  # another bound keeps what it can
    # Spread over the whole split: about as many in each third of it.
    assert np.bincount(3 * chosen.indices // len(samples)).min() > len(chosen.indices) / 4

    batches = list(evaluation_batches(samples, 4, chosen=chosen.indices))
    tokens = np.concatenate([batch["tokens"] for batch in batches])[: len(chosen.indices)]
    assert np.array_equal(tokens, samples.batch(chosen.indices, np.zeros_like(chosen.indices))["tokens"])
    assert sum(np.count_nonzero(batch["labels"] >= 0) for batch in batches) == chosen.n_tokens
    shares = evaluation_batches(samples, 4, np.array([1]), chosen=chosen.indices)
    own = np.concatenate([batch["tokens"] for batch in shares])
    assert np.array_equal(own[:-1], tokens[1::4][: len(own) - 1])  # the rows of one process of four

    assert chosen.constants(samples)["bytes"] == pytest.approx(samples.constants["bytes"] * chosen.share)


@pytest.mark.parametrize("n_tokens", [0, 10_000])
def test_an_evaluation_without_a_bound_or_below_it_scores_everything(n_tokens):
    samples = uneven(300)
    chosen = loader.choose(samples, "test", [n_tokens], seed=0)[0]
    assert chosen.share == 1 and np.array_equal(chosen.indices, np.arange(len(samples)))
    assert chosen.constants(samples) == samples.constants


def test_evaluation_of_nothing_is_no_batch(split):
    empty = Split(split.tokens[:0], split.offsets[:1], split.labels[:0], split.n_bytes[:0])
    assert list(evaluation_batches(make(ClassifiedSamples, empty), 4)) == []
    assert list(evaluation_batches(make(CausalSamples, empty), 4)) == []


@pytest.mark.parametrize("first", [0, 3, 9])
def test_updates_read_the_samples_of_their_position(samples, first):
    train = TrainConfig(batch_size=3, accumulate=2, cycle_steps=2)
    stream = order(samples, 200, batch_size=1).ravel()
    begin = 6 * first + 11  # a place that no run with these settings would be at
    counts = [2 * (1, 1, 2)[i // 2 % 3] for i in range(first, first + 12)]
    bad = begin + 3 * sum(counts[:5])
    position = Position(first, begin, ((bad, bad + 12), (begin - 6, begin)))
    expected = np.concatenate([stream[begin:bad], stream[bad + 12 :]])
    for n, batch in zip(counts, training_batches(samples, train, position), strict=False):
        assert batch["labels"].shape == (n, 3)
        assert batch["labels"].ravel().tolist() == expected[: 3 * n].tolist()
        expected = expected[3 * n :]


def test_a_changed_batch_size_uses_each_sample_once(samples):
    # Three updates of 4, then as many as are left of the epoch in batches of 1.
    first = order(samples, 3, batch_size=4)
    rest = islice(training_batches(samples, TrainConfig(batch_size=1), Position(3, 12)), N - 12)
    labels = [*first.ravel().tolist(), *(int(batch["labels"][0, 0]) for batch in rest)]
    assert sorted(labels) == list(range(N))


# Grouped by length


@pytest.fixture(scope="module")
def ragged() -> Split:
    """60 articles of 1 to 40 tokens, not in order of length; the one of number i is of the id 100 + i."""
    sizes = 1 + np.arange(60) ** 2 * 7 % 40
    tokens = np.repeat(np.arange(100, 160), sizes).astype(np.uint16)
    return Split(tokens, np.append(0, np.cumsum(sizes)), np.arange(60, dtype=np.int32) % N, 3 * sizes)


def ragged_samples(kind: type, split: Split) -> Samples:
    config = configs.build({"model.seq_len": 32, "data.n_labels": N, "model.pad_id": 0})
    return kind(split, config, SPECIALS | {"article": 200}, 300)


KINDS = [CausalSamples, MaskedSamples, ClassifiedSamples, PairSamples]


def stream(batches: list) -> list:
    """Return the rows of batches of updates, without padding, sorted; of a causal one the labels."""
    rows = []
    for batch in batches:
        is_causal = batch["tokens"].shape == batch["labels"].shape
        names = ["labels"] if is_causal else sorted(batch)
        for arrays in zip(*(batch[name].reshape(-1, *batch[name].shape[2:]) for name in names), strict=True):
            rows.append(tuple(tuple(x[x > 0].tolist()) if x.ndim else int(x) for x in arrays))
    return sorted(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_grouping_keeps_the_samples_of_a_group_and_wastes_few_positions(kind: type, ragged: Split) -> None:
    samples = ragged_samples(kind, ragged)
    plain, grouped = (TrainConfig(batch_size=4, accumulate=2, group_by_length=x) for x in (False, True))
    for first in (0, loader.GROUP):
        position = Position(first, 8 * first)
        one, other = (list(islice(training_batches(samples, x, position), loader.GROUP)) for x in (plain, grouped))
        assert stream(other) == stream(one)
    assert {batch["tokens"].shape[:2] for batch in other} == {(2, 4)}
    shapes = {batch["tokens"].shape[2] for batch in other}
    assert 2 <= len(shapes) <= 5 and shapes <= {8, 16, 24, 32}
    n_real = sum(samples.n_tokens(batch) for batch in one)
    # Of 32 positions each; grouped, at most 7 of a sample's are lost to the multiple of 8.
    assert sum(samples.n_tokens(batch) for batch in other) == n_real
    assert sum(batch["tokens"].size for batch in other) - n_real < 8 * 8 * loader.GROUP
    lengths = [batch["tokens"].shape[2] for batch in other]
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_the_positions_that_are_no_padding(kind: type, ragged: Split) -> None:
    samples = ragged_samples(kind, ragged)
    indices = np.arange(len(samples))
    lengths = samples.lengths(indices)
    assert len(set(lengths.tolist())) > 2
    for i, length in zip(indices, lengths, strict=True):
        batch = samples.batch(indices[i : i + 1], np.zeros(1, int))
        name = "labels" if kind in (CausalSamples, PairSamples) else "tokens"
        assert np.flatnonzero(batch[name][0] > 0)[-1] + 1 == length
        assert stream([{k: x[None] for k, x in samples.cut(batch, int(length)).items()}]) == stream(
            [{k: x[None] for k, x in batch.items()}]
        )


def test_grouped_batches_go_on_alike_and_each_process_reads_its_rows(ragged: Split) -> None:
    samples = ragged_samples(MaskedSamples, ragged)
    train = TrainConfig(batch_size=4, accumulate=2, group_by_length=True)
    whole = list(islice(training_batches(samples, train), 70))
    later = islice(training_batches(samples, train, Position(61, 8 * 61)), 9)
    rows = islice(training_batches(samples, train, rows=np.array([1, 3])), 70)
    for one, other in zip(whole[61:], later, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    for one, other in zip(whole, rows, strict=True):
        assert all(np.array_equal(one[name][:, [1, 3]], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_evaluation_has_every_sample_once_and_in_order(kind: type, ragged: Split) -> None:
    samples = ragged_samples(kind, ragged)
    whole, cut = (list(evaluation_batches(samples, 2, are_cut=x)) for x in (False, True))
    assert len({batch["tokens"].shape for batch in cut}) > 1
    for one, other in zip(whole, cut, strict=True):
        assert stream([{k: x[None] for k, x in one.items()}]) == stream([{k: x[None] for k, x in other.items()}])
    for one, other in zip(cut, evaluation_batches(samples, 2, np.array([1]), are_cut=True), strict=True):
        assert all(np.array_equal(one[name][[1]], other[name]) for name in one)


def test_weighted_samples_come_as_often_as_their_class_weighs(samples: Samples) -> None:
    weights = ",".join(str(i % 3) for i in range(N))  # a third of the samples never comes
    train = TrainConfig(batch_size=50, sampling="weighted", class_weights=weights)

    def drawn(first: int, n: int) -> np.ndarray:
        position = Position(first, Position().first(first, train))
        return np.array([batch["labels"] for batch in islice(training_batches(samples, train, position), n)]).ravel()

    found = drawn(0, 200)
    shares = np.bincount(found, minlength=N) * sum(i % 3 for i in range(N)) / len(found)
    assert np.all(shares[::3] == 0) and np.allclose(shares, np.arange(N) % 3, atol=0.35)
    assert np.array_equal(drawn(150, 50), found[150 * 50 :])  # by the position alone
