"""Classification of a text, or of two with data.pair_column, into any number of classes."""

import torch
from torch import Tensor

from jaxlm.tasks import classify
from torchlm.heads import Classifier
from torchlm.loss import Totals, cross_entropy
from torchlm.tasks.base import Task


class Classify(Task, classify.Classify):
    packs = True

    def build_model(self, rngs: torch.Generator) -> Classifier:
        return Classifier(self.config.model, self.config.data.n_classes, self.dtype, rngs)

    def loss(self, model: Classifier, batch: dict[str, Tensor], key: None) -> Totals:
        return self.totals(self.logits(model, batch, key), batch["labels"], model.training)

    def totals(self, logits: Tensor, labels: Tensor, is_training: bool = False) -> Totals:
        """Return what `loss` does, of logits [..., C] and labels [...], one for each text."""
        C, logits_BC, labels_B = self.config.data.n_classes, logits.flatten(0, -2), labels.flatten()
        # The original's head has an output for each token of the vocabulary: those are no class.
        predictions_B = logits_BC.argmax(dim=-1).clamp(max=C)
        # Sums of zeros and ones in float32 are exact; GPUs have no product of integers.
        rows_BC = (labels_B[:, None] == torch.arange(C, device=labels_B.device)).float()
        columns_BC = (predictions_B[:, None] == torch.arange(C + 1, device=labels_B.device)).float()
        totals = cross_entropy(logits_BC, labels_B, **self.config.train.label_rule(is_training))
        return totals | {"confusion": (rows_BC.T @ columns_BC).long()}

    def predict(self, model: Classifier, batch: dict[str, Tensor]) -> Tensor:
        return self.logits(model, batch).argmax(dim=-1)
