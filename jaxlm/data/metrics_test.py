"""Scores against scikit-learn and by hand, also where a class is never or always predicted."""

import math

import numpy as np
import pytest

from jaxlm.data import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize(
    ("name", "x", "text"),
    [
        *(("loss", x, "0.0000") for x in (-0.0, 0.0, -1e-9, np.float32(-0.00004), np.float64(-0.0))),
        ("loss", -0.00006, "-0.0001"),
        ("perplexity", -0.01, "0.0"),
        ("perplexity", 12345.678, "12,345.7"),
        ("matthews", -0.25, "-0.2500"),
        ("loss", float("nan"), "nan"),
        ("loss", None, "-"),
    ],
)
def test_a_number_that_rounds_to_zero_has_no_sign(name: str, x: float | None, text: str) -> None:
    assert metrics.number(name, x) == text


LABELS = np.random.default_rng(0).integers(0, 2, 50)
CASES = {
    # labels, predictions, number of classes; a prediction equal to the number of classes is none of them
    "random": (LABELS, np.random.default_rng(1).integers(0, 2, 50), 2),
    "perfect": (LABELS, LABELS, 2),
    "opposite": (LABELS, 1 - LABELS, 2),
    "always 0": (LABELS, np.zeros(50, int), 2),
    "always 1": (LABELS, np.ones(50, int), 2),
    "label 1 never": (np.zeros(50, int), LABELS, 2),
    "label and prediction 0": (np.zeros(50, int), np.zeros(50, int), 2),
    "one sample": (np.array([1]), np.array([1]), 2),
    "unbalanced": ((LABELS * np.arange(50)) % 7 // 6, LABELS, 2),
    "three classes": (np.arange(50) % 3, np.random.default_rng(2).integers(0, 3, 50), 3),
    "five classes, one never": (np.arange(50) % 4, np.random.default_rng(3).integers(0, 5, 50), 5),
    "some predictions no class": (LABELS, np.random.default_rng(4).integers(0, 3, 50), 2),
    "all predictions no class": (LABELS, np.full(50, 2), 2),
    "three classes and none": (np.arange(50) % 3, np.random.default_rng(5).integers(0, 4, 50), 3),
}
cases = pytest.mark.parametrize("labels, predictions, n", CASES.values(), ids=CASES.keys())


def confusion_of(labels: np.ndarray, predictions: np.ndarray, n: int) -> np.ndarray:
    confusion = np.zeros((n, n + 1))
    np.add.at(confusion, (labels, predictions), 1)
    return confusion


@cases
def test_accuracy_is_that_of_scikit_learn(labels, predictions, n):
    totals = {"correct": np.sum(labels == predictions), "count": len(labels)}
    assert metrics.accuracy(totals) == pytest.approx(sklearn_metrics.accuracy_score(labels, predictions))


@cases
def test_f1_is_that_of_scikit_learn(labels, predictions, n):
    # Of class 1 where there are two; the mean of all classes where there are more.
    classes = [1] if n == 2 else list(range(n))
    expected = sklearn_metrics.f1_score(labels, predictions, labels=classes, average="macro", zero_division=0.0)
    assert metrics.f1(confusion_of(labels, predictions, n)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:A single label")
@cases
def test_matthews_is_that_of_scikit_learn(labels, predictions, n):
    expected = sklearn_metrics.matthews_corrcoef(labels, predictions)
    assert metrics.matthews(confusion_of(labels, predictions, n)) == pytest.approx(expected, abs=1e-12)


def test_matthews_does_not_overflow_on_many_samples():
    confusion = np.array([[3e9, 1e9, 0], [2e9, 4e9, 0]])
    assert metrics.matthews(confusion) == pytest.approx(metrics.matthews(confusion / 1e9))


def test_loss_and_perplexity_are_of_sums():
    # Two batches, of 3 and 1 tokens: a mean of means would be 3.0.
    totals = {"loss": 3 * 1.0 + 1 * 5.0, "count": 4}
    assert metrics.loss(totals) == 2.0
    assert metrics.perplexity(totals) == pytest.approx(math.e**2)


def test_nothing_counted_is_nan_and_too_much_is_infinite():
    nothing = {"loss": 0.0, "count": 0, "correct": 0}
    assert math.isnan(metrics.loss(nothing)) and math.isnan(metrics.accuracy(nothing))
    assert math.isnan(metrics.perplexity(nothing))
    assert metrics.perplexity({"loss": 1e6, "count": 1}) == math.inf


def test_bits_per_byte_does_not_depend_on_the_tokenizer():
    # A uniform guess over 256 bytes, and over the 65,536 pairs of them in half as many tokens: 8 bits a byte.
    single = {"loss": 100 * math.log(256), "count": 100, "bytes": 100}
    pairs = {"loss": 50 * math.log(65536), "count": 50, "bytes": 100}
    assert metrics.bits_per_byte(single) == pytest.approx(8.0)
    assert metrics.bits_per_byte(pairs) == pytest.approx(8.0)


def test_unigram_by_hand():
    # Shares 1/2, 1/4, 1/8, 1/8: 1.75 bits a token.
    totals = metrics.unigram(np.array([2, 0, 8, 4, 2]))
    assert totals == {"loss": pytest.approx(16 * 1.75 * math.log(2)), "count": 16, "correct": 8}
    assert metrics.loss(metrics.unigram(np.full(7, 3))) == pytest.approx(math.log(7))
    assert metrics.unigram(np.zeros(3, int))["count"] == 0


def test_unigram_is_the_least_loss_of_a_guess_without_context():
    counts = np.array([5, 1, 3])
    least = metrics.unigram(counts)["loss"]
    for change in ([0.01, 0, -0.01], [-0.01, 0.005, 0.005]):
        guess = counts / 9 + change
        assert -np.sum(counts * np.log(guess)) > least


def test_majority_guesses_the_most_frequent_class():
    labels = np.array([1, 1, 1, 0], np.int32)
    totals = metrics.majority(labels, 2)
    assert metrics.accuracy(totals) == 0.75
    assert metrics.f1(totals["confusion"]) == sklearn_metrics.f1_score(labels, np.ones(4, int))
    assert metrics.matthews(totals["confusion"]) == 0.0
    assert metrics.loss(totals) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert totals["confusion"].tolist() == [[0, 1, 0], [0, 3, 0]]
    assert metrics.majority(np.array([2, 2, 0], np.int32), 4)["confusion"].shape == (4, 5)


def test_patience_ends_after_so_many_evaluations_without_a_new_lowest_loss() -> None:
    losses = {5: 3.0, 10: 2.0, 13: 1.0, 15: 2.0, 20: math.nan, 25: 2.5}  # 13 is that of a file `stop`
    assert [metrics.is_stalled(losses, 5, patience) for patience in (0, 1, 2, 3, 4, 5)] == [
        False,
        *[True] * 3,
        False,
        False,
    ]
    assert not metrics.is_stalled({**losses, 30: 1.9}, 5, 1) and not metrics.is_stalled({5: math.nan}, 5, 1)
