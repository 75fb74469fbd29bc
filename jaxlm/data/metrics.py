"""Scores from totals, sums over samples or tokens: every score is a quotient of sums, never a mean of means.

Totals hold `loss` (nats), `count`, `correct`, and for classification `confusion` [C, C + 1]: row label, column
prediction, the last for predictions that are no class.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

Scores = dict[str, float]


def number(name: str, x: float | None) -> str:
    """Return a score for a person; what rounds to zero has no minus sign."""
    return "-" if x is None else f"{x:z,.1f}" if name == "perplexity" else f"{x:z.4f}"


def loss(totals: Mapping) -> float:
    """Return the mean loss in nats, NaN where nothing counts."""
    return float(totals["loss"]) / float(totals["count"]) if totals["count"] else math.nan


def accuracy(totals: Mapping) -> float:
    """Return the share of right predictions."""
    return float(totals["correct"]) / float(totals["count"]) if totals["count"] else math.nan


def ratio(part: float, whole: float) -> float:
    """Return part / whole as precision and recall have it: 0 of nothing is 0."""
    return float(part / whole) if whole else 0.0


def perplexity(totals: Mapping) -> float:
    """Return exp(loss), infinite where that overflows."""
    try:
        return math.exp(loss(totals))
    except OverflowError:
        return math.inf


def bits_per_byte(totals: Mapping) -> float:
    """Return the total loss in bits over the UTF-8 bytes of the text: comparable across tokenizers."""
    return float(totals["loss"]) / math.log(2) / float(totals["bytes"])


def f1(confusion: np.ndarray) -> float:
    """Return F1 of class 1 for two classes, else the mean of all classes' F1; 0 where precision and recall are."""
    right = np.diag(confusion)
    asked = confusion.sum(axis=1) + confusion.sum(axis=0)[: len(confusion)]
    scores = np.divide(2 * right, asked, out=np.zeros(len(right)), where=asked > 0)
    return float(scores[1] if len(scores) == 2 else scores.mean())


def matthews(confusion: np.ndarray) -> float:
    """Return Matthews correlation, for any number of classes; 0 where label or prediction is always the same.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient", eq. 8.
    """
    labels, predictions = confusion.sum(axis=1), confusion.sum(axis=0)
    total = confusion.sum()
    covariance = np.trace(confusion) * total - labels @ predictions[: len(labels)]
    spread = math.sqrt(float(total**2 - predictions @ predictions) * float(total**2 - labels @ labels))
    return float(covariance / spread) if spread else 0.0


def unigram(counts: np.ndarray) -> dict[str, float]:
    """Return totals of the best guess without context: `loss` from the tokens' own frequencies, `correct` for the
    most frequent token."""
    n = counts.sum()
    some = counts[counts > 0].astype(np.float64)
    return {"loss": float(-np.sum(some * np.log(some / n))), "count": float(n), "correct": float(counts.max(initial=0))}


def majority(labels: np.ndarray, n_labels: int) -> dict:
    """Return totals of always guessing the most frequent class, at the loss of guessing the classes' frequencies."""
    counts = np.bincount(labels, minlength=n_labels).astype(np.float64)
    confusion = np.zeros((n_labels, n_labels + 1))
    confusion[:, counts.argmax()] = counts
    return {**unigram(counts), "confusion": confusion}


def best(steps: Iterable[int], losses: Mapping[int, float]) -> int | None:
    """Return the step with the lowest of the validation losses, None if none of the steps has one."""
    # Compared with NaN, nothing is better or worse.
    found = {step: losses[step] for step in steps if not math.isnan(losses.get(step, math.nan))}
    return min(found, key=found.__getitem__) if found else None
