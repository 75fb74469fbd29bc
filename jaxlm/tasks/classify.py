"""Classification of a text, or of two with data.pair_column, into any number of classes."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from jaxlm.data import metrics
from jaxlm.data.samples import Batch, ClassifiedSamples
from jaxlm.data.sources import Source
from jaxlm.errors import UserError
from jaxlm.tasks.base import Task

if TYPE_CHECKING:
    from flax import nnx
    from jax import Array

    from jaxlm.heads import Classifier
    from jaxlm.loss import Totals


class Classify(Task):
    samples: ClassVar[type[Any]] = ClassifiedSamples
    settings: ClassVar[tuple[str, ...]] = (
        *("data.text_column", "data.pair_column", "data.label_column", "data.n_labels"),
        *("model.head_outputs", "model.pooling", "model.classifier_bias"),
        *("train.label_smoothing", "train.class_weights", "train.sampling"),
    )
    baseline_name = "always the most frequent class"
    scored: ClassVar[tuple[str, ...]] = ("accuracy", "f1")  # of metrics.OF_CLASSES, the most telling first
    original_prefixes = ("bert", "classifier_model")
    has_probabilities = True
    packs = True

    def embedded(self) -> Source:
        mend = "give a file or folder with --data.path, or a data set of the hub with --data.hub"
        raise UserError(f"data.path is empty, but task={self.config.task} has no text of its own; {mend}")

    def build_model(self, rngs: "nnx.Rngs") -> "Classifier":
        from jaxlm.heads import Classifier

        return Classifier(self.config.model, self.config.data.n_classes, self.dtype, rngs)

    def loss(self, model: "Classifier", batch: dict[str, "Array"], key: "Array | None") -> "Totals":
        return self.totals(self.logits(model, batch, key), batch["labels"], key is not None)

    def logits(self, model: Any, batch: dict[str, Any], key: Any = None) -> Any:
        """Return the logits of each text, or pair of texts, of a batch."""
        positions = batch.get("positions", batch.get("last"))
        return model(batch["tokens"], key, positions, False, batch.get("segments"), batch.get("types"))

    def totals(self, logits: "Array", labels: "Array", is_training: bool = False) -> "Totals":
        """Return what `loss` does, of logits [..., C] and labels [...], one for each text."""
        import jax
        import jax.numpy as jnp

        from jaxlm.loss import cross_entropy

        C, logits_BC, labels_B = self.config.data.n_classes, logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        # The original's head has an output for each token of the vocabulary: those are no class.
        predictions_B = jnp.minimum(logits_BC.argmax(axis=-1), C)
        # The row of an ignored label, -1, is zero.
        rows_BC = jax.nn.one_hot(labels_B, C, dtype=jnp.int32)
        columns_BC = jax.nn.one_hot(predictions_B, C + 1, dtype=jnp.int32)
        totals = cross_entropy(logits_BC, labels_B, **self.config.train.label_rule(is_training))
        return totals | {"confusion": rows_BC.T @ columns_BC}

    def predict(self, model: "Classifier", batch: dict[str, "Array"]) -> "Array":
        return self.logits(model, batch).argmax(axis=-1)

    def scores(self, totals: Any) -> metrics.Scores:
        return {**{name: metrics.OF_CLASSES[name](totals) for name in self.scored}, "loss": metrics.loss(totals)}

    def baseline(self, samples: Any) -> metrics.Scores:
        return self.scores(metrics.majority(np.asarray(samples.labels), self.config.data.n_classes))

    def show(self, batch: Batch, predictions: Any, tokenizer: Tokenizer) -> str:
        """Return each sentence with its label and the predicted one, wrong ones marked."""
        lines = []
        for tokens, *pair in zip(batch["tokens"], batch["labels"], predictions, strict=True):
            label, guess = map(self.named, pair)
            mark = " " if guess == label else "*"
            lines.append(f"{mark} label {label}, predicted {guess}: {tokenizer.decode(tokens.tolist())}")
        return "\n".join(lines)

    def named(self, x: Any) -> str:
        return str(self.label(int(x)))

    def warning(self, totals: Any) -> str:
        confusion = np.asarray(totals.get("confusion", np.zeros((1, 2))))
        predicted = confusion.sum(axis=0)
        guess = int(predicted.argmax())
        n_right = confusion[guess, guess] if guess < len(confusion) else 0
        if np.count_nonzero(predicted) != 1 or n_right == predicted[guess]:
            return ""
        name = f"class {self.label(guess)}" if guess < len(self.classes) else "no class"
        return (
            f"the model predicts {name} for every sample, which is right for {n_right / predicted[guess]:.1%} of them"
        )
