"""Continue a prompt with the likeliest tokens."""

import torch
from torch import Tensor

from torchlm.heads import LanguageModel


def continue_greedily(model: LanguageModel, prompt_BT: Tensor, n_new: int, n_B: Tensor | None = None) -> Tensor:
    """Return [B, n_new] token ids that continue the prompts, each the likeliest after what comes before.

    `n_B` is how many tokens of each row are its prompt, by default all; what is behind them is overwritten.
    Each step runs the whole buffer, so keep n_new small.
    """
    B, T = prompt_BT.shape
    n_B = torch.full((B,), T, device=prompt_BT.device) if n_B is None else n_B
    tokens_BT = torch.nn.functional.pad(prompt_BT, (0, n_new))

    for i in range(n_new):
        logits_BMV = model(tokens_BT, positions_BM=(n_B + i - 1)[:, None])
        new_B = logits_BMV[:, 0].argmax(dim=-1)
        tokens_BT[torch.arange(B, device=tokens_BT.device), n_B + i] = new_B

    return tokens_BT.take_along_dim(n_B[:, None] + torch.arange(n_new, device=tokens_BT.device), dim=1)
