"""Classification of a text, or of two, that may have several labels or none: each is a yes or no of its own."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxlm.data import label_sets, metrics
from jaxlm.tasks.classify import Classify

if TYPE_CHECKING:
    from jax import Array

    from jaxlm.heads import Classifier
    from jaxlm.loss import Totals


class Multilabel(Classify):
    samples: ClassVar[type[Any]] = label_sets.LabelSetSamples
    settings = (*Classify.settings[:4], "model.pooling", "model.classifier_bias")
    baseline_name = "the labels that most texts have"
    has_probabilities = False  # that sum to 1

    def totals(self, logits: "Array", labels: "Array", is_training: bool = False) -> "Totals":
        """Return what `loss` does, of logits and labels [B, C]; a text's loss is the mean over labels.

        `marks` [C, 3] are by label how many are right, predicted (with a probability above 0.5), and given.
        """
        import jax.numpy as jnp

        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        is_counted_BC, labelled_BC = labels >= 0, labels > 0
        losses_BC = jnp.where(is_counted_BC, jnp.logaddexp(logits, 0) - logits * labels, 0)
        predicted_BC = is_counted_BC & (logits > 0)
        marks = (labelled_BC & predicted_BC, predicted_BC, labelled_BC)
        return {
            "loss": jnp.sum(losses_BC) / labels.shape[1],
            "count": jnp.sum(is_counted_BC[:, 0]),
            "correct": jnp.sum(jnp.all(is_counted_BC & (labelled_BC == predicted_BC), axis=1)),
            "marks": jnp.stack([jnp.sum(x, axis=0) for x in marks], axis=1),
        }

    def predict(self, model: "Classifier", batch: dict[str, "Array"]) -> "Array":
        return self.logits(model, batch)

    def scores(self, totals: Any) -> metrics.Scores:
        return label_sets.scores(self.classes, totals)

    def baseline(self, samples: Any) -> metrics.Scores:
        return self.scores(label_sets.constant(np.asarray(samples.labels)))

    def named(self, x: Any) -> str:
        return ", ".join(name for name, p in zip(self.classes, x, strict=True) if p > 0) or "none"

    def answer(self, prediction: Any) -> dict[str, Any]:
        return {"probabilities": dict(zip(self.classes, np.exp(-np.logaddexp(0, -prediction)), strict=True))}
