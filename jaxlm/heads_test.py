"""Output layers: tied or own, at chosen positions, blind to padding, with the original's start values."""

import functools
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.heads import Classifier, ClassifierHead, LanguageModel
from jaxlm.loss import cross_entropy
from jaxlm.ops import matmul

B, T, D, H, V, C = 2, 5, 12, 3, 11, 4
TOKENS = np.array([[3, 1, 10, 4, 1], [7, 7, 2, 0, 0]])


def config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": V, "d_model": D, "n_layers": 1, "n_heads": H, "seq_len": T, "dropout": 0.0}
    return ModelConfig(**sizes | changes)


def split(model: nnx.Module) -> tuple[Any, dict]:
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef: Any, params: dict, *args: Any) -> jax.Array:
    return nnx.merge(graphdef, params)(*args)


@pytest.mark.parametrize(("is_causal", "positions"), [(False, "fixed"), (True, "rotary")])
def test_padding_changes_neither_logits_nor_loss_of_real_tokens(is_causal: bool, positions: str) -> None:
    graphdef, params = split(LanguageModel(config(positions=positions), is_causal, jnp.float32, nnx.Rngs(0)))
    labels = np.array([[5, 6, 0, 1, 10], [8, -1, 9, -1, -1]])
    padded = run(graphdef, params, TOKENS)
    short = run(graphdef, params, TOKENS[1:, :3])
    np.testing.assert_allclose(padded[1:, :3], short, rtol=0, atol=1e-6)
    totals = [cross_entropy(padded[1:], labels[1:]), cross_entropy(short, labels[1:, :3])]
    assert totals[0]["loss"] == pytest.approx(float(totals[1]["loss"]), rel=1e-6)
    assert totals[0]["count"] == totals[1]["count"] == 2


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_at_chosen_positions_are_those_of_all_positions_there(is_tied: bool) -> None:
    graphdef, params = split(LanguageModel(config(tied_embedding=is_tied), False, jnp.float32, nnx.Rngs(0)))
    positions = np.array([[4, 0, 2], [1, 1, 3]])
    every = np.asarray(run(graphdef, params, TOKENS))
    assert every.shape == (B, T, V)
    chosen = run(graphdef, params, TOKENS, None, positions)
    np.testing.assert_allclose(chosen, every[np.arange(B)[:, None], positions], rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_tied", [False, True])
def test_matrices_padded_as_on_a_gpu_change_no_loss_and_no_gradient(is_tied: bool) -> None:
    graphdef, params = split(LanguageModel(config(tied_embedding=is_tied), True, jnp.float32, nnx.Rngs(0)))

    def loss(params: dict) -> jax.Array:
        return nnx.merge(graphdef, params).loss(TOKENS, TOKENS)["loss"]

    expected = jax.value_and_grad(loss)(params)
    with mock.patch.multiple(matmul, platform=lambda: "gpu", is_one_cpu=lambda: False):
        found = jax.value_and_grad(loss)(params)
        program = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert not re.search(rf"\b{V}\b[^=\n]*= dot_general", program)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_tied_head_has_no_matrix_of_its_own(is_causal: bool) -> None:
    model = LanguageModel(config(tied_embedding=True, final_norm=True), is_causal, jnp.float32, nnx.Rngs(0))
    graphdef, params = split(model)
    assert set(params["head"]) == ({"bias"} if is_causal else {"bias", "layernorm"})
    assert params["head"]["bias"].shape == (V,)
    params["head"]["bias"] = np.arange(V, dtype=np.float32)
    base_graphdef, base = split(model.base)
    x = np.asarray(run(base_graphdef, base, TOKENS), np.float64)
    if not is_causal:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = x @ np.asarray(base["embedding"]["token"]["embedding"]).T + np.arange(V)
    np.testing.assert_allclose(run(graphdef, params, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_the_pad_row_of_a_tied_table_is_trained_as_an_output_only() -> None:
    graphdef, params = split(LanguageModel(config(tied_embedding=True), True, jnp.float32, nnx.Rngs(0)))
    pads = np.zeros((B, T), int)

    @jax.jit
    def gradient(params: dict, labels: Any) -> jax.Array:
        loss = lambda params: cross_entropy(nnx.merge(graphdef, params)(pads), labels)["loss"]  # noqa: E731
        return jax.grad(loss)(params)["base"]["embedding"]["token"]["embedding"]

    # At uniform logits, the gradient of an output row is sum over positions of (1/V - is label) * x.
    table = params["base"]["embedding"]["token"]
    table["embedding"] = np.zeros((V, D), np.float32)
    base_graphdef, base = split(nnx.merge(graphdef, params).base)
    x_D = np.asarray(run(base_graphdef, base, pads)).sum(axis=(0, 1))
    rows = np.asarray(gradient(params, np.full((B, T), 3)))
    np.testing.assert_allclose(rows[0], x_D / V, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows[3], x_D / V - x_D, rtol=1e-4, atol=1e-6)


def test_only_the_head_of_mlm_has_a_layernorm() -> None:
    heads = [split(LanguageModel(config(), is_causal, jnp.float32, nnx.Rngs(0)))[1]["head"] for is_causal in (0, 1)]
    assert [set(head) for head in heads] == [{"layernorm", "linear"}, {"linear"}]


def test_a_classifier_reads_the_first_position_only() -> None:
    head = ClassifierHead(config(), C, jnp.float32, nnx.Rngs(0))
    gradient = jax.grad(lambda x_BTD: jnp.sum(head(x_BTD, None) ** 2))(jnp.ones((B, T, D)))
    assert np.all(gradient[:, 0] != 0) and np.all(gradient[:, 1:] == 0)


@pytest.mark.parametrize("pad_id", [-1, 0])
def test_a_causal_classifier_reads_the_last_token_and_nothing_behind_it(pad_id: int) -> None:
    model = Classifier(config(pooling="last", pad_id=pad_id, n_layers=2), C, jnp.float32, nnx.Rngs(0))
    graphdef, params = split(model)
    last = np.array([4, 2])
    tokens = TOKENS.copy()
    tokens[1, 3:] = 9
    logits = np.asarray(run(graphdef, params, tokens, None, last))
    tokens[1, 3:] = [5, 6]
    np.testing.assert_allclose(run(graphdef, params, tokens, None, last), logits, rtol=0, atol=1e-6)
    for b in range(B):  # each text alone, without what fills it up
        alone = run(graphdef, params, tokens[b : b + 1, : last[b] + 1], None, last[b : b + 1])
        np.testing.assert_allclose(alone[0], logits[b], rtol=0, atol=1e-6)
    for place in range(3):  # it attends to all earlier positions
        other = tokens.copy()
        other[1, place] = 10
        moved = np.asarray(run(graphdef, params, other, None, last)) - logits
        assert np.abs(moved[1]).max() > 1e-4 and np.abs(moved[0]).max() < 1e-6
    with pytest.raises(AssertionError, match="pooling"):
        model(tokens)


@pytest.mark.parametrize(("outputs", "n"), [("labels", C), ("vocabulary", V)])
def test_a_classifier_has_an_output_for_each_label_or_as_a_slip_for_each_token(outputs: str, n: int) -> None:
    graphdef, params = split(Classifier(config(head_outputs=outputs), C, jnp.float32, nnx.Rngs(0)))
    assert run(graphdef, params, TOKENS).shape == (B, n)


def test_start_values_are_those_of_the_original() -> None:
    _, params = split(LanguageModel(config(d_model=24, vocab_size=500), True, jnp.float32, nnx.Rngs(0)))
    linear = params["head"]["linear"]
    assert np.std(linear["kernel"]) == pytest.approx(0.02, rel=0.03)
    assert np.abs(linear["kernel"]).max() > 0.06  # normal, not cut off
    assert np.all(linear["bias"] == 0)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"tied_embedding": True, "initialization": "llama"}, (4, None)),
        ({"tied_embedding": True, "initialization": "modernbert"}, (1, 1)),  # of a masked model, which has both norms
        ({"tied_embedding": False, "initialization": "llama"}, (1, None)),
        ({"tied_embedding": True, "initialization": "original"}, (1, None)),
    ],
)
def test_the_norm_before_a_tied_output_layer_starts_large(settings: dict[str, Any], scales: tuple) -> None:
    model = config(final_norm=True, norm="rmsnorm", **settings)
    _, params = split(LanguageModel(model, scales[1] is None, jnp.float32, nnx.Rngs(0)))
    norms = [params["base"]["final_norm"], params["head"].get("layernorm")]
    assert [x and set(np.asarray(x["scale"]).tolist()) for x in norms] == [x and {x} for x in scales]


def test_a_tied_output_layer_behind_a_norm_without_scale_can_be_built() -> None:
    settings = {"tied_embedding": True, "initialization": "llama", "norm": "rmsnorm_no_scale", "final_norm": True}
    LanguageModel(config(**settings), True, jnp.float32, nnx.Rngs(0))
