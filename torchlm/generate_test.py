"""Continuations are what the model finds likeliest, token by token."""

import torch

from jaxlm.config import ModelConfig
from torchlm.generate import continue_greedily
from torchlm.heads import LanguageModel


@torch.no_grad()
def test_each_new_token_is_the_likeliest_after_those_before() -> None:
    config = ModelConfig(vocab_size=11, d_model=12, n_layers=2, n_heads=3, seq_len=9, dropout=0.0, pad_id=-1)
    model = LanguageModel(config, True, torch.float32, torch.Generator().manual_seed(0))
    model.head.linear.weight *= 50
    prompt = torch.tensor([[3, 1, 10], [7, 0, 2]])
    new = continue_greedily(model, prompt, 6)
    assert new.shape == (2, 6)
    tokens = torch.cat([prompt, new], dim=1)
    assert torch.equal(model(tokens)[:, 2:-1].argmax(dim=-1), new)
    assert len(set(new.flatten().tolist())) > 2
    mixed = continue_greedily(model, torch.tensor([[3, 1, 10], [7, 9, 9]]), 6, torch.tensor([3, 1]))
    assert torch.equal(mixed[0], new[0])
    assert torch.equal(mixed[1:], continue_greedily(model, prompt[1:, :1], 6))
