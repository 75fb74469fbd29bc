"""The n-gram model against its equations, written out with dictionaries."""

import math
from collections import Counter

import numpy as np
import pytest
from ngram import NGram

V, END = 7, 0


def random_articles(n: int, seed: int) -> list[np.ndarray]:
    """Return articles in which some tokens follow others more often."""
    rng = np.random.default_rng(seed)
    articles = []
    for _ in range(n):
        tokens = [int(rng.integers(1, V))]
        for _ in range(int(rng.integers(0, 9))):
            tokens.append(1 + (tokens[-1] * 2 + int(rng.integers(0, 3))) % (V - 1))
        articles.append(np.array(tokens))
    return articles


class ByHand:
    """Interpolated modified Kneser-Ney, k-gram by k-gram."""

    def __init__(self, articles: list[np.ndarray], order: int):
        self.order = order
        whole = Counter()
        for article in articles:
            tokens = [END] * (order - 1) + article.tolist() + [END]
            whole.update(tuple(tokens[i - order + 1 : i + 1]) for i in range(order - 1, len(tokens)))
        self.counts = {order: whole}
        for k in range(order - 1, 0, -1):
            self.counts[k] = Counter(gram[1:] for gram in self.counts[k + 1])

    def discount(self, k: int, count: int) -> float:
        n = [sum(c == i for c in self.counts[k].values()) or 1 for i in range(5)]
        y = n[1] / (n[1] + 2 * n[2])
        found = [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]][min(count, 3)]
        return min(max(found, 0), count)  # of few counts it could be anything

    def p(self, context: tuple[int, ...], token: int) -> float:
        k = len(context) + 1
        lower = self.p(context[1:], token) if context else 1 / V
        seen = {gram: count for gram, count in self.counts[k].items() if gram[:-1] == context}
        if not seen:
            return lower
        left = sum(self.discount(k, count) for count in seen.values())
        count = seen.get((*context, token), 0)
        return (count - self.discount(k, count) + left * lower) / sum(seen.values())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_losses_are_those_of_the_equations(order: int) -> None:
    articles = random_articles(150, seed=0)
    model, by_hand = NGram(articles, V, END, order), ByHand(articles, order)
    for article in [*random_articles(5, seed=1), np.array([5, 5, 5, 1, 1]), np.array([], int)]:
        tokens = [END] * (order - 1) + article.tolist() + [END]
        expected = [
            -math.log(by_hand.p(tuple(tokens[i - order + 1 : i]), tokens[i])) for i in range(order - 1, len(tokens))
        ]
        np.testing.assert_allclose(model.losses(article), expected, rtol=1e-12)


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    model = NGram(random_articles(150, seed=0), V, END, order=3)
    for context in ([1, 2], [4, 4], [6]):
        # The loss of a token behind a context; that of the end is another.
        losses = [model.losses(np.array([*context, token]))[len(context)] for token in range(1, V)]
        end = model.losses(np.array(context))[-1]
        assert sum(math.exp(-x) for x in [*losses, end]) == pytest.approx(1)


def test_what_repeats_is_learned() -> None:
    articles = [np.array([1, 2, 3, 4, 5, 6])] * 50 + random_articles(50, seed=2)
    model = NGram(articles, V, END, order=4)
    assert model.losses(np.array([1, 2, 3, 4, 5, 6]))[2:].max() < 0.35 < model.losses(np.array([6, 3, 1]))[1]
