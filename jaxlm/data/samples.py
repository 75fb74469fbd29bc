"""From articles in tokens to the samples of each kind of task: windows, their labels, and masking. NumPy only.

A samples object knows its length and makes any batch of samples: `batch(indices, epochs)` returns the arrays of a
model's input by name, each with a leading axis of samples. A label of -1 is ignored by the loss. Nothing depends on
which samples share a batch, so that order, batch size and number of processes are free. `lengths(indices)` are the
numbers of positions without padding, `n_tokens(batch)` is their sum in a batch, and `cut(batch, length)` a batch cut to
that length. Packed rows (packing.py) have labels at all positions, or, if it is not 0, room for `n_slots`
of them, and `slots(lengths)` is how many each sample takes. The tokenizer must have the special tokens `roles(model)`.
`model_kind` is the kind of model that they are for, as tasks.parameters.model_kind returns it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxlm.config import Config, ModelConfig
from jaxlm.data.cache import BLOCK, Split
from jaxlm.data.sources import Reads

IGNORED = -1
Batch = dict[str, np.ndarray]


class Windows:
    """Articles cut into windows of `length` positions, a new one every `stride`, that never cross an article.

    `before` and `after` are special tokens around each article (None: none). The last window of an article is short.
    """

    def __init__(self, split: Split, length: int, stride: int, before: int | None = None, after: int | None = None):
        self.split, self.length, self.stride = split, length, stride
        self.before, self.after = before, after
        self.n_before = int(before is not None)
        sizes = np.diff(split.offsets)
        sizes = np.where(sizes > 0, sizes + self.n_before + int(after is not None), 0)
        # Behind the first window, each has something that the one before does not have.
        n_windows = np.where(sizes > 0, 1 - (-np.maximum(sizes - length, 0) // stride), 0)
        self.sizes, self.ends = sizes, np.cumsum(n_windows)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Return how many ids of each window are in the article."""
        article, start = self._places(indices)
        return np.minimum(self.length, self.sizes[article] - start)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids [B, length], int32, of the windows `indices` [B], and which of them are in the article."""
        article, start = self._places(indices)
        place = start[:, None] + np.arange(self.length)
        is_real = place < self.sizes[article][:, None]
        first, last = self.split.offsets[article][:, None], self.split.offsets[article + 1][:, None] - 1
        ids = self.split.tokens[np.clip(first + place - self.n_before, first, last)].astype(np.int32)
        if self.before is not None:
            ids = np.where(place == 0, self.before, ids)
        if self.after is not None:
            ids = np.where(place == self.sizes[article][:, None] - 1, self.after, ids)
        return ids, is_real

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        article = np.searchsorted(self.ends, indices, side="right")
        return article, (indices - np.where(article > 0, self.ends[article - 1], 0)) * self.stride


class _Samples:
    """What most kinds of samples have in common."""

    reads: Reads = "text"
    model_kind = "causal"
    n_slots = 0

    def __init__(self, split: Split, config: Config):
        self.split, self.seq_len, self.labels = split, config.model.seq_len, split.labels
        self.constants: dict[str, int] = {}  # added to the totals of an evaluation

    @staticmethod
    def roles(model: ModelConfig) -> tuple[str, ...]:
        return ("article",)

    def cut(self, batch: Batch, length: int) -> Batch:
        return {name: x[:, :length] for name, x in batch.items()}

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return np.zeros_like(lengths)


class CausalSamples(_Samples):
    """Windows of seq_len + 1 ids: the first seq_len are `tokens` [B, T], the last seq_len are `labels`.

    An article is [end of text] ids [end of text]: its first token and its end are predicted, too. Each id is a label
    once.
    """

    def __init__(self, split: Split, config: Config, specials: dict[str, int], vocab_size: int):
        super().__init__(split, config)
        self.pad_id, self.article = config.model.pad_id, specials["article"]
        stride, before = config.data.stride or self.seq_len, specials.get("before", self.article)
        self.windows = Windows(split, self.seq_len + 1, stride, before=before, after=self.article)
        self.constants = {"bytes": int(np.sum(split.n_bytes))}

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        ids, is_real = self.windows.read(indices)
        ids = np.where(is_real, ids, max(self.pad_id, 0))
        labels = np.where(is_real[:, 1:], ids[:, 1:], IGNORED)
        if self.pad_id >= 0:  # the original's slip: a real token with the id of the pad is not learned either
            labels = np.where(labels == self.pad_id, IGNORED, labels)
        return {"tokens": ids[:, :-1], "labels": labels}

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.windows.lengths(indices) - 1

    def n_tokens(self, batch: Batch) -> int:
        return int(np.count_nonzero(batch["labels"] >= 0))

    def counted_tokens(self) -> np.ndarray:
        """Return how often each id is a label, for the baseline."""
        counts = self.windows.split.token_counts()
        counts = np.pad(counts, (0, max(0, self.article + 1 - len(counts))))
        counts[self.article] += np.count_nonzero(self.windows.sizes)
        if self.pad_id >= 0:
            counts[self.pad_id : self.pad_id + 1] = 0
        return counts


class MaskedSamples(_Samples):
    """Windows [CLS] ids [SEP] with some positions masked: `tokens` [B, T], `positions` and `labels` [B, M].

    Of the masked positions 80% become [MASK], 10% a random id and 10% stay (arXiv 1810.04805, section 3.1). A mask is
    a function of seed, epoch and sample only. Short windows have fewer masks; the rest of their M labels is ignored.
    """

    model_kind = "masked"

    def __init__(self, split: Split, config: Config, specials: dict[str, int], vocab_size: int):
        super().__init__(split, config)
        self.config, self.specials = config, specials
        self.start, self.end = (specials.get(name) for name in ends(config))
        self.n_start, self.n_end = int(self.start is not None), int(self.end is not None)
        content = self.seq_len - self.n_start - self.n_end
        self.windows = Windows(split, content, min(content, config.data.stride or content))
        self.n_masks = self.n_slots = max(1, int(config.data.mask_fraction * self.seq_len))
        self.replacements = np.setdiff1d(np.arange(vocab_size), list(specials.values())).astype(np.int32)

    @staticmethod
    def roles(model: ModelConfig) -> tuple[str, ...]:
        return ("pad", "mask")

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        ids, is_real = self.windows.read(indices)
        B, n_real = len(indices), is_real.sum(axis=1)
        tokens = np.full((B, self.seq_len), self.specials["pad"], np.int32)
        if self.start is not None:
            tokens[:, 0] = self.start
        content = tokens[:, self.n_start : self.n_start + ids.shape[1]]
        content[...] = np.where(is_real, ids, content)
        if self.end is not None:
            tokens[np.arange(B), self.n_start + n_real] = self.end
        return self._mask(tokens, n_real, indices, epochs)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.windows.lengths(indices) + self.n_start + self.n_end

    def cut(self, batch: Batch, length: int) -> Batch:
        n_masks = max(1, int(self.config.data.mask_fraction * length))
        return {name: x[:, : length if name == "tokens" else n_masks] for name, x in batch.items()}

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many positions of windows of so many ids are masked."""
        n_masks = np.maximum(1, (self.config.data.mask_fraction * lengths).astype(int))
        return np.minimum(n_masks, np.minimum(lengths - self.n_start - self.n_end, self.n_masks))

    def _mask(self, tokens: np.ndarray, n_real: np.ndarray, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        if self.config.data.n_maskings:
            epochs = epochs % self.config.data.n_maskings
        n_masks = self.slots(n_real + self.n_start + self.n_end)[:, None]

        random = uniform(self.config.train.seed, epochs, indices, 3 * self.seq_len)
        order, kind, choice = np.split(random, 3, axis=1)
        place = np.arange(self.seq_len)
        is_content = (place >= self.n_start) & (place < self.n_start + n_real[:, None])
        positions = np.argsort(np.where(is_content, order, 2.0), axis=1, kind="stable")[:, : self.n_masks]
        is_masked = np.arange(self.n_masks) < n_masks
        positions = np.where(is_masked, positions, 0).astype(np.int32)

        kind, choice = (np.take_along_axis(x, positions, axis=1) for x in (kind, choice))
        original = np.take_along_axis(tokens, positions, axis=1)
        replacement = self.replacements[(choice * len(self.replacements)).astype(int)]
        masked = np.where(kind < 0.8, self.specials["mask"], np.where(kind < 0.9, replacement, original))
        tokens = tokens.copy()
        rows, columns = np.nonzero(is_masked)
        tokens[rows, positions[rows, columns]] = masked[rows, columns]
        return {"tokens": tokens, "positions": positions, "labels": np.where(is_masked, original, IGNORED)}

    def n_tokens(self, batch: Batch) -> int:
        return int(np.count_nonzero(batch["tokens"] != self.specials["pad"]))

    def counted_tokens(self) -> np.ndarray:
        """Return how often each id can be a label, for the baseline."""
        return self.windows.split.token_counts()


class ClassifiedSamples(_Samples):
    """One sample an article: `tokens` [B, T] = [CLS] ids [SEP], cut to seq_len, and its class, `labels` [B].

    With data.pair_column, a sample has two texts, articles 2i and 2i + 1, and `tokens` are [CLS] a [SEP] b [SEP], or
    RoBERTa's <s> a </s> </s> b </s>; with model.segments, `types` [B, T] are 1 at b and the [SEP] behind it. The longer
    text is cut first.
    With model.pooling=last, `tokens` are [end of text] ids [end of text], and `last` [B] is where the last of these
    is; there is no pad, since a causal model does not see what follows.
    """

    reads: Reads = "labels"
    model_kind = "classifier"

    def __init__(self, split: Split, config: Config, specials: dict[str, int], vocab_size: int):
        super().__init__(split, config)
        self.is_last = config.model.pooling == "last"
        self.start, self.end = marks(config, specials)
        self.pad = specials["article" if self.is_last else "pad"]
        self.n_start, self.n_end = int(self.start is not None), int(self.end is not None)
        self.n_slots = most_texts(self.seq_len)
        self.n_texts = 2 if config.data.pair_column else 1
        self.between = separator(config, specials)  # of two texts, behind the end of the first
        self.n_marks = self.n_start + self.n_texts * self.n_end + len(self.between) * (self.n_texts - 1)
        self.has_types = self.n_texts == 2 and config.model.segments > 1
        self.room = self.seq_len - self.n_marks  # for the ids of the texts
        self.labels = split.labels[:: self.n_texts]

    @staticmethod
    def roles(model: ModelConfig) -> tuple[str, ...]:
        return ("article",) if model.pooling == "last" else ("pad", "start")

    def __len__(self) -> int:
        return len(self.labels)

    def n_tokens(self, batch: Batch) -> int:
        return int(np.sum(batch["last"] + 1) if self.is_last else np.count_nonzero(batch["tokens"] != self.pad))

    @property
    def n_cut(self) -> int:
        """How many samples are longer than model.seq_len."""
        return int(np.sum(np.diff(self.split.offsets).reshape(-1, self.n_texts).sum(axis=1) > self.room))

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        place = np.arange(self.seq_len)
        tokens = np.full((len(indices), self.seq_len), self.pad, np.int32)
        if self.start is not None:
            tokens[:, 0] = self.start
        types = np.zeros_like(tokens)
        begin = np.full((len(indices), 1), self.n_start)  # of the text in its row
        for i, n_real in enumerate(self._sizes(indices).T):
            end = begin + n_real[:, None]
            fill(tokens, self.split.tokens, self.split.offsets[self.n_texts * indices + i][:, None], begin, end)
            if self.end is not None:
                tokens[np.arange(len(indices)), end[:, 0]] = self.end
            types[(place >= begin) & (place < end + self.n_end)] = i
            begin = end + self.n_end
            for token in self.between[: self.n_texts - 1 - i]:
                tokens[np.arange(len(indices)), begin[:, 0]] = token
                begin = begin + 1
        batch = {"tokens": tokens, "labels": self._labels(indices)}
        batch |= {"types": types} if self.has_types else {}
        return batch | ({"last": np.maximum(begin[:, 0] - 1, 0).astype(np.int32)} if self.is_last else {})

    def text(self, i: int, tokenizer: Tokenizer) -> str:
        """Return the text of a sample, or its two."""
        places = range(self.n_texts * i, self.n_texts * (i + 1))
        parts = (self.split.tokens[self.split.offsets[k] : self.split.offsets[k + 1]] for k in places)
        return " | ".join(tokenizer.decode(part.tolist()) for part in parts)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.maximum(self._sizes(indices).sum(axis=1) + self.n_marks, 1)

    def _labels(self, indices: np.ndarray) -> np.ndarray:
        return self.labels[indices].astype(np.int32)

    def _sizes(self, indices: np.ndarray) -> np.ndarray:
        """Return how many ids of each text are used, [B, n_texts]."""
        first = self.n_texts * indices
        sizes = [self.split.offsets[first + i + 1] - self.split.offsets[first + i] for i in range(self.n_texts)]
        return np.stack(longest_first(sizes, self.room), axis=1)

    def slots(self, lengths: np.ndarray) -> np.ndarray:
        return np.ones_like(lengths)

    def cut(self, batch: Batch, length: int) -> Batch:
        return batch | {name: batch[name][:, :length] for name in ("tokens", "types") if name in batch}


class ValuedSamples(ClassifiedSamples):
    """As ClassifiedSamples, with numbers to predict: `labels` [B] are float32, NaN: none."""

    reads = "values"

    def _labels(self, indices: np.ndarray) -> np.ndarray:
        return self.labels[indices].astype(np.float32)


def longest_first(sizes: Sequence[Any], room: int) -> list[Any]:
    """Return how many tokens of one or two texts are used, `room` at most: the longer text is cut first.

    Two of equal size are cut alike; the odd token is of the second. Source: truncation "longest_first" of tokenizers.
    """
    if len(sizes) == 1:
        return [np.minimum(sizes[0], room)]
    a, b = map(np.asarray, sizes)
    short, long = np.minimum(a, b), np.maximum(a, b)
    long = np.minimum(long, np.maximum(room - short, short))
    is_over = short + long > room
    short, long = np.where(is_over, room // 2, short), np.where(is_over, room - room // 2, long)
    return [np.where(a > b, long, short), np.where(a > b, short, long)]


def fill(tokens: np.ndarray, ids: np.ndarray, first: np.ndarray, begin: Any, end: np.ndarray) -> None:
    """Put the `ids` [N] from `first` [B, 1] on into rows of `tokens` [B, T], from `begin` to before `end` [B, 1]."""
    if len(ids):  # else every text is empty
        place = np.arange(tokens.shape[1])
        is_here = (place >= begin) & (place < end)
        np.copyto(tokens, ids[np.clip(first + place - begin, 0, len(ids) - 1)], where=is_here, casting="unsafe")


def most_texts(seq_len: int) -> int:
    """Return how many texts with a label a packed row has at most: hardly one is shorter than 4, with its marks."""
    return max(1, seq_len // 4)


def ends(config: Config) -> tuple[str, str]:
    """Return the roles of the tokens before and after a text that a bidirectional model reads."""
    return ("before", "after") if config.tokenizer.marks == "file" else ("start", "end")


def marks(config: Config, specials: dict[str, int]) -> tuple[int | None, int | None]:
    """Return the tokens before and after a text that is classified."""
    if config.tokenizer.marks == "file":
        return specials.get("before"), specials.get("after")
    if config.model.pooling == "last":
        return specials["article"], specials["article"]
    return specials["start"], specials.get("end")


def separator(config: Config, specials: dict[str, int]) -> list[int]:
    """Return the token, if there is one, that stands before the second of two texts, behind the end of the first."""
    return [specials["separator"]] if "separator" in specials and config.model.pooling != "last" else []


class PairSamples(_Samples):
    """A prompt and its answer a sample: the first seq_len and, as `labels`, the last seq_len of seq_len + 1 ids.

    These are [end of text] prompt answer [end of text]; only those of the answer and behind it are labels. Pair i is
    of articles 2i and 2i + 1. A pair that is longer is left out: cut, it would teach to stop anywhere.
    """

    reads: Reads = "pairs"

    def __init__(self, split: Split, config: Config, specials: dict[str, int], vocab_size: int):
        super().__init__(split, config)
        self.article = specials["article"]
        sizes = np.diff(split.offsets).reshape(-1, 2).sum(axis=1) + 1  # the last id is a label only
        self.pairs = np.flatnonzero(sizes <= self.seq_len)
        self.n_left_out = len(sizes) - len(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        first, middle, end = (self.split.offsets[2 * self.pairs[indices] + i][:, None] for i in range(3))
        place = first - 1 + np.arange(self.seq_len + 1)
        ids = self.split.tokens[np.clip(place, first, end - 1)].astype(np.int32)
        ids = np.where((place >= first) & (place < end), ids, self.article)
        is_label = (place >= middle) & (place <= end)
        return {"tokens": ids[:, :-1], "labels": np.where(is_label, ids, IGNORED)[:, 1:]}

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        pairs = 2 * self.pairs[indices]
        return self.split.offsets[pairs + 2] - self.split.offsets[pairs] + 1

    def n_tokens(self, batch: Batch) -> int:
        n_behind = np.argmax(batch["labels"][..., ::-1] >= 0, axis=-1)
        return int(np.sum(batch["labels"].shape[-1] - n_behind))

    def counted_tokens(self) -> np.ndarray:
        """Return how often each id is a label, for the baseline."""
        _, middle, end = (self.split.offsets[2 * self.pairs + i] for i in range(3))
        counts = np.zeros(self.article + 1, np.int64)
        for start in range(0, len(self.split.tokens), BLOCK):
            tokens = self.split.tokens[start : start + BLOCK]
            steps = np.zeros(len(tokens) + 1, np.int8)
            np.add.at(steps, np.clip(middle - start, 0, len(tokens)), 1)
            np.add.at(steps, np.clip(end - start, 0, len(tokens)), -1)
            block = np.bincount(tokens[np.cumsum(steps[:-1], dtype=np.int8) > 0], minlength=len(counts))
            block[: len(counts)] += counts
            counts = block
        counts[self.article] += len(self.pairs)
        return counts


Samples = CausalSamples | MaskedSamples | ClassifiedSamples | PairSamples


def uniform(seed: int, epochs: np.ndarray, indices: np.ndarray, n: int) -> np.ndarray:
    """Return float64 in [0, 1) of shape [B, n], a function of (seed, epoch, index) of each row and the column.

    A counter through SplitMix64's finalizer (Steele, Lea, Flood 2014): stateless, and one NumPy pass for a batch.
    """

    def mix(x: Any) -> Any:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.full(len(indices), seed, np.uint64)
    for part in (epochs, indices):
        state = mix(state * golden + np.asarray(part).astype(np.uint64) + golden)
    columns = np.arange(1, n + 1, dtype=np.uint64) * golden
    return (mix(state[:, None] + columns) >> np.uint64(11)) * 2.0**-53
