"""Texts that have any number of labels each: their samples and scores. NumPy only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data import metrics
from jaxlm.data.cache import Split
from jaxlm.data.samples import ClassifiedSamples
from jaxlm.data.sources import Reads


class LabelSetSamples(ClassifiedSamples):
    """As ClassifiedSamples, with any number of labels a text: `labels` [B, C], 1: has it, 0: not, -1: ignored.

    In a split, an empty article for each label follows the text or the two, which have none.
    """

    reads: Reads = "sets"

    def __init__(self, split: Split, config: Config, specials: dict[str, int], vocab_size: int):
        is_text = split.labels < 0
        texts = np.flatnonzero(is_text)
        offsets = split.offsets[[*texts, len(is_text)]]
        own = Split(split.tokens, offsets, split.labels[texts], split.n_bytes[texts])
        super().__init__(own, config, specials, vocab_size)
        self.sizes = np.diff(offsets)
        self.labels = np.zeros((len(texts) // self.n_texts, config.data.n_classes), np.int32)
        self.labels[(np.cumsum(is_text) // self.n_texts - 1)[~is_text], split.labels[~is_text]] = 1


def scores(classes: Sequence[str], totals: Mapping[str, Any]) -> metrics.Scores:
    """Return the scores of totals: F1 over all labels (micro), its mean over classes (macro), and that of each class.

    `accuracy` is the share of texts all of whose labels are right.
    """
    found = metrics.of_marks(classes, totals["marks"])
    macro = float(np.mean([found[f"f1_{name}"] for name in classes]))
    first = {"f1": found.pop("f1"), "f1_macro": macro, "accuracy": metrics.accuracy(totals)}
    return {**first, **found, "loss": metrics.loss(totals)}


def constant(labels_NC: np.ndarray) -> dict[str, Any]:
    """Return totals of giving each text the labels that most have, at the loss of guessing each one's frequency."""
    labelled = labels_NC > 0
    shares_C = labelled.mean(axis=0)
    predicted = np.broadcast_to(shares_C > 0.5, labelled.shape)
    losses = [-p * np.log(p) for x in shares_C for p in (x, 1 - x) if p > 0]
    return {
        "loss": len(labelled) * float(np.sum(losses)) / len(shares_C),
        "count": float(len(labelled)),
        "correct": float(np.sum(np.all(labelled == predicted, axis=1))),
        "marks": np.stack([x.sum(axis=0) for x in (labelled & predicted, predicted, labelled)], axis=1),
    }
