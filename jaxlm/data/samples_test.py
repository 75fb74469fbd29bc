"""Samples: windows and their borders, labels, padding, and the statistics and purity of masking."""

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data.cache import Split
from jaxlm.data.samples import (
    IGNORED,
    Batch,
    CausalSamples,
    ClassifiedSamples,
    MaskedSamples,
    PairSamples,
    Windows,
    uniform,
)

BERT = {"pad": 0, "unknown": 1, "start": 2, "end": 3, "mask": 4}
PLAIN = {"pad": 0, "unknown": 1, "mask": 4}  # a tokenizer without [CLS] and [SEP]
FIRST = 5  # the smallest id of a real token


def config_of(**settings) -> Config:
    """Return settings, given as section__name=value."""
    return configs.build({name.replace("__", "."): value for name, value in settings.items()})


def split_of(articles: list[list[int]], labels: list[int] | None = None, dtype: type = np.uint16) -> Split:
    return Split(
        np.array([token for ids in articles for token in ids], dtype),
        np.cumsum([0, *map(len, articles)]),
        np.array(labels or [-1] * len(articles), np.int32),
        np.array([3 * len(ids) for ids in articles], np.int64),
    )


def every(samples, epoch: int = 0) -> Batch:
    indices = np.arange(len(samples))
    return samples.batch(indices, np.full_like(indices, epoch))


def numbered(sizes: list[int], first: int = FIRST) -> list[list[int]]:
    """Return articles of the given sizes in which each id occurs once."""
    ids = iter(range(first, first + sum(sizes)))
    return [[next(ids) for _ in range(size)] for size in sizes]


# Windows


@pytest.mark.parametrize("length, stride", [(5, 5), (6, 5), (4, 1), (3, 2)])
def test_windows_are_slices_of_one_article_each(length, stride):
    articles = numbered([0, 1, 2, 3, 4, 5, 6, 7, 11, 0, 20, 1, 0])
    windows = Windows(split_of(articles), length, stride)
    expected = []
    for ids in articles:
        start = 0
        # A window starts at each multiple of the stride that leaves it something the one before does not have.
        while ids and (start == 0 or start + length - stride < len(ids)):
            expected.append(ids[start : start + length])
            start += stride
    ids, is_real = windows.read(np.arange(len(windows)))
    assert ids.shape == is_real.shape == (len(expected), length) and ids.dtype == np.int32
    assert [row[real].tolist() for row, real in zip(ids, is_real, strict=True)] == expected
    assert all(real.tolist() == sorted(real.tolist(), reverse=True) for real in is_real)  # the tail is behind


def test_windows_of_nothing():
    assert len(Windows(split_of([]), 5, 5)) == 0
    assert len(Windows(split_of([[], []]), 5, 5)) == 0
    assert len(Windows(split_of([[], []]), 6, 5, before=1, after=1)) == 0  # an empty article is no article


# Causal samples (gpt)

END = 99


def causal(articles: list[list[int]], seq_len: int = 5, pad_id: int = -1) -> CausalSamples:
    config = config_of(task="gpt", model__seq_len=seq_len, model__pad_id=pad_id)
    return CausalSamples(split_of(articles), config, {"article": END}, 100)


def test_each_token_of_each_article_is_a_label_once():
    articles = numbered([1, 4, 5, 6, 0, 9, 10, 11, 17], first=0)
    samples = causal(articles)
    labels = every(samples)["labels"]
    found = labels[labels != IGNORED].tolist()
    assert found == [token for ids in articles if ids for token in [*ids, END]]
    assert samples.n_tokens(every(samples)) == len(found)


def test_labels_are_the_next_tokens_of_the_same_article():
    articles = numbered([7, 3, 12], first=0)
    batch = every(causal(articles))
    follows = {pair for ids in articles for pair in zip([END, *ids], [*ids, END], strict=True)}
    real = batch["labels"] != IGNORED
    pairs = list(zip(batch["tokens"][real].tolist(), batch["labels"][real].tolist(), strict=True))
    assert set(pairs) == follows and len(pairs) == len(follows)
    assert np.all(batch["labels"][:, :-1][real[:, 1:]] == batch["tokens"][:, 1:][real[:, 1:]])


