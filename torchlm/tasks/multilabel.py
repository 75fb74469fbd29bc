"""Classification of a text, or of two, that may have several labels or none: each is a yes or no of its own."""

import torch
from torch import Tensor, nn

from jaxlm.tasks import multilabel
from torchlm.heads import Classifier
from torchlm.loss import Totals
from torchlm.tasks.classify import Classify


class Multilabel(Classify, multilabel.Multilabel):
    def totals(self, logits: Tensor, labels: Tensor, is_training: bool = False) -> Totals:
        """Return what `loss` does, of logits and labels [B, C]; a text's loss is the mean over labels.

        `marks` [C, 3] are by label how many are right, predicted (with a probability above 0.5), and given.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        is_counted_BC, labelled_BC = labels >= 0, labels > 0
        losses_BC = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        predicted_BC = is_counted_BC & (logits > 0)
        marks = (labelled_BC & predicted_BC, predicted_BC, labelled_BC)
        return {
            "loss": torch.where(is_counted_BC, losses_BC, 0).sum() / labels.shape[1],
            "count": is_counted_BC[:, 0].sum(),
            "correct": (is_counted_BC & (labelled_BC == predicted_BC)).all(dim=1).sum(),
            "marks": torch.stack([x.sum(dim=0) for x in marks], dim=1),
        }

    def predict(self, model: Classifier, batch: dict[str, Tensor]) -> Tensor:
        return self.logits(model, batch)
