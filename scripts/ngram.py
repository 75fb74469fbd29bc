"""An n-gram model with modified Kneser-Ney smoothing, interpolated, as a baseline of language models.

Source: Chen, Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", equations of section 3.
NumPy only; a corpus of some million tokens takes seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Order:
    """The k-grams that were seen, by the number of their first k - 1 tokens (their context) and the last one."""

    keys: np.ndarray  # context * V + last token, sorted; a k-gram's place is its number
    discounted: np.ndarray  # of each: count, less the discount
    totals: np.ndarray  # of each context: the sum of the counts
    left: np.ndarray  # of each context: the sum of the discounts


class NGram:
    """A model of articles, each between two `end` tokens; a token sees order - 1 before it."""

    def __init__(self, articles: Sequence[np.ndarray], vocab_size: int, end: int, order: int = 5):
        self.V, self.end, self.order = vocab_size, end, order
        tokens, is_label = self._stream(articles)
        # The k-gram of a token that is not predicted is not counted.
        numbers, keys = [tokens], [np.arange(vocab_size)]
        for _ in range(1, order):
            pairs = np.where(np.arange(len(tokens)) > 0, np.roll(numbers[-1], 1) * vocab_size + tokens, tokens)
            found, number = np.unique(pairs, return_inverse=True)
            numbers.append(number)
            keys.append(found)
        self.orders: list[_Order] = []
        places = np.flatnonzero(is_label)
        for k in range(order, 0, -1):
            counted = numbers[k - 1][places]
            counts = np.bincount(counted, minlength=len(keys[k - 1]))
            context = keys[k - 1] // vocab_size if k > 1 else np.zeros(vocab_size, np.int64)
            self.orders.insert(0, _count(keys[k - 1], counts, context, len(keys[k - 2]) if k > 1 else 1))
            # Of a shorter one counts in how many different ways it went on to the left.
            _, first = np.unique(counted, return_index=True)
            places = places[first]

    def losses(self, article: np.ndarray) -> np.ndarray:
        """Return the nats of each token of an article, and of its end."""
        tokens, is_label = self._stream([article])
        p = np.full(len(tokens), 1 / self.V)
        number = np.zeros(len(tokens), np.int64)  # of the context, before the token; -1: not seen
        for order in self.orders:
            pairs = np.where(number >= 0, number * self.V + tokens, -1)
            place = np.minimum(np.searchsorted(order.keys, pairs), len(order.keys) - 1)
            is_seen = order.keys[place] == pairs
            is_known = (number >= 0) & (order.totals[number] > 0)
            total = np.where(is_known, order.totals[number], 1)
            own = np.where(is_seen, order.discounted[place], 0)
            p = np.where(is_known, (own + order.left[number] * p) / total, p)
            # The context of the next order ends just before: this k-gram, one place on.
            number = np.roll(np.where(is_seen, place, -1), 1)
        return -np.log(p[is_label])

    def _stream(self, articles: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of all articles behind one another, and which of them are to be predicted."""
        n, sizes = self.order - 1, [len(article) for article in articles]
        parts = [part for article in articles for part in ([self.end] * n, article, [self.end])]
        is_label = np.concatenate([np.arange(n + size + 1) >= n for size in sizes])
        return np.concatenate(parts).astype(np.int64), is_label


def _count(keys: np.ndarray, counts: np.ndarray, context: np.ndarray, n_contexts: int) -> _Order:
    n_1, n_2, n_3, n_4 = (max(int(np.sum(counts == i)), 1) for i in range(1, 5))
    y = n_1 / (n_1 + 2 * n_2)
    # Of counts of 0, 1, 2, and 3 or more; with few counts, the estimates could be anything.
    discounts = np.array([0.0, 1 - 2 * y * n_2 / n_1, 2 - 3 * y * n_3 / n_2, 3 - 4 * y * n_4 / n_3]).clip(0)
    discount = np.minimum(discounts[np.minimum(counts, 3)], counts)
    totals, left = (np.bincount(context, weights=x, minlength=n_contexts) for x in (counts, discount))
    return _Order(keys, counts - discount, totals, left)