def test_windows_of_seq_len_and_one_overlap_by_one():
    batch = every(causal([[10, 11, 12, 13, 14, 15, 16]], seq_len=4))
    assert batch["tokens"].tolist() == [[END, 10, 11, 12], [13, 14, 15, 16]]
    assert batch["labels"].tolist() == [[10, 11, 12, 13], [14, 15, 16, END]]
    batch = every(causal([[10, 11, 12, 13]], seq_len=4))
    assert batch["tokens"].tolist() == [[END, 10, 11, 12], [13, END, 0, 0]]  # the end is predicted, and then padding
    assert batch["labels"].tolist() == [[10, 11, 12, 13], [END, IGNORED, IGNORED, IGNORED]]


def test_a_stride_makes_windows_of_a_long_document_overlap():
    config = config_of(task="gpt", model__seq_len=4, model__pad_id=-1, data__stride=2)
    samples = CausalSamples(split_of([[10, 11, 12, 13, 14, 15, 16], [20, 21]]), config, {"article": END}, 100)
    tokens, labels = (every(samples)[name].tolist() for name in ("tokens", "labels"))
    assert tokens == [[END, 10, 11, 12], [11, 12, 13, 14], [13, 14, 15, 16], [END, 20, 21, END]]
    assert labels == [[10, 11, 12, 13], [12, 13, 14, 15], [14, 15, 16, END], [20, 21, END, IGNORED]]
    config = config_of(model__seq_len=6, data__stride=3, data__mask_fraction=0.01)
    masked = MaskedSamples(split_of([list(range(10, 20))]), config, BERT, 500)
    windows = [[10, 11, 12, 13], [13, 14, 15, 16], [16, 17, 18, 19]]
    assert unmasked(every(masked))[:, 1:-1].tolist() == windows


def test_id_0_is_a_real_token_unless_it_is_the_pad():
    articles = [[0, 7, 0, 0, 8, 0]]
    batch = every(causal(articles, seq_len=4))
    assert batch["labels"].tolist() == [[0, 7, 0, 0], [8, 0, END, IGNORED]]
    slip = every(causal(articles, seq_len=4, pad_id=0))
    assert slip["labels"].tolist() == [[IGNORED, 7, IGNORED, IGNORED], [8, IGNORED, END, IGNORED]]
    assert slip["tokens"].tolist() == batch["tokens"].tolist()


def test_causal_baseline_counts_the_labels():
    articles = [[0, 7, 0, 8], [], [50], [7] * 9]
    for pad_id in (-1, 0, 98):
        samples = causal(articles, pad_id=pad_id)
        labels = every(samples)["labels"]
        expected = np.bincount(labels[labels != IGNORED], minlength=100)
        assert samples.counted_tokens().tolist() == expected.tolist()
    assert causal(articles).constants == {"bytes": 3 * 14}


# Masked samples (mlm)


def masked(articles: list[list[int]], specials=BERT, seq_len: int = 20, vocab_size: int = 500, **settings):
    config = config_of(model__seq_len=seq_len, **settings)
    return MaskedSamples(split_of(articles), config, specials, vocab_size)


def unmasked(batch: Batch) -> np.ndarray:
    """Return the tokens before masking."""
    tokens = batch["tokens"].copy()
    rows, columns = np.nonzero(batch["labels"] != IGNORED)
    tokens[rows, batch["positions"][rows, columns]] = batch["labels"][rows, columns]
    return tokens


def test_masked_windows_are_framed_by_cls_and_sep_and_padded():
    batch = every(masked([[10, 11, 12, 13, 14, 15, 16, 17], [], [20]], seq_len=6))
    assert unmasked(batch).tolist() == [[2, 10, 11, 12, 13, 3], [2, 14, 15, 16, 17, 3], [2, 20, 3, 0, 0, 0]]


