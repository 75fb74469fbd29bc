"""Scores from totals, sums over samples or tokens: every score is a quotient of sums, never a mean of means.

Totals hold `loss` (nats), `count`, `correct`, and for classification `confusion` [C, C + 1]: row label, column
prediction, the last for predictions that are no class; for regression `values` [N, 2], label and prediction.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Scores = dict[str, float]
LISTED = ("values",)  # totals that are no sums: a row for each sample, since ranks are of all samples together


def add(sums: dict[str, np.ndarray], totals: Mapping[str, np.ndarray]) -> None:
    """Add totals of a batch to the sums so far, in float64."""
    for name, x in totals.items():
        x = np.asarray(x, np.float64)
        sums[name] = np.concatenate([sums[name], x]) if name in LISTED and name in sums else sums.get(name, 0.0) + x


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


def of_marks(names: Sequence[str], marks_K3: np.ndarray) -> Scores:
    """Return F1, precision and recall, and the F1 of each kind, of how many are right, predicted, and labelled."""
    marks_K3 = np.asarray(marks_K3, np.float64)
    right, predicted, labelled = marks_K3.sum(axis=0)
    scores = {"f1": ratio(2 * right, predicted + labelled)}
    scores |= {"precision": ratio(right, predicted), "recall": ratio(right, labelled)}
    for name, (right, predicted, labelled) in zip(names, marks_K3, strict=True):
        scores[f"f1_{name}"] = ratio(2 * right, predicted + labelled)
    return scores


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


def pearson(values: np.ndarray) -> float:
    """Return the correlation of the columns of values [N, 2], labels and predictions; 0 where one is constant."""
    x, y = (values - values.mean(axis=0)).T
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread else 0.0


def spearman(values: np.ndarray) -> float:
    """Return the correlation of the ranks of labels and predictions [N, 2]; equal numbers share their mean rank."""
    return pearson(np.stack([_ranks(column) for column in values.T], axis=1))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def counted(values: np.ndarray) -> np.ndarray:
    """Return the rows of values [N, 2] that have a label, in float64."""
    return np.asarray(values[~np.isnan(values[:, 0])], np.float64)


# Scores of a classification by name.
OF_CLASSES: dict[str, Callable[[Mapping], float]] = {
    "accuracy": accuracy,
    "f1": lambda totals: f1(np.asarray(totals["confusion"], np.float64)),
    "matthews": lambda totals: matthews(np.asarray(totals["confusion"], np.float64)),
}


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


def is_stalled(losses: Mapping[int, float], interval: int, patience: int) -> bool:
    """Return whether the last `patience` evaluations or more found no new lowest loss; those of 0 never do.

    Only steps that `interval` divides count: those of a file `stop` depend on when somebody wrote it.
    """
    steps = sorted(step for step in losses if step % interval == 0)
    lowest = best(steps, losses)
    return lowest is not None and 0 < patience < len(steps) - steps.index(lowest)
