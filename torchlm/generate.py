"""Continue a prompt with the likeliest tokens."""

import torch
from torch import Tensor

from torchlm.heads import LanguageModel


def continue_greedily(model: LanguageModel, prompt_BT: Tensor, n_new: int) -> Tensor:
    """Return [B, n_new] token ids that continue the prompts, each the likeliest after what comes before.

    Each step runs the whole text so far, so keep n_new small.
    """
    B, T = prompt_BT.shape
    tokens_BT = prompt_BT

    for i in range(T, T + n_new):
        logits_BMV = model(tokens_BT, positions_BM=torch.full((B, 1), i - 1, device=tokens_BT.device))
        tokens_BT = torch.cat([tokens_BT, logits_BMV[:, 0].argmax(dim=-1)[:, None]], dim=1)

    return tokens_BT[:, T:]