def test_masked_windows_are_bare_where_the_tokenizer_has_no_cls_and_sep():
    batch = every(masked([[10, 11, 12, 13, 14, 15, 16, 17], [20]], PLAIN, seq_len=6))
    assert unmasked(batch).tolist() == [[10, 11, 12, 13, 14, 15], [16, 17, 0, 0, 0, 0], [20, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("specials", [BERT, PLAIN], ids=["bert", "plain"])
def test_masked_windows_hold_each_token_of_each_article_once(specials):
    articles = numbered([1, 17, 18, 19, 20, 21, 0, 36, 37, 100])
    samples = masked(articles, specials, vocab_size=2000)
    tokens = unmasked(every(samples))
    assert tokens[tokens >= FIRST].tolist() == [token for ids in articles for token in ids]
    of = {token: i for i, ids in enumerate(articles) for token in ids}
    assert all(len({of[token] for token in row if token in of}) == 1 for row in tokens.tolist())
    batch = every(samples)
    assert samples.n_tokens(batch) == np.count_nonzero(tokens != 0)


@pytest.mark.parametrize(
    "seq_len, fraction", [(4, 0.15), (6, 0.15), (13, 0.15), (14, 0.15), (20, 0.15), (128, 0.15), (64, 0.4)]
)
def test_number_of_masks_of_a_full_window(seq_len, fraction):
    samples = masked([list(range(10, 10 + 3 * seq_len))], seq_len=seq_len, data__mask_fraction=fraction)
    expected = max(1, int(fraction * seq_len))
    batch = every(samples)
    assert batch["positions"].shape == batch["labels"].shape == (len(samples), expected)
    assert np.all(batch["labels"][:3] != IGNORED)


def test_number_of_masks_of_a_short_window():
    # Of [CLS], the tokens and [SEP], in windows of 40: 15 %, at least one, at most all tokens.
    samples = masked(numbered([38, 30, 12, 11, 5, 2, 1]), seq_len=40)
    n = np.count_nonzero(every(samples)["labels"] != IGNORED, axis=1).tolist()
    assert n == [6, int(0.15 * 32), 2, 1, 1, 1, 1]
    samples = masked(numbered([2, 1, 6]), seq_len=8, data__mask_fraction=0.9)
    assert np.count_nonzero(every(samples)["labels"] != IGNORED, axis=1).tolist() == [2, 1, 6]


def test_positions_are_distinct_places_of_content_and_labels_what_was_there():
    articles = numbered([18 * 50, 7, 1, 3])
    samples = masked(articles, vocab_size=2000)
    original = samples.windows.read(np.arange(len(samples)))[0]
    for epoch in range(5):
        batch = every(samples, epoch)
        for row, real, positions, labels in zip(
            original, samples.windows.read(np.arange(len(samples)))[1], batch["positions"], batch["labels"], strict=True
        ):
            used = positions[labels != IGNORED]
            assert len(set(used)) == len(used) > 0
            assert np.all((1 <= used) & (used <= real.sum()))
            assert labels[labels != IGNORED].tolist() == row[used - 1].tolist()


def test_unmasked_places_are_untouched():
    samples = masked(numbered([18 * 50 + 7]), vocab_size=2000)
    batch = every(samples)
    changed = np.zeros(batch["tokens"].shape, bool)
    np.put_along_axis(changed, batch["positions"], True, axis=1)
    content = samples.windows.read(np.arange(len(samples)))[0]
    inside = batch["tokens"][:, 1:-1]
    same = ~changed[:, 1:-1] & (inside != 0) & (inside != BERT["end"])
    assert np.all(inside[same] == content[same]) and np.count_nonzero(same) > 700
    assert np.all(batch["tokens"][:, 0] == BERT["start"])


@pytest.fixture(scope="module")
def statistics() -> tuple[MaskedSamples, Batch, np.ndarray]:
    """A large masked part, its batch over three epochs, and what stands at its masked positions."""
    rng = np.random.default_rng(0)
    samples = masked([rng.integers(FIRST, 500, 126 * 2000).tolist()], seq_len=128)
    batches = [every(samples, epoch) for epoch in range(3)]
    batch = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    return samples, batch, np.take_along_axis(batch["tokens"], batch["positions"], axis=1)


def within(share: float, expected: float, n: int) -> bool:
    """Whether a share of n draws is within 4.5 standard deviations of what is expected."""
    return abs(share - expected) < 4.5 * (expected * (1 - expected) / n) ** 0.5


def test_of_the_masked_positions_80_are_masked_10_random_and_10_unchanged(statistics):
    _, batch, seen = statistics
    labels, n = batch["labels"], batch["labels"].size
    assert n == 3 * 2000 * 19 and np.all(labels != IGNORED)
    is_mask, is_same = seen == BERT["mask"], seen == labels
    assert within(is_mask.mean(), 0.8, n)
    # A random id is the original one once in 495 times.
    assert within(is_same.mean(), 0.1 + 0.1 / 495, n)
    assert within((~is_mask & ~is_same).mean(), 0.1 - 0.1 / 495, n)


def test_random_ids_are_uniform_and_never_special(statistics):
    _, batch, seen = statistics
    random = seen[(seen != BERT["mask"]) & (seen != batch["labels"])]
    counts = np.bincount(random, minlength=500)
    assert counts[:FIRST].sum() == 0 and len(counts) == 500
    expected = len(random) / 495
    chi_squared = np.sum((counts[FIRST:] - expected) ** 2 / expected)
    assert abs(chi_squared - 494) < 5 * (2 * 494) ** 0.5
    assert counts[FIRST] > 0 and counts[499] > 0  # both ends are drawn


def test_random_ids_do_not_depend_on_the_original(statistics):
    _, batch, seen = statistics
    is_random = (seen != BERT["mask"]) & (seen != batch["labels"])
    assert (
        abs(np.corrcoef(seen[is_random], batch["labels"][is_random])[0, 1]) < 4.5 / np.count_nonzero(is_random) ** 0.5
    )


def test_every_position_is_masked_as_often(statistics):
    _, batch, _ = statistics
    counts = np.bincount(batch["positions"].ravel(), minlength=128)
    assert counts[0] == counts[127] == 0
    n, share = len(batch["positions"]), 19 / 126
    assert all(within(count / n, share, n) for count in counts[1:127])
    # Neighbours are masked together as often as two places drawn without putting back.
    is_masked = np.zeros((n, 128), bool)
    np.put_along_axis(is_masked, batch["positions"], True, axis=1)
    together = (is_masked[:, 1:126] & is_masked[:, 2:127]).mean()
    assert within(together, 19 / 126 * 18 / 125, n * 125)


def test_masks_of_epochs_and_of_samples_are_independent(statistics):
    _, batch, _ = statistics
    is_masked = np.zeros((len(batch["positions"]), 128), bool)
    np.put_along_axis(is_masked, batch["positions"], True, axis=1)
    epochs = is_masked.reshape(3, 2000, 128)[:, :, 1:127]
    for a, b in ((epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0, :-1], epochs[0, 1:])):
        assert within((a & b).mean(), (19 / 126) ** 2, a.size)


def test_a_mask_depends_on_seed_epoch_and_sample_only():
    samples = masked(numbered([18 * 30 + 5]), vocab_size=2000)
    whole = every(samples, 3)
    for indices in ([4], [4, 4], [30, 4, 7, 0], list(range(30, -1, -1))):
        batch = samples.batch(np.array(indices), np.full(len(indices), 3))
        assert all(np.array_equal(batch[name], whole[name][indices]) for name in whole)
    mixed = samples.batch(np.array([4, 4, 4]), np.array([2, 3, 4]))
    assert np.array_equal(mixed["positions"][1], whole["positions"][4])
    assert not np.array_equal(mixed["positions"][0], mixed["positions"][1])
    # Another part of the text behind changes nothing, nor does a new object.
    longer = masked(numbered([18 * 30 + 5, 400]), vocab_size=2000)
    assert np.array_equal(longer.batch(np.array([4]), np.array([3]))["tokens"][0], whole["tokens"][4])
    other = masked(numbered([18 * 30 + 5]), vocab_size=2000, train__seed=1)
    assert not np.array_equal(every(other, 3)["positions"], whole["positions"])


def test_masking_is_new_in_each_epoch_or_repeats_after_n_maskings():
    articles = numbered([18 * 30])
    dynamic = masked(articles, vocab_size=2000)
    seen = [every(dynamic, epoch)["tokens"].tobytes() for epoch in range(12)]
    assert len(set(seen)) == 12
    static = masked(articles, vocab_size=2000, data__n_maskings=4)
    found = [every(static, epoch)["tokens"].tobytes() for epoch in range(12)]
    assert found == seen[:4] * 3


def test_masked_baseline_counts_the_tokens():
    samples = masked([[5, 6, 6, 9], [], [9, 9]])
    assert samples.counted_tokens().tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 3]


