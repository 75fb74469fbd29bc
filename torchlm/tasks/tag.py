"""Tags of words, such as names of people and places (CoNLL-2003, arXiv cs/0306050): scored by whole spans."""

import dataclasses

import torch
from torch import Tensor

from jaxlm.tasks import tag
from torchlm.heads import Classifier
from torchlm.loss import Totals, cross_entropy
from torchlm.tasks.base import Task


class Tag(Task, tag.Tag):
    def build_model(self, rngs: torch.Generator) -> Classifier:
        model = dataclasses.replace(self.config.model, head_outputs="labels")
        return Classifier(model, self.config.data.n_classes, self.dtype, rngs, kind="tagger")

    def loss(self, model: Classifier, batch: dict[str, Tensor], key: None) -> Totals:
        return self.totals(model(batch["tokens"], key, batch["positions"]), batch["labels"], model.training)

    def totals(self, logits_BNC: Tensor, labels_BN: Tensor, is_training: bool = False) -> Totals:
        """Return what `loss` does, of logits; `spans` [K, 3] are by type how many are right, predicted, and labelled.

        Spans are read as seqeval does by default, and right if type, begin and end are.
        """
        is_word_BN = labels_BN >= 0
        kind_C, start_C = (torch.from_numpy(x).to(labels_BN.device) for x in self.kind_and_start)

        def marks(tags_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return type, whether a span starts, and where the span that starts ends."""
            kind_BN = torch.where(is_word_BN, kind_C[tags_BN], -1)
            before_BN = torch.nn.functional.pad(kind_BN[:, :-1], (1, 0), value=-1)
            starts_BN = (kind_BN >= 0) & (start_C[tags_BN] | (kind_BN != before_BN))
            goes_on_BN = torch.nn.functional.pad((kind_BN >= 0) & ~starts_BN, (0, 1))[:, 1:]
            n = kind_BN.shape[1]
            ends_BN = torch.where(goes_on_BN, n, torch.arange(n, device=labels_BN.device))
            return kind_BN, starts_BN, ends_BN.flip(1).cummin(dim=1).values.flip(1)

        labelled, predicted = marks(labels_BN.clamp(min=0)), marks(logits_BNC.argmax(dim=-1))
        right_BN = labelled[1] & predicted[1] & (labelled[0] == predicted[0]) & (labelled[2] == predicted[2])
        numbers_K = torch.arange(len(self.kinds), device=labels_BN.device)
        of_kind = [
            torch.sum((kind_BN[..., None] == numbers_K) & is_BN[..., None], dim=(0, 1))
            for kind_BN, is_BN in ((labelled[0], right_BN), predicted[:2], labelled[:2])
        ]
        totals = cross_entropy(logits_BNC, labels_BN, **self.config.train.label_rule(is_training))
        return totals | {"spans": torch.stack(of_kind, dim=1)}

    def predict(self, model: Classifier, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["tokens"], None, batch["positions"]).argmax(dim=-1)
