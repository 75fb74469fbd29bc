"""Embeddings of sentences: each text is to be nearer to its pair than to the pairs of others in its batch.

Source: arXiv 1705.00652, section 4.4; MultipleNegativesRankingLoss of sentence-transformers is the same.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from jaxlm.data import embedded, metrics
from jaxlm.data.couples import CoupleSamples
from jaxlm.data.samples import Batch
from jaxlm.data.sources import Source
from jaxlm.tasks.base import Task

if TYPE_CHECKING:
    from flax import nnx
    from jax import Array

    from jaxlm.heads import Embedder
    from jaxlm.loss import Totals

SCALE = 20.0  # of the cosines: their softmax is to be sharp
BLOCK = 1024  # texts that are ranked at a time


class Embed(Task):
    samples = CoupleSamples
    settings = ("data.text_column", "data.pair_column", "model.pooling")
    baseline_name = "guessing among the pairs"
    ranks = True

    def embedded(self) -> Source:
        return embedded.sentences("embed")

    def build_model(self, rngs: "nnx.Rngs") -> "Embedder":
        from jaxlm.heads import Embedder

        return Embedder(self.config.model, self.dtype, rngs)

    def loss(self, model: "Embedder", batch: dict[str, "Array"], key: "Array | None") -> "Totals":
        import jax.numpy as jnp

        from jaxlm.loss import cross_entropy

        tokens_CT = jnp.concatenate([batch["tokens"], batch["pair_tokens"]])  # one pass for all 2 B texts
        vectors_CD = model(tokens_CT, key, jnp.concatenate([batch["last"], batch["pair_last"]]))
        text_BD, pair_BD = jnp.split(vectors_CD, 2)
        is_real_B = batch["labels"] >= 0
        # What fills up a batch is a negative of nothing.
        scores_BB = jnp.where(is_real_B, SCALE * text_BD @ pair_BD.T, -1e9)
        return cross_entropy(scores_BB, jnp.where(is_real_B, jnp.arange(len(is_real_B)), -1))

    def predict(self, model: "Embedder", batch: dict[str, "Array"]) -> "Array":
        """Return the embeddings of texts and pairs, [B, 2, D]."""
        import jax.numpy as jnp

        texts = (batch["tokens"], batch["last"]), (batch["pair_tokens"], batch["pair_last"])
        return jnp.stack([model(tokens_BT, None, last_B) for tokens_BT, last_B in texts], axis=1)

    def ranked(self, vectors_N2D: np.ndarray) -> dict[str, np.ndarray]:
        """Return the totals of each sample, whose text is compared with all N pairs, not with those of a batch."""
        text_ND, pair_ND = vectors_N2D.astype(np.float64).transpose(1, 0, 2)
        losses, ranks = [], []
        for first in range(0, len(text_ND), BLOCK):
            scores = SCALE * text_ND[first : first + BLOCK] @ pair_ND.T
            own = scores[np.arange(len(scores)), first + np.arange(len(scores))]
            largest = scores.max(axis=1)
            losses += list(np.log(np.exp(scores - largest[:, None]).sum(axis=1)) + largest - own)
            ranks += list(1 + np.sum(scores > own[:, None], axis=1))
        rank_N = np.array(ranks)
        return {
            **{"loss": np.array(losses), "count": np.ones(len(rank_N)), "correct": (rank_N == 1).astype(np.float64)},
            "reciprocal": 1 / rank_N,
        }

    def scores(self, totals: Any) -> metrics.Scores:
        scores = {"accuracy": metrics.accuracy(totals)}
        if "reciprocal" in totals:
            scores["mrr"] = metrics.ratio(totals["reciprocal"], totals["count"])
        return scores | {"loss": metrics.loss(totals)}

    def baseline(self, samples: Any) -> metrics.Scores:
        return self.chance(min(len(samples), self.config.train.batch_size))

    def chance(self, n: int) -> metrics.Scores:
        """Return the scores of guessing among n pairs."""
        return {"accuracy": 1 / n, "mrr": float(np.mean(1 / np.arange(1, n + 1))), "loss": float(np.log(n))}

    def show(self, batch: Batch, predictions: Any, tokenizer: Tokenizer) -> str:
        """Return each text with the pair that is nearest to it, where that is another one's marked."""
        lines = []
        nearest_B = (predictions[:, 0] @ predictions[:, 1].T).argmax(axis=1)
        for i, k in enumerate(nearest_B):
            lines.append(f"{' ' if i == k else '*'} {tokenizer.decode(batch['tokens'][i].tolist())}")
            lines.append(f"    nearest: {tokenizer.decode(batch['pair_tokens'][k].tolist())}")
        return "\n".join(lines)
