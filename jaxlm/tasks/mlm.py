"""Masked language modelling: guess the hidden words from both sides (BERT, arXiv 1810.04805)."""

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from jaxlm.data import embedded, metrics, tokenization
from jaxlm.data.samples import Batch, MaskedSamples
from jaxlm.data.sources import Source
from jaxlm.tasks.base import Task

if TYPE_CHECKING:
    from flax import nnx
    from jax import Array

    from jaxlm.heads import LanguageModel
    from jaxlm.loss import Totals


class Mlm(Task):
    samples = MaskedSamples
    settings = (
        *("data.text_column", "data.mask_fraction", "data.n_maskings"),
        *("model.head_hidden", "model.logit_softcap", "model.z_loss"),
    )
    baseline_name = "guessing by word frequency"
    original_prefixes = ("bert", "mask_lm")
    has_probabilities = True
    packs = True

    def embedded(self) -> Source:
        return embedded.python_reference(self.config.data)

    def build_model(self, rngs: "nnx.Rngs") -> "LanguageModel":
        from jaxlm.heads import LanguageModel

        return LanguageModel(self.config.model, is_causal=False, dtype=self.dtype, rngs=rngs)

    def loss(self, model: "LanguageModel", batch: dict[str, "Array"], key: "Array | None") -> "Totals":
        # Logits only where something is masked: the same loss for a seventh of the work.
        return model.loss(batch["tokens"], batch["labels"], key, batch["positions"], batch.get("segments"))

    def loss_with_logits(self, model: "LanguageModel", batch: dict[str, "Array"]) -> "tuple[Totals, Array]":
        if type(self).loss is not Mlm.loss:  # of a task that is made of this one
            return super().loss_with_logits(model, batch)
        # `loss` makes the logits in chunks and keeps none.
        logits_BMV = model(batch["tokens"], None, batch["positions"])
        return self.totals(logits_BMV, batch["labels"]), logits_BMV

    def totals(self, logits_BMV: "Array", labels_BM: "Array") -> "Totals":
        """Return what `loss` does, of logits."""
        from jaxlm.loss import cross_entropy

        return cross_entropy(logits_BMV, labels_BM)

    def predict(self, model: "LanguageModel", batch: dict[str, "Array"]) -> "Array":
        return model(batch["tokens"], None, batch["positions"]).argmax(axis=-1)

    def scores(self, totals: Any) -> metrics.Scores:
        return {
            "loss": metrics.loss(totals),
            "accuracy": metrics.accuracy(totals),
            "perplexity": metrics.perplexity(totals),
        }

    def baseline(self, samples: Any) -> metrics.Scores:
        return self.scores(metrics.unigram(samples.counted_tokens()))

    def show(self, batch: Batch, predictions: Any, tokenizer: Tokenizer) -> str:
        """Return each text as the model sees it, with the [original] words, and with the predicted, wrong ones *so*."""
        texts = []
        for tokens, positions, labels, guesses in zip(
            batch["tokens"], batch["positions"], batch["labels"], predictions, strict=True
        ):
            pieces = [str(tokenizer.id_to_token(token)) for token in tokens if token != self.config.model.pad_id]
            original, predicted = list(pieces), list(pieces)
            for position, label, guess in sorted(zip(positions, labels, guesses, strict=True)):
                if label >= 0:
                    word, guessed = tokenizer.id_to_token(label), tokenizer.id_to_token(guess)
                    original[position] = f"[{word}]"
                    predicted[position] = f"[{guessed}]" if guess == label else f"*{guessed}*"
            rows = {"masked": pieces, "original": original, "predicted": predicted}
            join = _joined if not tokenization.is_single(tokenizer) else _strung
            texts.append("\n".join(f"{name:>9}: {join(words)}" for name, words in rows.items()))
        return "\n\n".join(texts)


def _strung(pieces: list[str]) -> str:
    """Join characters or bytes, line breaks shown; Ġ and Ċ are the space and the line break of bytes."""
    return "".join(pieces).replace("Ġ", " ").replace("Ċ", "⏎").replace("\n", "⏎")


def _joined(pieces: list[str]) -> str:
    """Join pieces of words without their marks: ## continues a word in WordPiece, Ġ starts one in byte-level BPE."""
    return " ".join(pieces).replace(" ##", "").replace("Ġ", "").replace("Ċ", "")
