"""The transformer against the NumPy version of jaxlm's tests, and what must hold of masks, dropout and start values."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from jaxlm import model_test as jaxlm_test
from jaxlm.config import ModelConfig
from jaxlm.ops.position_tables import frequencies
from jaxlm.params import names
from torchlm import heads
from torchlm import model as models
from torchlm.model import Transformer
from torchlm.ops.dropout import dropout
from torchlm.ops.token_positions import rotate

B, T, D, H, L, V = 2, 5, 12, 3, 2, 11
TOKENS = torch.tensor([[3, 1, 10, 4, 1], [7, 7, 2, 0, 0]])  # id 0 is the pad, where there is one


def config_of(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": H, "seq_len": T, "dropout": 0.0}
    return ModelConfig(**sizes | changes)


def build(is_causal: bool = False, **changes: Any) -> Transformer:
    return Transformer(config_of(**changes), is_causal, torch.Generator().manual_seed(0))


def zeroed(model: Transformer) -> Transformer:
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
    return model


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "learned", "post_norm": True, "pad_id": -1},
        {"positions": "rotary", "final_norm": True},
    ],
)
@torch.no_grad()
def test_outputs_are_those_of_the_reference(is_causal: bool, changes: dict) -> None:
    model = build(is_causal, **changes)
    for x in model.parameters():  # so that none is 0 or 1 and two that are swapped differ
        x += 0.1 * torch.randn(x.shape)
    params = names.to_jax({f"base.{name}": x.numpy() for name, x in model.state_dict().items()})["base"]
    expected = jaxlm_test.reference(params, TOKENS.numpy(), model.config, is_causal)
    # Float32 sums of up to 48 products in two blocks: some ten roundings of 6e-8.
    np.testing.assert_allclose(model(TOKENS), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


# Masks and positions


@pytest.mark.parametrize("is_causal", [False, True])
def test_which_positions_an_output_depends_on(is_causal: bool) -> None:
    model = build(is_causal, positions="learned", pad_id=-1)
    weights_D = torch.randn(D, generator=torch.Generator().manual_seed(0))
    # Positions are added to embeddings, so this is the gradient with respect to what goes into the blocks, [T, D].
    outputs = model(TOKENS[:1])[0] @ weights_D
    gradients = [torch.autograd.grad(x, model.embedding.position, retain_graph=True)[0] for x in outputs]
    depends = torch.stack(gradients).norm(dim=-1)
    is_future = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert torch.all(depends[~is_future] > 1e-3)
    assert torch.all(depends[is_future] == 0) if is_causal else torch.all(depends[is_future] > 1e-3)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_reaches_so_many_positions_to_either_side(is_causal: bool) -> None:
    model = build(is_causal, n_layers=1, positions="learned", pad_id=-1, window=2, seq_len=8)
    outputs = model(torch.arange(8)[None])[0] @ torch.randn(D, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad(x, model.embedding.position, retain_graph=True)[0] for x in outputs]
    depends = torch.stack(gradients).norm(dim=-1)
    distance = torch.arange(8)[None] - torch.arange(8)[:, None]
    is_near = (distance >= -2) & (distance <= (0 if is_causal else 2))
    assert torch.all(depends[is_near] > 1e-4) and torch.all(depends[~is_near] == 0)


@pytest.mark.parametrize(("positions", "is_causal"), [("fixed", False), ("learned", True), ("rotary", False)])
@torch.no_grad()
def test_each_document_of_a_packed_row_is_as_if_it_was_alone(positions: Any, is_causal: bool) -> None:
    model = build(is_causal, positions=positions)
    packed, first, second = [3, 1, 4, 2, 0], [3, 1, 4, 0, 0], [2, 0, 0, 0, 0]
    rows = torch.tensor([packed, first, second])
    segments = torch.tensor([[1, 1, 1, 2, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    found, alone = model(rows, segments), model(rows)
    torch.testing.assert_close(found[0, :4], torch.cat([alone[1, :3], alone[2, :1]]), rtol=0, atol=1e-5)
    assert found.isfinite().all() and not torch.allclose(found[0, 3], alone[0, 3], atol=1e-2)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_row_of_pads_and_its_gradients_stay_finite(is_causal: bool) -> None:
    model = build(is_causal)
    (model(torch.tensor([[0] * T, [0, 0, 3, 0, 0]])) ** 2).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in model.parameters())


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, H, 8, generator=torch.Generator().manual_seed(0))
    frequency_K = frequencies(ModelConfig(head_dim=8), False)
    q, k = (rotate(x.expand(1, 7, H, 8), frequency_K) for x in (q, k))
    scores = torch.einsum("bthk,bshk->bhts", q, k)[0].numpy()
    for distance in range(-6, 7):
        same = np.diagonal(scores, distance, axis1=1, axis2=2)
        np.testing.assert_allclose(same, same[:, :1].repeat(same.shape[1], 1), rtol=0, atol=1e-5)
    assert np.ptp(scores, axis=2).min() > 0.1


def test_the_pad_row_starts_at_zero_and_gets_no_gradient() -> None:
    model = build(pad_id=4)
    assert torch.all(model.embedding.token.weight[4] == 0)
    (model(TOKENS) ** 2).sum().backward()
    has_gradient = (model.embedding.token.weight.grad != 0).any(dim=1)
    assert set(has_gradient.nonzero().flatten().tolist()) == set(TOKENS.flatten().tolist()) - {4}


# Dropout


def test_dropout_zeroes_its_share_and_scales_up_the_rest() -> None:
    torch.manual_seed(0)
    x = torch.full((100, 200), 2.0)
    dropped = dropout(x, 0.3, True)
    assert set(dropped.unique().tolist()) == {0, float(np.float32(2 / 0.7))}
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.02)  # six standard deviations
    assert torch.equal(dropout(x, 0.3, False), x)


@torch.no_grad()
def test_dropout_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    expected, model = build()(TOKENS), build(dropout=0.3)
    assert torch.equal(model.eval()(TOKENS), expected)
    assert not torch.allclose(model.train()(TOKENS), expected)


@pytest.mark.parametrize("part", ["embedding", "attention", "inside the feed-forward", "after the feed-forward"])
@torch.no_grad()
def test_dropout_falls_where_the_original_has_it(part: str) -> None:
    keep = 0.7
    torch.manual_seed(0)
    model = zeroed(build(n_layers=1, dropout=1 - keep, positions="learned", pad_id=-1))
    (block,) = model.blocks
    if part == "embedding":
        model.embedding.position += 1
        expected = {0: 1 - keep, 1 / keep: keep}
    elif part == "attention":  # with one position, the weight is 1: dropped for a head, then the outputs one by one
        block.attention.value.bias += 1
        block.attention.output.weight += torch.eye(D)
        expected = {0: 1 - keep**2, 1 / keep**2: keep**2}
    elif part == "inside the feed-forward":
        block.feed_forward.fc1.bias += 1
        block.feed_forward.fc2.weight += torch.eye(D, 4 * D)
        gelu = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
        expected = {0: 1 - keep, gelu / keep: keep}
    else:
        block.feed_forward.fc2.bias += 1
        expected = {1: 1.0}
    x = model(torch.zeros(2000, 1, dtype=torch.long)).numpy()
    for value, share in expected.items():
        assert np.mean(np.isclose(x, value)) == pytest.approx(share, abs=0.03 if share < 1 else 0)
    if part == "attention":
        heads = x.reshape(-1, H, D // H)
        assert np.mean(np.all(heads == 0, axis=-1)) == pytest.approx(1 - keep, abs=0.03)


# Start values and types


def test_start_values_are_those_of_the_original() -> None:
    model = build(d_model=24, vocab_size=500, seq_len=50, positions="learned")
    for i, block in enumerate(model.blocks):
        others = dict(model.blocks[1 - i].named_parameters())
        for name, x in block.named_parameters():
            if "layernorm" in name:
                assert torch.all(x == (1 if name.endswith("weight") else 0))
                continue
            weight = block.get_submodule(name.rpartition(".")[0]).weight
            bound = math.sqrt(6 / sum(weight.shape)) if x.ndim == 2 else weight.shape[1] ** -0.5
            assert 0.8 * bound < x.abs().max() <= bound
            assert float(x.detach().std()) == pytest.approx(
                bound / math.sqrt(3), rel=0.25
            )  # that of a uniform distribution
            assert not torch.any(x == others[name])  # each layer has its own
    assert float(model.embedding.token.weight[1:].detach().std()) == pytest.approx(1, rel=0.03)
    assert float(model.embedding.position.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_a_tied_table_starts_small() -> None:
    table = build(d_model=24, vocab_size=500, tied_embedding=True).embedding.token.weight
    assert float(table[1:].detach().std()) == pytest.approx(0.02, rel=0.03)


def test_start_values_come_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    a = build().state_dict()
    torch.manual_seed(2)
    b = build().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("positions", ["fixed", "rotary"])
@torch.no_grad()
def test_bfloat16_is_of_products_only(positions: str) -> None:
    config = config_of(positions=positions)
    exact, rounded = (
        heads.LanguageModel(config, True, dtype, torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert {x.dtype for x in rounded.parameters()} == {torch.float32}
    kinds: dict[str, torch.dtype] = {}
    for name, module in rounded.named_modules():
        if name.rpartition(".")[2] in ("query", "fc2", "layernorm2", "base"):
            module.register_forward_hook(lambda _, x, y, name=name: kinds.update({name: y.dtype}))
    outputs, expected = rounded(TOKENS).float(), exact(TOKENS)
    assert kinds.pop("base") == torch.float32
    for name, kind in kinds.items():
        assert kind == (torch.float32 if "layernorm" in name else torch.bfloat16), name
    error = (outputs - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 3e-2  # an input of a product is rounded by up to 4e-3


@torch.no_grad()
def test_weights_of_attention_are_float32_also_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(models, "dropout", lambda x, rate, is_training: seen.append(x) or x)
    heads.LanguageModel(config_of(n_layers=1), True, torch.bfloat16, torch.Generator())(TOKENS)
    weights_BHTT = seen[1]
    assert weights_BHTT.dtype == torch.float32
    torch.testing.assert_close(weights_BHTT.sum(dim=-1), torch.ones(B, H, T), rtol=0, atol=1e-6)
