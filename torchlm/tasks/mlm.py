"""Masked language modelling: guess the hidden words from both sides (BERT, arXiv 1810.04805)."""

import torch
from torch import Tensor

from jaxlm.tasks import mlm
from torchlm.heads import LanguageModel
from torchlm.loss import Totals, cross_entropy
from torchlm.tasks.base import Task


class Mlm(Task, mlm.Mlm):
    packs = True

    def build_model(self, rngs: torch.Generator) -> LanguageModel:
        return LanguageModel(self.config.model, is_causal=False, dtype=self.dtype, rngs=rngs)

    def loss(self, model: LanguageModel, batch: dict[str, Tensor], key: None) -> Totals:
        # Logits only where something is masked: the same loss for a seventh of the work.
        z_loss = self.config.model.z_loss if model.training else 0.0
        logits_BMV = model(batch["tokens"], key, batch["positions"], False, batch.get("segments"))
        return cross_entropy(logits_BMV, batch["labels"], z_loss)

    def totals(self, logits_BMV: Tensor, labels_BM: Tensor) -> Totals:
        """Return what `loss` does, of logits."""
        return cross_entropy(logits_BMV, labels_BM)

    def predict(self, model: LanguageModel, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["tokens"], None, batch["positions"]).argmax(dim=-1)
