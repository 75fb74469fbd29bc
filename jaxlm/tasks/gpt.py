"""Causal language modelling: guess the next word (GPT-2)."""

from typing import TYPE_CHECKING, Any, ClassVar

from tokenizers import Tokenizer

from jaxlm.data import embedded, metrics
from jaxlm.data.samples import Batch, CausalSamples
from jaxlm.data.sources import Source
from jaxlm.tasks.base import Task

if TYPE_CHECKING:
    from flax import nnx
    from jax import Array

    from jaxlm.heads import LanguageModel
    from jaxlm.loss import Totals

N_SHOWN = 24  # tokens of a shown continuation


class Gpt(Task):
    samples: ClassVar[type[Any]] = CausalSamples
    settings: ClassVar[tuple[str, ...]] = ("data.text_column", "model.logit_softcap", "model.z_loss")
    baseline_name = "guessing by word frequency"
    original_prefixes = ("gpt", "gen_lm")
    has_probabilities = True
    packs = True

    def embedded(self) -> Source:
        return embedded.python_reference(self.config.data)

    def build_model(self, rngs: "nnx.Rngs") -> "LanguageModel":
        from jaxlm.heads import LanguageModel

        return LanguageModel(self.config.model, is_causal=True, dtype=self.dtype, rngs=rngs)

    def loss(self, model: "LanguageModel", batch: dict[str, "Array"], key: "Array | None") -> "Totals":
        return model.loss(batch["tokens"], batch["labels"], key, None, batch.get("segments"))

    def loss_with_logits(self, model: "LanguageModel", batch: dict[str, "Array"]) -> "tuple[Totals, Array]":
        if type(self).loss is not Gpt.loss:  # of a task that is made of this one
            return super().loss_with_logits(model, batch)
        from jaxlm.loss import cross_entropy

        logits_BTV = model(batch["tokens"])
        return cross_entropy(logits_BTV, batch["labels"]), logits_BTV

    def predict(self, model: "LanguageModel", batch: dict[str, "Array"]) -> "Array":
        from jaxlm.generate import continue_greedily

        n_prompt, n_new = self._shown()
        return continue_greedily(model, batch["tokens"][:, :n_prompt], n_new)

    def scores(self, totals: Any) -> metrics.Scores:
        scores = {"loss": metrics.loss(totals), "perplexity": metrics.perplexity(totals)}
        return scores | ({"bits_per_byte": metrics.bits_per_byte(totals)} if "bytes" in totals else {})

    def baseline(self, samples: Any) -> metrics.Scores:
        return self.scores({**metrics.unigram(samples.counted_tokens()), **samples.constants})

    def show(self, batch: Batch, predictions: Any, tokenizer: Tokenizer) -> str:
        """Return each prompt with the model's continuation and the original one."""
        texts = []
        n_prompt, n_new = self._shown()
        for tokens, labels, guesses in zip(batch["tokens"], batch["labels"], predictions, strict=True):
            if labels[n_prompt - 1] < 0:  # the article is shorter than a prompt
                continue
            original = [label for label in labels[n_prompt - 1 : n_prompt - 1 + n_new] if label >= 0]
            rows = {"prompt": tokens[:n_prompt], "continued": guesses, "original": original}
            texts.append("\n".join(f"{name:>9}: {_line(ids, tokenizer)}" for name, ids in rows.items()))
        return "\n\n".join(texts)

    def _shown(self) -> tuple[int, int]:
        """Return how many tokens a shown prompt and its continuation have."""
        n_new = min(N_SHOWN, self.config.model.seq_len // 2)
        return min(self.config.model.seq_len // 2, 2 * N_SHOWN), n_new


def _line(ids: Any, tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.decode([int(token) for token in ids], skip_special_tokens=False).split())
