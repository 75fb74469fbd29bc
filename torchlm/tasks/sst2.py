"""Sentence classification, by default whether a review is positive (SST-2, arXiv 1804.07461)."""

import torch
from torch import Tensor

from jaxlm.tasks import sst2
from torchlm.heads import Classifier
from torchlm.loss import Totals, cross_entropy
from torchlm.tasks.base import Task


class Sst2(Task, sst2.Sst2):
    def build_model(self, rngs: torch.Generator) -> Classifier:
        return Classifier(self.config.model, self.config.data.n_classes, self.dtype, rngs)

    def loss(self, model: Classifier, batch: dict[str, Tensor], key: None) -> Totals:
        return self.totals(model(batch["tokens"], key, batch.get("last")), batch["labels"])

    def totals(self, logits_BC: Tensor, labels_B: Tensor) -> Totals:
        """Return what `loss` does, of logits."""
        C = self.config.data.n_classes
        # The original's head has an output for each token of the vocabulary: those are no class.
        predictions_B = logits_BC.argmax(dim=-1).clamp(max=C)
        # Sums of zeros and ones in float32 are exact; GPUs have no product of integers.
        rows_BC = (labels_B[:, None] == torch.arange(C, device=labels_B.device)).float()
        columns_BC = (predictions_B[:, None] == torch.arange(C + 1, device=labels_B.device)).float()
        return {**cross_entropy(logits_BC, labels_B), "confusion": (rows_BC.T @ columns_BC).long()}

    def predict(self, model: Classifier, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["tokens"], None, batch.get("last")).argmax(dim=-1)
