"""The loss against sums in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxlm.loss import cross_entropy

B, T, V = 2, 3, 11


def test_cross_entropy_against_sums_in_float64() -> None:
    random = np.random.default_rng(0)
    logits, labels = 30 * random.normal(size=(B, T, V)), random.integers(-1, V, (B, T))
    labels[0, 0], logits[0, 0, 3] = 3, 200  # exp(200) is too large for a float32
    labels[1, 0], logits[1, 0, 0] = -1, 100  # the likeliest token is 0, but nothing is asked
    losses = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    losses -= np.take_along_axis(logits, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    is_counted = labels >= 0
    totals = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    assert totals["loss"] == pytest.approx(float(losses[is_counted].sum()), rel=1e-6)
    assert totals["count"] == is_counted.sum() < B * T
    assert totals["correct"] == (is_counted & (logits.argmax(-1) == labels)).sum()


def test_the_small_loss_of_a_sure_prediction_is_exact_among_large_logits() -> None:
    logits = jnp.full((1, V), 200.0).at[0, 3].set(212.0)
    totals = cross_entropy(logits, jnp.array([3]))
    assert totals["loss"] == pytest.approx(math.log1p((V - 1) * math.exp(-12)), abs=1e-6)  # 200 has 1.5e-5


def test_smoothed_and_weighted_labels_are_those_of_pytorch() -> None:
    random = np.random.default_rng(2)
    logits, labels = random.normal(size=(7, 4)).astype(np.float32), np.array([0, 3, 1, 1, -1, 2, 0])
    for smoothing, weights in ((0.3, ()), (0.0, (2.0, 0.0, 1.0, 0.5)), (0.1, (2.0, 0.3, 1.0, 0.5))):
        found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.0, smoothing, weights)
        expected = torch.nn.functional.cross_entropy(
            *(torch.tensor(logits), torch.tensor(labels), torch.tensor(weights) if weights else None),
            **{"ignore_index": -1, "reduction": "sum", "label_smoothing": smoothing},
        )
        assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-5)
        assert found["count"] == 6
