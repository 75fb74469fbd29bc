"""Kinds of mistakes of public bug reports on ports and trainers, rebuilt small: the tool names each."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parity_tests import compare, record
from parity_tests.compare import Verdict

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(1, 11, (2, 3, 12))  # two batches
LABELS = np.where(np.arange(12) < [[[12], [12], [12]], [[2], [1], [3]]], TOKENS % 5, -1)  # of as unlike length


class Tagger(nn.Module):
    """Embeddings of tokens and of positions, from `first` on, and an output layer."""

    def __init__(self, first: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.first = first
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.output = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(self.first, self.first + tokens.shape[1])
        return self.output(self.token(tokens) + self.position(positions))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, is_mean_of_means: bool = False, n: int = 2) -> object:
    """Record updates of two accumulated batches each, with a mean over all labels or a mean of the batches' means."""
    tokens, labels = torch.from_numpy(TOKENS), torch.from_numpy(LABELS)
    weights = [1 / 2] * 2 if is_mean_of_means else [float((y >= 0).sum() / (labels >= 0).sum()) for y in labels]
    with record.torch(model, optimizer) as a:
        for _ in range(n):
            optimizer.zero_grad()
            for x, y, weight in zip(tokens, labels, weights, strict=True):
                a.batch(labels=y)
                loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
                a.loss(loss)
                (weight * loss).backward()
            optimizer.step()
    return a


def kinds(verdict: Verdict) -> Sequence[str]:
    return [cause.kind for cause in verdict.causes[:3]]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_mean_of_means_over_accumulated_batches_is_named() -> None:
    one, two = Tagger(), Tagger()
    found = compare.runs(trained(one, sgd(one)), trained(two, sgd(two), is_mean_of_means=True))
    assert found.first and found.first.stage == "gradient" and found.first.update == 0
    assert "accumulation" in kinds(found), found.text()
    assert "36, 6 labels" in found.text()


def test_positions_that_do_not_begin_behind_the_pad_are_named() -> None:
    """RoBERTa counts positions from pad_id + 1 on; a port that begins with 0 has the same shapes and runs."""
    one, two = Tagger(first=2), Tagger(first=0)
    found = compare.runs(trained(one, sgd(one)), trained(two, sgd(two)))
    assert found.first and found.first.stage == "forward" and found.first.update == 0
    assert kinds(found)[0] == "position offset" and "-2 at each position" in found.text()


@pytest.mark.parametrize("rate", [1e-3, 1e-6])
def test_a_wrong_optimizer_is_named_where_a_bound_on_weights_is_larger_than_the_update(rate: float) -> None:
    """Adam with L2 in place of AdamW: at small rates, all weights stay within 1e-4 of each other."""
    one, two = Tagger().double(), Tagger().double()
    adamw = torch.optim.AdamW(one.parameters(), lr=rate, weight_decay=0.1)
    found = compare.runs(trained(one, adamw), trained(two, torch.optim.Adam(two.parameters(), rate, weight_decay=0.1)))
    if rate < 1e-4:
        for x, y in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    assert found.first and found.first.stage in ("moment", "update")
    assert "coupled decay" in kinds(found), found.text()
