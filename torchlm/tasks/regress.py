"""Regression: a number for a text, or for two with data.pair_column, by its squared error."""

import torch
from torch import Tensor

from jaxlm.tasks import regress
from torchlm.heads import Classifier
from torchlm.loss import Totals
from torchlm.tasks.classify import Classify


class Regress(Classify, regress.Regress):
    def build_model(self, rngs: torch.Generator) -> Classifier:
        return Classifier(self.config.model, 1, self.dtype, rngs)

    def totals(self, logits: Tensor, labels: Tensor, is_training: bool = False) -> Totals:
        """Return what `loss` does, of logits [..., 1] and labels [...]; NaN counts nothing."""
        predictions_B, labels_B = logits[..., 0].flatten(), labels.flatten()
        is_counted_B = ~labels_B.isnan()
        # Not the product with a mask: the gradient of a NaN is NaN.
        errors_B = torch.where(is_counted_B, predictions_B - labels_B.nan_to_num(), 0)
        values_B2 = torch.stack([labels_B, predictions_B], dim=1)
        return {"loss": errors_B.square().sum(), "count": is_counted_B.sum(), "values": values_B2}

    def predict(self, model: Classifier, batch: dict[str, Tensor]) -> Tensor:
        return self.logits(model, batch)[..., 0]