def test_uniform_is_uniform_and_a_function_of_its_arguments():
    x = uniform(0, np.zeros(3000, int), np.arange(3000), 40)
    assert x.shape == (3000, 40) and x.dtype == np.float64 and 0 <= x.min() and x.max() < 1
    n = x.size
    assert abs(x.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5 and abs(x.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert len(np.unique(x)) == n
    counts = np.histogram(x, 100, (0, 1))[0]
    assert abs(np.sum((counts - n / 100) ** 2) / (n / 100) - 99) < 5 * (2 * 99) ** 0.5
    assert np.array_equal(uniform(0, np.array([0]), np.array([17]), 12)[0], x[17, :12])
    # Seed, epoch and index are not confused with each other.
    keys = [(a, b, c) for a in range(6) for b in range(6) for c in range(6)]
    firsts = {float(uniform(a, np.array([b]), np.array([c]), 1)[0, 0]) for a, b, c in keys}
    assert len(firsts) == len(keys)


def test_uniform_is_splitmix64_in_whole_numbers():
    # With Python's integers; a change of the function would change every run.
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, epoch, index in ((0, 0, 0), (2**31 - 1, 3, 5), (1, 10**6, 2**40)):
        state = mix((mix((seed * golden + epoch + golden) % 2**64) * golden + index + golden) % 2**64)
        expected = [(mix((state + column * golden) % 2**64) >> 11) / 2**53 for column in range(1, 8)]
        assert uniform(seed, np.array([epoch]), np.array([index]), 7)[0].tolist() == expected


# Classified samples (sst2, cola)


def classified(articles: list[list[int]], labels: list[int], specials=BERT, seq_len: int = 6) -> ClassifiedSamples:
    return ClassifiedSamples(split_of(articles, labels), config_of(model__seq_len=seq_len), specials, 100)


def test_sentences_are_framed_cut_and_padded():
    articles = [[10], [11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26], [], [30, 31, 32, 33, 34]]
    samples = classified(articles, [1, 0, 1, 0, 1])
    batch = every(samples)
    assert batch["tokens"].tolist() == [
        [2, 10, 3, 0, 0, 0],
        [2, 11, 12, 13, 14, 3],
        [2, 20, 21, 22, 23, 3],
        [2, 3, 0, 0, 0, 0],
        [2, 30, 31, 32, 33, 3],
    ]
    assert batch["labels"].tolist() == [1, 0, 1, 0, 1]
    assert samples.n_cut == 2 and samples.n_tokens(batch) == 3 + 6 + 6 + 2 + 6
    picked = samples.batch(np.array([2, 0]), np.zeros(2, int))
    assert picked["tokens"].tolist() == batch["tokens"][[2, 0]].tolist() and picked["labels"].tolist() == [1, 1]


def test_sentences_without_sep_have_room_for_one_more():
    samples = classified([[10], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34, 35]], [0, 1, 0], {"pad": 0, "start": 2})
    assert every(samples)["tokens"].tolist() == [[2, 10, 0, 0, 0, 0], [2, 20, 21, 22, 23, 24], [2, 30, 31, 32, 33, 34]]
    assert samples.n_cut == 1


def test_a_causal_model_is_told_where_each_sentence_ends():
    config = config_of(model__seq_len=6, model__pooling="last", model__pad_id=-1)
    articles = [[10], [11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26], []]
    samples = ClassifiedSamples(split_of(articles, [1, 0, 1, 0]), config, {"article": END, "start": 2, "pad": 0}, 100)
    batch = every(samples)
    assert batch["tokens"].tolist() == [
        [END, 10, END, END, END, END],
        [END, 11, 12, 13, 14, END],
        [END, 20, 21, 22, 23, END],
        [END, END, END, END, END, END],
    ]
    assert batch["last"].tolist() == [2, 5, 5, 1] and batch["last"].dtype == np.int32
    assert samples.n_cut == 1 and samples.n_tokens(batch) == 3 + 6 + 6 + 2
    assert samples.roles(config.model) == ("article",) and "last" not in every(classified([[10]], [0]))


def test_a_part_of_empty_sentences():
    batch = every(classified([[], []], [0, 1]))
    assert batch["tokens"].tolist() == [[2, 3, 0, 0, 0, 0]] * 2 and batch["labels"].tolist() == [0, 1]


def test_pads_have_the_id_of_the_tokenizer():
    specials = BERT | {"pad": 1, "unknown": 0}
    assert every(classified([[10]], [0], specials))["tokens"].tolist() == [[2, 10, 3, 1, 1, 1]]
    config = config_of(model__seq_len=6, model__pad_id=1)
    batch = every(MaskedSamples(split_of([[10]]), config, specials, 100))
    assert unmasked(batch).tolist() == [[2, 10, 3, 1, 1, 1]]


# Pairs


def paired(articles: list[list[int]], seq_len: int) -> PairSamples:
    return PairSamples(split_of(articles), config_of(model__seq_len=seq_len), {"article": END}, 100)


def test_labels_are_of_the_answer_and_that_it_ends():
    samples = paired([[10, 11], [20], [12], [21, 22, 23]], seq_len=7)
    batch = every(samples)
    assert batch["tokens"].tolist() == [[END, 10, 11, 20, END, END, END], [END, 12, 21, 22, 23, END, END]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, no, 20, END, no, no, no], [no, 21, 22, 23, END, no, no]]
    assert samples.n_tokens(batch) == 4 + 5
    assert samples.lengths(np.array([1, 0])).tolist() == [5, 4]
    cut = samples.cut(batch, 5)
    assert samples.n_tokens(cut) == 4 + 5 and cut["labels"].tolist() == [row[:5] for row in batch["labels"].tolist()]
    counts = samples.counted_tokens()
    assert {token: n for token, n in enumerate(counts) if n} == {20: 1, 21: 1, 22: 1, 23: 1, END: 2}
    again = samples.batch(np.array([1, 0]), np.zeros(2, int))
    assert all(again[name].tolist() == batch[name][::-1].tolist() for name in batch)


