"""From words with tags to the samples of a tagger. NumPy only."""

from collections.abc import Sequence

import numpy as np

from jaxlm.config import Config
from jaxlm.data.cache import Split
from jaxlm.data.samples import IGNORED, Batch, ClassifiedSamples, fill
from jaxlm.data.sources import Reads


class TaggedSamples(ClassifiedSamples):
    """A sentence, or a window of a longer one: `tokens` [B, T], and for each word its tag and where its first token is.

    `labels` and `positions` are [B, T]; a row has its words first, then -1. Each word is in one window, and only a
    word longer than all of a window is cut. Of a word for which the tokenizer has no token, there is no label.
    """

    reads: Reads = "tags"
    model_kind = "tagger"

    def __init__(self, split: Split, config: Config, specials: dict[str, int], vocab_size: int):
        super().__init__(split, config, specials, vocab_size)
        sizes = np.diff(split.offsets)
        of_sentence = np.cumsum(split.labels < 0)  # an article without a label ends a sentence
        self.words = np.flatnonzero((sizes > 0) & (split.labels >= 0))
        of_word = of_sentence[self.words]
        firsts = np.flatnonzero(np.diff(of_word, prepend=-1))  # first word of each sentence
        self.sizes = np.add.reduceat(sizes[self.words], firsts) if len(firsts) else np.zeros(0, np.int64)
        self.content = self.seq_len - self.n_start - self.n_end
        begins: list[int] = []
        for first, last in zip(firsts.tolist(), [*firsts[1:].tolist(), len(self.words)], strict=False):
            begins += [first + i for i in windows(sizes[self.words[first:last]].tolist(), self.content)]
        self.begins = np.array([*begins, len(self.words)], np.int64)  # first word of each window, and the end

    def __len__(self) -> int:
        return len(self.begins) - 1

    @property
    def n_cut(self) -> int:
        """How many words are longer than a sample."""
        return int(np.sum(np.diff(self.split.offsets)[self.words] > self.content))

    @property
    def n_divided(self) -> int:
        """How many sentences have several windows."""
        return int(np.sum(self.sizes > self.content))

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        first, end = self.begins[indices][:, None], self.begins[indices + 1][:, None]
        starts = self.split.offsets[self.words]
        begin, n_read = starts[first], self.lengths(indices)[:, None] - self.n_end
        place = np.arange(self.seq_len)
        tokens = np.full((len(indices), self.seq_len), self.pad, np.int32)
        fill(tokens, self.split.tokens, begin, self.n_start, n_read)
        if self.start is not None:
            tokens[:, 0] = self.start
        if self.end is not None:
            tokens[np.arange(len(indices)), n_read[:, 0]] = self.end
        word, is_word = np.minimum(first + place, len(self.words) - 1), first + place < end
        return {
            "tokens": tokens,
            "positions": np.where(is_word, starts[word] - begin + self.n_start, 0).astype(np.int32),
            "labels": np.where(is_word, self.split.labels[self.words[word]], IGNORED).astype(np.int32),
        }

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        first, last = self.words[self.begins[indices]], self.words[self.begins[indices + 1] - 1]
        sizes = self.split.offsets[last + 1] - self.split.offsets[first]
        return np.minimum(sizes, self.content) + self.n_start + self.n_end

    def n_tokens(self, batch: Batch) -> int:
        n_rows = batch["tokens"][..., 0].size
        n_marks = n_rows * (self.n_start + self.n_end) if self.is_last else 0  # which are the pad there
        return int(np.count_nonzero(batch["tokens"] != self.pad)) + n_marks

    def cut(self, batch: Batch, length: int) -> Batch:
        return {name: x[:, :length] for name, x in batch.items()}


def windows(sizes: Sequence[int], content: int) -> list[int]:
    """Return the first word of each window of a sentence whose words have so many tokens; a window takes `content`."""
    begins, room = [0], content
    for i, size in enumerate(sizes):
        if i and size > room:
            begins.append(i)
            room = content
        room -= size
    return begins
