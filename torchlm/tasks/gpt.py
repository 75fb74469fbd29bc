"""Causal language modelling: guess the next word (GPT-2)."""

import torch
from torch import Tensor

from jaxlm.tasks import gpt
from torchlm.generate import continue_greedily
from torchlm.heads import LanguageModel
from torchlm.loss import Totals, cross_entropy
from torchlm.tasks.base import Task


class Gpt(Task, gpt.Gpt):
    packs = True

    def build_model(self, rngs: torch.Generator) -> LanguageModel:
        return LanguageModel(self.config.model, is_causal=True, dtype=self.dtype, rngs=rngs)

    def loss(self, model: LanguageModel, batch: dict[str, Tensor], key: None) -> Totals:
        z_loss = self.config.model.z_loss if model.training else 0.0
        logits_BTV = model(batch["tokens"], key, None, False, batch.get("segments"))
        return cross_entropy(logits_BTV, batch["labels"], z_loss)

    def predict(self, model: LanguageModel, batch: dict[str, Tensor]) -> Tensor:
        n_prompt, n_new = self._shown()
        return continue_greedily(model, batch["tokens"][:, :n_prompt], n_new)