def test_pairs_that_are_too_long_are_left_out_whole():
    # An answer may end at the last position; one that has to be told after it may not.
    samples = paired([[10, 11], [20, 21, 22], [10, 11], [20, 21, 22, 23], [10] * 9, [20], [12], [24]], seq_len=6)
    assert (len(samples), samples.n_left_out) == (2, 2)
    batch = every(samples)
    assert batch["labels"].tolist() == [[-1, -1, 20, 21, 22, END], [-1, 24, END, -1, -1, -1]]
    assert samples.counted_tokens().sum() == 6 and samples.counted_tokens()[23] == 0
    assert samples.n_tokens(batch) == 6 + 3
    assert paired([[10] * 9, [20]], seq_len=6).counted_tokens().sum() == 0


def test_shared_arrays_are_not_written_to():
    split = split_of(numbered([40, 3]), [1, 0])
    for array in (split.tokens, split.offsets, split.labels, split.n_bytes):
        array.flags.writeable = False  # as those of a memory map
    every(MaskedSamples(split, config_of(model__seq_len=10), BERT, 100))["tokens"][:] = 0
    every(CausalSamples(split, config_of(model__seq_len=10), {"article": END}, 100))["tokens"][:] = 0
    every(ClassifiedSamples(split, config_of(model__seq_len=10), BERT, 100))["labels"][:] = -1
    every(PairSamples(split, config_of(model__seq_len=50), {"article": END}, 100))["labels"][:] = -1
