"""Tags of words, such as names of people and places (CoNLL-2003, arXiv cs/0306050): scored by whole spans."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from jaxlm.data import embedded, metrics, tags
from jaxlm.data.samples import Batch
from jaxlm.data.sources import Source
from jaxlm.data.tagged import TaggedSamples
from jaxlm.errors import UserError
from jaxlm.tasks.base import Task

if TYPE_CHECKING:
    from flax import nnx
    from jax import Array

    from jaxlm.heads import Classifier
    from jaxlm.loss import Totals


class Tag(Task):
    samples = TaggedSamples
    settings = (
        *("data.text_column", "data.label_column", "data.n_labels", "model.pooling"),
        *("train.label_smoothing", "train.class_weights"),
    )
    baseline_name = "no span, at the loss of the tags' frequencies"
    has_probabilities = True

    @functools.cached_property
    def tags(self) -> tuple[str, ...]:
        """The tag of each class; where classes have no names, O, B and I of a first type, and so on."""
        if not self.has_numbers():
            try:
                list(map(tags.split_tag, self.classes))
            except ValueError as error:
                raise UserError(
                    f"task=tag: {error}; this task finds spans, and has no classes of another kind"
                ) from None
            return self.classes
        return (tags.OUTSIDE, *(f"{'BI'[i % 2]}-{i // 2}" for i in range(len(self.classes) - 1)))

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The types of spans."""
        return tuple(dict.fromkeys(kind for _, kind in map(tags.split_tag, self.tags) if kind))

    @functools.cached_property
    def kind_and_start(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of each class's type, -1 for none, and whether it always starts a span; [C] both."""
        parts = [tags.split_tag(tag) for tag in self.tags]
        kinds = [self.kinds.index(kind) if kind else -1 for _, kind in parts]
        return np.array(kinds, np.int32), np.array([prefix in ("B", "S") for prefix, _ in parts])

    def embedded(self) -> Source:
        return embedded.tagged_sentences()

    def build_model(self, rngs: "nnx.Rngs") -> "Classifier":
        from jaxlm.heads import Classifier

        model = dataclasses.replace(self.config.model, head_outputs="labels")
        return Classifier(model, self.config.data.n_classes, self.dtype, rngs, kind="tagger")

    def loss(self, model: "Classifier", batch: dict[str, "Array"], key: "Array | None") -> "Totals":
        return self.totals(model(batch["tokens"], key, batch["positions"]), batch["labels"], key is not None)

    def totals(self, logits_BNC: "Array", labels_BN: "Array", is_training: bool = False) -> "Totals":
        """Return what `loss` does, of logits; `spans` [K, 3] are by type how many are right, predicted, and labelled.

        Spans are read as seqeval does by default, and right if type, begin and end are.
        """
        import jax
        import jax.numpy as jnp

        from jaxlm.loss import cross_entropy

        is_word_BN = labels_BN >= 0
        kind_C, start_C = map(jnp.asarray, self.kind_and_start)

        def marks(tags_BN: "Array") -> "tuple[Array, Array, Array]":
            """Return type, whether a span starts, and where the span that starts ends."""
            kind_BN = jnp.where(is_word_BN, kind_C[tags_BN], -1)
            before_BN = jnp.pad(kind_BN[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
            starts_BN = (kind_BN >= 0) & (start_C[tags_BN] | (kind_BN != before_BN))
            goes_on_BN = jnp.pad((kind_BN >= 0) & ~starts_BN, ((0, 0), (0, 1)))[:, 1:]
            n = kind_BN.shape[1]
            ends_BN = jax.lax.cummin(jnp.where(goes_on_BN, n, jnp.arange(n)), axis=1, reverse=True)
            return kind_BN, starts_BN, ends_BN

        labelled, predicted = marks(jnp.maximum(labels_BN, 0)), marks(logits_BNC.argmax(axis=-1))
        right_BN = labelled[1] & predicted[1] & (labelled[0] == predicted[0]) & (labelled[2] == predicted[2])
        K = len(self.kinds)
        of_kind = [
            jnp.sum(jax.nn.one_hot(kind_BN, K, dtype=jnp.int32) * is_BN[..., None], axis=(0, 1))
            for kind_BN, is_BN in ((labelled[0], right_BN), predicted[:2], labelled[:2])
        ]
        totals = cross_entropy(logits_BNC, labels_BN, **self.config.train.label_rule(is_training))
        return totals | {"spans": jnp.stack(of_kind, axis=1)}

    def predict(self, model: "Classifier", batch: dict[str, "Array"]) -> "Array":
        return model(batch["tokens"], None, batch["positions"]).argmax(axis=-1)

    def scores(self, totals: Any) -> metrics.Scores:
        scores = metrics.of_marks(self.kinds, totals["spans"])
        return scores | {"accuracy": metrics.accuracy(totals), "loss": metrics.loss(totals)}

    def baseline(self, samples: Any) -> metrics.Scores:
        labels = samples.split.labels[samples.words]
        totals = metrics.unigram(np.bincount(labels, minlength=len(self.classes)))
        return self.scores({**totals, "spans": np.zeros((len(self.kinds), 3))})

    def show(self, batch: Batch, predictions: Any, tokenizer: Tokenizer) -> str:
        """Return each text with its spans and the predicted ones, where they differ marked."""
        lines = []
        for tokens, positions, labels, guesses in zip(
            batch["tokens"], batch["positions"], batch["labels"], predictions, strict=True
        ):
            n = int(np.sum(labels >= 0))
            ends = [*positions[1:n], len(tokens)]
            spans = [tags.spans([self.tags[i] for i in numbers[:n]]) for numbers in (labels, guesses)]
            texts = {
                (a, b): tokenizer.decode(tokens[positions[a] : ends[b - 1]].tolist()) for _, a, b in sum(spans, [])
            }
            labelled, predicted = ("; ".join(f"{kind} {texts[a, b]}" for kind, a, b in some) for some in spans)
            mark = " " if labelled == predicted else "*"
            lines.append(f"{mark} {tokenizer.decode(tokens.tolist())}")
            lines += [f"    labelled: {labelled or 'none'}", f"    predicted: {predicted or 'none'}"]
        return "\n".join(lines)
