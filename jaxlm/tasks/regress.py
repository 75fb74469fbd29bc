"""Regression: a number for a text, or for two with data.pair_column, by its squared error."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from jaxlm.data import metrics
from jaxlm.data.samples import Batch, ValuedSamples
from jaxlm.tasks.classify import Classify

if TYPE_CHECKING:
    from flax import nnx
    from jax import Array

    from jaxlm.heads import Classifier
    from jaxlm.loss import Totals


class Regress(Classify):
    samples: ClassVar[type[Any]] = ValuedSamples
    settings = ("data.text_column", "data.pair_column", "data.label_column", "model.pooling", "model.classifier_bias")
    baseline_name = "always the mean"
    has_probabilities = False

    def build_model(self, rngs: "nnx.Rngs") -> "Classifier":
        from jaxlm.heads import Classifier

        return Classifier(self.config.model, 1, self.dtype, rngs)

    def totals(self, logits: "Array", labels: "Array", is_training: bool = False) -> "Totals":
        """Return what `loss` does, of logits [..., 1] and labels [...]; NaN counts nothing."""
        import jax.numpy as jnp

        predictions_B, labels_B = logits[..., 0].reshape(-1), labels.reshape(-1)
        is_counted_B = ~jnp.isnan(labels_B)
        # Not the product with a mask: the gradient of a NaN is NaN.
        errors_B = jnp.where(is_counted_B, predictions_B - jnp.nan_to_num(labels_B), 0)
        values_B2 = jnp.stack([labels_B, predictions_B], axis=1)
        return {"loss": jnp.sum(errors_B**2), "count": jnp.sum(is_counted_B), "values": values_B2}

    def predict(self, model: "Classifier", batch: dict[str, "Array"]) -> "Array":
        return self.logits(model, batch)[..., 0]

    def scores(self, totals: Any) -> metrics.Scores:
        values = metrics.counted(np.asarray(totals["values"]))
        correlations = {"pearson": metrics.pearson(values), "spearman": metrics.spearman(values)}
        return {**correlations, "loss": metrics.loss(totals)}

    def baseline(self, samples: Any) -> metrics.Scores:
        labels = np.asarray(samples.labels, np.float64)
        values = np.stack([labels, np.full_like(labels, labels.mean())], axis=1)
        return self.scores({"values": values, "loss": np.sum((labels - labels.mean()) ** 2), "count": len(labels)})

    def show(self, batch: Batch, predictions: Any, tokenizer: Tokenizer) -> str:
        """Return each text with its value and the predicted one."""
        rows = zip(batch["tokens"], batch["labels"], predictions, strict=True)
        return "\n".join(
            f"value {label:.3g}, predicted {guess:.3g}: {tokenizer.decode(tokens.tolist())}"
            for tokens, label, guess in rows
        )

    def answer(self, prediction: Any) -> dict[str, Any]:
        return {"value": float(prediction)}
