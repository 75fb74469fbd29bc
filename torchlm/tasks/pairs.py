"""Prompts with their answers: a gpt that is tuned to answer, by the loss of the answers alone."""

from torch import Tensor

from jaxlm.tasks import pairs
from jaxlm.tasks.pairs import MOST_SHOWN
from torchlm.generate import continue_greedily
from torchlm.heads import LanguageModel
from torchlm.tasks.gpt import Gpt


class Pairs(Gpt, pairs.Pairs):
    def predict(self, model: LanguageModel, batch: dict[str, Tensor]) -> Tensor:
        """Return an answer to each prompt; the true one behind it is what a causal model does not see."""
        n_new = min(MOST_SHOWN, self.config.model.seq_len // 2)
        tokens_BT = batch["tokens"][:, : self.config.model.seq_len - n_new]
        n_prompt_B = (batch["labels"] >= 0).long().argmax(dim=1) + 1
        return continue_greedily(model, tokens_BT, n_new, n_prompt_B.clamp(max=tokens_BT.shape[1]))
