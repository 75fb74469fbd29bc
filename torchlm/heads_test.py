"""The output layers: which positions and outputs there are, tying, and start values."""

from typing import Any

import pytest
import torch

from jaxlm.config import ModelConfig
from torchlm.heads import Classifier, LanguageModel

B, T, D, H, L, V, C = 2, 5, 12, 3, 2, 11, 3
TOKENS = torch.tensor([[3, 1, 10, 4, 1], [7, 7, 2, 0, 0]])
F32 = torch.float32


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": H, "seq_len": T, "dropout": 0.0}
    return ModelConfig(**sizes | changes)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def test_logits_at_some_positions_are_those_of_all_positions() -> None:
    model = LanguageModel(config_of(), False, F32, seeded())
    positions_BM = torch.tensor([[4, 0], [1, 1]])
    logits_BTV, logits_BMV = model(TOKENS), model(TOKENS, None, positions_BM)
    for b, positions in enumerate(positions_BM):
        torch.testing.assert_close(logits_BMV[b], logits_BTV[b, positions], rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_tied_output_layer_is_the_token_table(is_causal: bool) -> None:
    model = LanguageModel(config_of(tied_embedding=True), is_causal, F32, seeded())
    with torch.no_grad():
        model.head.bias += torch.arange(V)
    hidden_BTD, table_VD = model.base(TOKENS), model.base.embedding.token.weight
    if not is_causal:
        hidden_BTD = model.head.layernorm(hidden_BTD)
    torch.testing.assert_close(model(TOKENS), hidden_BTD @ table_VD.T + torch.arange(V), rtol=1e-5, atol=1e-5)
    model(TOKENS)[0, 0, 9].backward()  # id 9 is no input, so its row has a gradient as an output only
    assert table_VD.grad[9].norm() > 0.1


def test_only_mlm_has_a_layernorm_before_the_output() -> None:
    names = [{name for name, _ in LanguageModel(config_of(), x, F32, seeded()).head.named_parameters()} for x in (0, 1)]
    assert names[0] == {"layernorm.weight", "layernorm.bias", "linear.weight", "linear.bias"}
    assert names[1] == {"linear.weight", "linear.bias"}


@torch.no_grad()
def test_a_classifier_reads_the_first_position_only() -> None:
    model = Classifier(config_of(), C, F32, seeded())
    logits_BC = model(TOKENS)
    assert logits_BC.shape == (B, C)
    torch.testing.assert_close(logits_BC, model.head.linear(model.base(TOKENS)[:, 0]), rtol=0, atol=0)
    assert Classifier(config_of(head_outputs="vocabulary"), C, F32, seeded())(TOKENS).shape == (B, V)


@torch.no_grad()
def test_a_causal_classifier_reads_the_last_token_and_nothing_behind_it() -> None:
    model = Classifier(config_of(pooling="last", pad_id=-1), C, F32, seeded())
    last_B, tokens = torch.tensor([4, 2]), TOKENS.clone()
    logits_BC = model(tokens, None, last_B)
    tokens[1, 3:] = torch.tensor([9, 8])
    torch.testing.assert_close(model(tokens, None, last_B), logits_BC, rtol=0, atol=1e-6)
    alone = model.head.linear(model.base(tokens[1:, :3])[:, -1])
    torch.testing.assert_close(logits_BC[1:], alone, rtol=0, atol=1e-6)


def test_start_values_of_the_heads_are_small() -> None:
    model = LanguageModel(config_of(vocab_size=500, d_model=24), True, F32, seeded())
    assert float(model.head.linear.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert torch.all(model.head.linear.bias == 0)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"tied_embedding": True, "initialization": "llama"}, [4]),
        ({"tied_embedding": True, "initialization": "modernbert"}, [1, 1]),  # of a masked model, which has both norms
        ({"tied_embedding": False, "initialization": "llama"}, [1]),
        ({"tied_embedding": True, "initialization": "original"}, [1]),
    ],
)
def test_the_norm_before_a_tied_output_layer_starts_large(settings: dict[str, Any], scales: list[int]) -> None:
    model = LanguageModel(config_of(final_norm=True, norm="rmsnorm", **settings), len(scales) == 1, F32, seeded())
    norms = [model.base.final_norm, *([model.head.layernorm] if len(scales) > 1 else [])]
    assert [x.weight.unique().tolist() for x in norms] == [[scale] for scale in scales]
