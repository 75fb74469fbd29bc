"""The loss against NumPy."""

import math

import numpy as np
import pytest
import torch

from torchlm.loss import cross_entropy

V = 11


def test_loss_is_the_log_of_the_vocabulary_at_uniform_logits() -> None:
    totals = cross_entropy(torch.full((2, 3, V), 7.0), torch.tensor([[0, 5, 10], [1, -1, -1]]))
    assert float(totals["loss"]) == pytest.approx(4 * math.log(V))
    assert int(totals["count"]) == 4


def test_loss_count_and_right_predictions_against_numpy() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(2, 3, V)), random.integers(0, V, (2, 3))
    labels[0, 1], labels[1, 2] = -1, logits[1, 2].argmax()
    expected = [
        np.log(np.exp(x).sum()) - x[y] for x, y in zip(logits.reshape(-1, V), labels.flat, strict=True) if y >= 0
    ]
    totals = cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    assert totals["loss"].dtype == torch.float64
    assert float(totals["loss"]) == pytest.approx(sum(expected), rel=1e-12)
    assert int(totals["count"]) == 5
    assert int(totals["correct"]) == np.sum(logits.argmax(-1) == labels)


def test_loss_of_bfloat16_logits_is_summed_in_float32() -> None:
    totals = cross_entropy(torch.zeros(1, 5, V, dtype=torch.bfloat16), torch.zeros(1, 5, dtype=torch.long))
    assert totals["loss"].dtype == torch.float32
