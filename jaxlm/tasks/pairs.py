"""Prompts with their answers: a gpt that is tuned to answer, by the loss of the answers alone."""

from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from jaxlm.data import embedded, metrics
from jaxlm.data.samples import Batch, PairSamples
from jaxlm.data.sources import Source
from jaxlm.tasks.gpt import Gpt

if TYPE_CHECKING:
    from jax import Array

    from jaxlm.heads import LanguageModel

MOST_SHOWN = 48  # tokens of a shown answer


class Pairs(Gpt):
    samples = PairSamples
    settings = ("data.prompt_column", "data.answer_column", "model.logit_softcap", "model.z_loss")

    def embedded(self) -> Source:
        return embedded.sentences("pairs")

    def predict(self, model: "LanguageModel", batch: dict[str, "Array"]) -> "Array":
        """Return an answer to each prompt; the true one behind it is what a causal model does not see."""
        from jaxlm.generate import continue_greedily

        n_new = min(MOST_SHOWN, self.config.model.seq_len // 2)
        tokens_BT = batch["tokens"][:, : self.config.model.seq_len - n_new]
        n_prompt_B = (batch["labels"] >= 0).argmax(axis=1) + 1
        return continue_greedily(model, tokens_BT, n_new, n_prompt_B.clip(max=tokens_BT.shape[1]))

    def scores(self, totals: Any) -> metrics.Scores:
        return {
            "loss": metrics.loss(totals),
            "accuracy": metrics.accuracy(totals),
            "perplexity": metrics.perplexity(totals),
        }

    def show(self, batch: Batch, predictions: Any, tokenizer: Tokenizer) -> str:
        """Return each prompt with the model's answer and the true one."""
        texts = []
        for tokens, labels, guesses in zip(batch["tokens"], batch["labels"], predictions, strict=True):
            n_prompt = int(np.argmax(labels >= 0)) + 1
            if n_prompt + len(guesses) > len(tokens):  # it has no room for an answer
                continue
            article, guesses = tokens[0], np.asarray(guesses)
            n_made = int(np.argmax(guesses == article)) if article in guesses else len(guesses)
            more = "" if article in guesses else " ..."
            true = labels[(labels >= 0) & (labels != article)]
            rows = {"prompt": tokens[1:n_prompt], "answered": guesses[:n_made], "true": true}
            told = {name: tokenizer.decode(ids.tolist()).strip() for name, ids in rows.items()}
            told["answered"] += more
            texts.append("\n".join(f"{name:>8}: {' '.join(text.split())}" for name, text in told.items()))
        return "\n\n".join(texts)
