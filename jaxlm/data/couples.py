"""From texts with a second text each to the samples of an embedder. NumPy only."""

import numpy as np

from jaxlm.config import Config, ModelConfig
from jaxlm.data.cache import Split
from jaxlm.data.samples import Batch, _Samples, fill, marks
from jaxlm.data.sources import Reads


class CoupleSamples(_Samples):
    """Two texts of like meaning: `tokens` and `pair_tokens` [B, T], both [CLS] ids [SEP], cut to seq_len.

    `last` and `pair_last` [B] are where their last tokens are; `labels` [B] are 0. Texts i are articles 2i and 2i + 1.
    With model.pooling=last, texts are [end of text] ids [end of text].
    """

    reads: Reads = "couples"
    model_kind = "embedder"

    def __init__(self, split: Split, config: Config, specials: dict[str, int], vocab_size: int):
        super().__init__(split, config)
        self.start, self.end = marks(config, specials)
        self.pad = specials["article" if config.model.pooling == "last" else "pad"]
        self.n_start = int(self.start is not None)
        self.n_marks = self.n_start + int(self.end is not None)
        self.sizes = np.diff(split.offsets)

    @staticmethod
    def roles(model: ModelConfig) -> tuple[str, ...]:
        return ("article",) if model.pooling == "last" else ("pad", "start")

    def __len__(self) -> int:
        return len(self.split) // 2

    @property
    def n_cut(self) -> int:
        """How many texts are longer than a sample."""
        return int(np.sum(self.sizes > self.seq_len - self.n_marks))

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        tokens, last = self._texts(2 * indices)
        pair_tokens, pair_last = self._texts(2 * indices + 1)
        labels = np.zeros(len(indices), np.int32)
        return {
            **{"tokens": tokens, "last": last, "pair_tokens": pair_tokens},
            **{"pair_last": pair_last, "labels": labels},
        }

    def _texts(self, articles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of articles and the positions of their last ones."""
        tokens = np.full((len(articles), self.seq_len), self.pad, np.int32)
        end = self.n_start + np.minimum(self.sizes[articles], self.seq_len - self.n_marks)
        fill(tokens, self.split.tokens, self.split.offsets[articles][:, None], self.n_start, end[:, None])
        if self.start is not None:
            tokens[:, 0] = self.start
        if self.end is not None:
            tokens[np.arange(len(articles)), end] = self.end
        return tokens, np.maximum(end - self.n_start + self.n_marks - 1, 0).astype(np.int32)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Return the positions of the longer text of each sample."""
        longer = np.maximum(self.sizes[2 * indices], self.sizes[2 * indices + 1])
        return np.clip(longer + self.n_marks, 1, self.seq_len)

    def n_tokens(self, batch: Batch) -> int:
        return int(np.sum(batch["last"] + 1) + np.sum(batch["pair_last"] + 1))

    def cut(self, batch: Batch, length: int) -> Batch:
        return batch | {name: batch[name][:, :length] for name in ("tokens", "pair_tokens")}
