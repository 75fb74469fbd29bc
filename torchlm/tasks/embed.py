"""Embeddings of sentences: each text is to be nearer to its pair than to the pairs of others in its batch.

Source: arXiv 1705.00652, section 4.4; MultipleNegativesRankingLoss of sentence-transformers is the same.
"""

import torch
from torch import Tensor

from jaxlm.errors import UserError
from jaxlm.tasks import embed
from jaxlm.tasks.embed import SCALE
from torchlm import parallel
from torchlm.heads import Embedder
from torchlm.loss import Totals, cross_entropy
from torchlm.tasks.base import Task


class Embed(Task, embed.Embed):
    def build_model(self, rngs: torch.Generator) -> Embedder:
        if parallel.n_processes() > 1:  # each has a part of the batch, and so of the negatives
            raise UserError("task=embed: torchlm trains it in one process; start one, or use jaxlm")
        return Embedder(self.config.model, self.dtype, rngs)

    def loss(self, model: Embedder, batch: dict[str, Tensor], key: None) -> Totals:
        tokens_CT = torch.cat([batch["tokens"], batch["pair_tokens"]])  # one pass for all 2 B texts
        vectors_CD = model(tokens_CT, key, torch.cat([batch["last"], batch["pair_last"]]))
        text_BD, pair_BD = vectors_CD.chunk(2)
        is_real_B = batch["labels"] >= 0
        # What fills up a batch is a negative of nothing.
        scores_BB = torch.where(is_real_B, SCALE * text_BD @ pair_BD.T, -1e9)
        own_B = torch.arange(len(is_real_B), device=is_real_B.device)
        return cross_entropy(scores_BB, torch.where(is_real_B, own_B, -1))

    def predict(self, model: Embedder, batch: dict[str, Tensor]) -> Tensor:
        """Return the embeddings of texts and pairs, [B, 2, D]."""
        texts = (batch["tokens"], batch["last"]), (batch["pair_tokens"], batch["pair_last"])
        return torch.stack([model(tokens_BT, None, last_B) for tokens_BT, last_B in texts], dim=1)
