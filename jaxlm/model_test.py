"""The transformer against an own NumPy version in float64, and what must hold of masks, positions, dropout, starts."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import model as models
from jaxlm.config import ModelConfig
from jaxlm.model import Transformer
from jaxlm.ops.activations import gelu
from jaxlm.ops.position_tables import fixed_positions, frequencies
from jaxlm.ops.stacks import block_of
from jaxlm.ops.token_positions import rotate

B, T, D, H, L, V = 2, 5, 12, 3, 2, 11
TOKENS = np.array([[3, 1, 10, 4, 1], [7, 7, 2, 0, 0]])  # id 0 is the pad, where there is one


def build(is_causal: bool = False, dtype: Any = jnp.float32, **changes: Any) -> tuple[Any, dict]:
    """Return the graph definition of a tiny transformer, and its parameters."""
    sizes = {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": H, "seq_len": T, "dropout": 0.0}
    config = ModelConfig(**sizes | changes)
    graphdef, params = nnx.split(Transformer(config, is_causal, dtype, nnx.Rngs(0)), nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef: Any, params: dict, tokens: Any, key: Any = None, segments: Any = None) -> jax.Array:
    return nnx.merge(graphdef, params)(tokens, key, segments)


@functools.partial(jax.jit, static_argnums=0)
def square_and_gradients(graphdef: Any, params: dict, tokens: Any) -> tuple[jax.Array, dict]:
    """Return the sum of squared outputs, and its gradients."""
    return jax.value_and_grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(tokens) ** 2))(params)


def noisy(params: dict) -> dict:
    """Return the parameters with noise on each, so that none is 0 or 1 and two that are swapped differ."""
    leaves, treedef = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    return treedef.unflatten([np.float32(x + 0.1 * random.normal(size=x.shape)) for x in leaves])


# The transformer of the original, once more, in plain NumPy


def reference(params: dict, tokens: np.ndarray, config: ModelConfig, is_causal: bool) -> np.ndarray:
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    embedding = params["embedding"]
    x = embedding["token"]["embedding"][tokens]
    if config.positions == "fixed":
        x = x + np.array([[reference_position(t, i, D) for i in range(D)] for t in range(T)])
    if config.positions == "learned":
        x = x + embedding["position"]
    for layer in range(config.n_layers):
        block = jax.tree.map(lambda x, layer=layer: x[layer], params["blocks"])
        norm1, norm2 = (functools.partial(reference_norm, block[name]) for name in ("layernorm1", "layernorm2"))
        attend = functools.partial(reference_attention, block["attention"], tokens, config, is_causal)
        feed = functools.partial(reference_feed_forward, block["feed_forward"])
        if config.post_norm:
            x = norm1(x + attend(x))
            x = norm2(x + feed(x))
        else:
            x = x + attend(norm1(x))
            x = x + feed(norm2(x))
    return reference_norm(params["final_norm"], x) if config.final_norm else x


def reference_position(position: int, column: int, d_model: int) -> float:
    """Return an entry of the fixed table: columns i (even) and i + 1 as the original's page has them."""
    i = column if column % 2 == 0 else column - 1
    if column % 2 == 0:
        return math.sin(position / 10000 ** (2 * i / d_model))
    return math.cos(position / 10000 ** (2 * (i + 1) / d_model))


def reference_norm(params: dict, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def reference_linear(params: dict, x: np.ndarray) -> np.ndarray:
    return x @ params["kernel"] + params["bias"]


def reference_attention(
    params: dict, tokens: np.ndarray, config: ModelConfig, is_causal: bool, x: np.ndarray
) -> np.ndarray:
    q, k, v = (reference_linear(params[name], x) for name in ("query", "key", "value"))
    size = D // H
    result = np.zeros_like(x)
    for b in range(len(x)):
        for h in range(H):
            own = slice(h * size, (h + 1) * size)
            for t in range(T):
                scores = np.empty(T)
                for s in range(T):
                    a, c = q[b, t, own], k[b, s, own]
                    if config.positions == "rotary":
                        a, c = reference_rotation(a, t), reference_rotation(c, s)
                    scores[s] = a @ c / math.sqrt(size)
                    if tokens[b, s] == config.pad_id:
                        scores[s] = -1e9
                    if is_causal and s > t:
                        scores[s] = -np.inf
                weights = np.exp(scores - scores.max())
                result[b, t, own] = weights / weights.sum() @ v[b, :, own]
    return reference_linear(params["output"], result)


def reference_rotation(x: np.ndarray, position: int) -> np.ndarray:
    """Return `x` with elements (k, k + K/2) as a complex number, turned by its angle."""
    half = len(x) // 2
    pairs = x[:half] + 1j * x[half:]
    turned = [pair * np.exp(1j * position * 10000 ** (-2 * k / len(x))) for k, pair in enumerate(pairs)]
    return np.concatenate([np.real(turned), np.imag(turned)])


def reference_feed_forward(params: dict, x: np.ndarray) -> np.ndarray:
    x = reference_linear(params["fc1"], x)
    x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return reference_linear(params["fc2"], x)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": "learned", "post_norm": True, "pad_id": -1},
        {"positions": "rotary", "final_norm": True},
    ],
)
def test_outputs_are_those_of_the_reference(is_causal: bool, changes: dict) -> None:
    graphdef, params = build(is_causal, **changes)
    params = noisy(params)
    config = ModelConfig(d_model=D, n_layers=L, n_heads=H, seq_len=T, vocab_size=V, **changes)
    expected = reference(params, TOKENS, config, is_causal)
    # Float32 sums of up to 48 products in two blocks: some ten roundings of 6e-8.
    np.testing.assert_allclose(run(graphdef, params, TOKENS), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


# Masks and positions


@pytest.mark.parametrize("is_causal", [False, True])
def test_which_positions_an_output_depends_on(is_causal: bool) -> None:
    graphdef, params = build(is_causal, positions="learned", pad_id=-1)
    weights_D = np.random.default_rng(0).normal(size=D)

    def outputs(table_TD: jax.Array) -> jax.Array:
        embedding = params["embedding"] | {"position": table_TD}
        return nnx.merge(graphdef, params | {"embedding": embedding})(TOKENS[:1])[0] @ weights_D

    # Positions are added to embeddings, so this is the gradient with respect to what goes into the blocks, [T, T, D].
    gradients = np.asarray(jax.jit(jax.jacrev(outputs))(params["embedding"]["position"]))
    depends = np.linalg.norm(gradients, axis=-1)
    is_future = np.triu(np.ones((T, T), bool), k=1)
    assert np.all(depends[~is_future] > 1e-3)
    assert np.all(depends[is_future] == 0) if is_causal else np.all(depends[is_future] > 1e-3)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seq_len", [8, 5])  # in blocks, and with all pairs of positions
def test_a_window_reaches_so_many_positions_to_either_side(seq_len: int, is_causal: bool) -> None:
    graphdef, params = build(is_causal, n_layers=1, positions="learned", pad_id=-1, window=2, seq_len=seq_len)
    tokens, weights_D = np.arange(seq_len)[None], np.random.default_rng(0).normal(size=D)

    def outputs(table_TD: jax.Array) -> jax.Array:
        embedding = params["embedding"] | {"position": table_TD}
        return nnx.merge(graphdef, params | {"embedding": embedding})(tokens)[0] @ weights_D

    depends = np.linalg.norm(jax.jit(jax.jacrev(outputs))(params["embedding"]["position"]), axis=-1)
    distance = np.arange(seq_len)[None] - np.arange(seq_len)[:, None]
    is_near = (distance >= -2) & (distance <= (0 if is_causal else 2))
    assert np.all(depends[is_near] > 1e-4) and np.all(depends[~is_near] == 0)


def test_layers_are_global_and_local_in_turn() -> None:
    def windows(**settings: Any) -> list[int]:
        config = ModelConfig(n_layers=7, **settings)
        return [config.window_of(i) for i in range(7)]

    assert windows() == [0] * 7 and windows(window=4) == [4] * 7
    assert windows(window=4, global_every=3) == [0, 4, 4, 0, 4, 4, 0]  # ModernBERT
    assert windows(window=4, global_every=3, global_first=False) == [4, 4, 0, 4, 4, 0, 4]  # UltraBERT


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("settings", [{"n_layers": 7}, {"n_layers": 6, "first_norm": False}, {"n_layers": 5}])
def test_a_scan_over_groups_is_a_loop_over_blocks(settings: dict[str, Any], remat: Any) -> None:
    settings = settings | {"window": 1, "global_every": 3, "positions": "rotary", "rotary_base_local": 9.0}
    graphdef, params = build(**settings, remat=remat)
    params = noisy(params)
    model = nnx.merge(graphdef, params)
    found, (_, gradients) = run(graphdef, params, TOKENS), square_and_gradients(graphdef, params, TOKENS)
    x_BTD, places = model.embedding(TOKENS, None), models.Places(TOKENS == 0)
    for i in range(model.config.n_layers):
        x_BTD = block_of(model.config, model.blocks, i)(x_BTD, places, i, None)
    np.testing.assert_allclose(found, x_BTD, rtol=0, atol=2e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients["blocks"]["feed_forward"]))
    assert len(params["blocks"]["layernorm1"]["scale"]) == model.config.n_layers - (not model.config.first_norm)


@pytest.mark.parametrize(("positions", "is_causal"), [("fixed", False), ("learned", True), ("rotary", False)])
def test_each_document_of_a_packed_row_is_as_if_it_was_alone(positions: Any, is_causal: bool) -> None:
    graphdef, params = build(is_causal, positions=positions)
    packed, first, second = [3, 1, 4, 2, 0], [3, 1, 4, 0, 0], [2, 0, 0, 0, 0]
    rows, segments = np.array([packed, first, second]), np.array([[1, 1, 1, 2, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    found, alone = run(graphdef, params, rows, None, segments), run(graphdef, params, rows)
    np.testing.assert_allclose(found[0, :4], np.concatenate([alone[1, :3], alone[2, :1]]), rtol=0, atol=1e-5)
    assert np.isfinite(found).all() and not np.allclose(found[0, 3], alone[0, 3], atol=1e-2)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_row_of_pads_and_its_gradients_stay_finite(is_causal: bool) -> None:
    graphdef, params = build(is_causal)
    tokens = np.array([[0] * T, [0, 0, 3, 0, 0]])
    value, gradients = square_and_gradients(graphdef, params, tokens)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


def test_fixed_positions_follow_the_formula_of_the_original() -> None:
    expected = [[reference_position(position, column, 10) for column in range(10)] for position in range(50)]
    table = fixed_positions(50, 10)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=0, atol=6e-8)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 1, 1, H, 8)).astype(np.float32)
    frequency_K = frequencies(ModelConfig(head_dim=8), False)
    q, k = (np.asarray(rotate(jnp.broadcast_to(x, (1, 7, H, 8)), frequency_K)) for x in (q, k))
    scores = np.einsum("bthk,bshk->bhts", q, k)[0]
    for distance in range(-6, 7):
        same = np.diagonal(scores, distance, axis1=1, axis2=2)
        np.testing.assert_allclose(same, same[:, :1].repeat(same.shape[1], 1), rtol=0, atol=1e-5)
    assert np.ptp(scores, axis=2).min() > 0.1


def test_the_pad_row_starts_at_zero_and_gets_no_gradient() -> None:
    graphdef, params = build(pad_id=4)
    assert np.all(params["embedding"]["token"]["embedding"][4] == 0)
    _, gradients = square_and_gradients(graphdef, params, TOKENS)
    has_gradient = np.any(np.asarray(gradients["embedding"]["token"]["embedding"]) != 0, axis=1)
    assert set(np.flatnonzero(has_gradient)) == set(TOKENS.flat) - {4}


# Dropout


def test_dropout_is_off_without_a_key() -> None:
    graphdef, params = build()
    with_dropout, _ = build(dropout=0.3)
    np.testing.assert_array_equal(run(with_dropout, params, TOKENS), run(graphdef, params, TOKENS))
    assert not np.allclose(run(with_dropout, params, TOKENS, jax.random.key(0)), run(graphdef, params, TOKENS))


@pytest.mark.parametrize("part", ["embedding", "attention", "inside the feed-forward", "after the feed-forward"])
def test_dropout_falls_where_the_original_has_it(part: str) -> None:
    keep = 0.7
    graphdef, params = build(n_layers=1, dropout=1 - keep, positions="learned", pad_id=-1)
    params = jax.tree.map(np.zeros_like, params)
    block = params["blocks"]
    if part == "embedding":
        params["embedding"]["position"] += 1
        expected = {0: 1 - keep, 1 / keep: keep}
    elif part == "attention":  # with one position, the weight is 1: dropped for a head, then the outputs one by one
        block["attention"]["value"]["bias"] += 1
        block["attention"]["output"]["kernel"] += np.eye(D)[None]
        expected = {0: 1 - keep**2, 1 / keep**2: keep**2}
    elif part == "inside the feed-forward":
        block["feed_forward"]["fc1"]["bias"] += 1
        block["feed_forward"]["fc2"]["kernel"] += np.eye(4 * D, D)[None]
        gelu_of_1 = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
        expected = {0: 1 - keep, gelu_of_1 / keep: keep}
    else:
        block["feed_forward"]["fc2"]["bias"] += 1
        expected = {1: 1.0}
    x = np.asarray(run(graphdef, params, np.zeros((2000, 1), int), jax.random.key(0)))
    for value, share in expected.items():
        assert np.mean(np.isclose(x, value)) == pytest.approx(share, abs=0.03 if share < 1 else 0)
    if part == "attention":
        heads = x.reshape(-1, H, D // H)
        assert np.mean(np.all(heads == 0, axis=-1)) == pytest.approx(1 - keep, abs=0.03)


def test_each_layer_drops_others() -> None:
    keep = 0.7
    graphdef, params = build(dropout=1 - keep, positions="learned", pad_id=-1)
    params = jax.tree.map(np.zeros_like, params)
    params["blocks"]["attention"]["output"]["bias"] += 1  # so that each of two layers adds its mask
    x = np.asarray(run(graphdef, params, np.zeros((2000, 1), int), jax.random.key(0))) * keep
    for n_kept, share in enumerate([(1 - keep) ** 2, 2 * keep * (1 - keep), keep**2]):
        assert np.mean(np.isclose(x, n_kept)) == pytest.approx(share, abs=0.03)


# Start values and types


def test_start_values_are_those_of_the_original() -> None:
    _, params = build(d_model=24, vocab_size=500, seq_len=50, positions="learned")
    blocks = params["blocks"]
    linears = [blocks["attention"][name] for name in ("query", "key", "value", "output")]
    linears += [blocks["feed_forward"][name] for name in ("fc1", "fc2")]
    for linear in linears:
        _, n_in, n_out = linear["kernel"].shape
        for value, bound in ((linear["kernel"], math.sqrt(6 / (n_in + n_out))), (linear["bias"], 1 / math.sqrt(n_in))):
            value = np.asarray(value)
            assert 0.8 * bound < np.abs(value).max() <= bound
            assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)  # that of a uniform distribution
            assert not np.any(value[0] == value[1])  # each layer has its own
    for name in ("layernorm1", "layernorm2"):
        assert np.all(blocks[name]["scale"] == 1) and np.all(blocks[name]["bias"] == 0)
    assert np.std(params["embedding"]["token"]["embedding"][1:]) == pytest.approx(1, rel=0.03)
    assert np.std(params["embedding"]["position"]) == pytest.approx(0.02, rel=0.1)


def test_a_tied_table_starts_small() -> None:
    _, params = build(d_model=24, vocab_size=500, tied_embedding=True)
    assert np.std(params["embedding"]["token"]["embedding"][1:]) == pytest.approx(0.02, rel=0.03)


def test_bfloat16_is_of_products_only() -> None:
    exact, params = build()
    rounded, params_16 = build(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params_16)} == {jnp.dtype(jnp.float32)}
    outputs, expected = run(rounded, params, TOKENS), run(exact, params, TOKENS)
    assert outputs.dtype == jnp.float32
    error = np.abs(outputs - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 2e-2  # an input of a product is rounded by up to 4e-3


def test_queries_and_keys_are_not_rounded_between_norm_and_rotation() -> None:
    settings = {"dtype": jnp.bfloat16, "qk_norm": True, "positions": "rotary"}
    with_scale, params = build(norm="rmsnorm", **settings)
    without, _ = build(norm="rmsnorm_no_scale", **settings)
    expected = run(with_scale, params, TOKENS)  # its scale of ones is float32, and so is what it scales
    params = {name: x for name, x in params.items() if name != "final_norm"}
    blocks = {name: x for name, x in params["blocks"].items() if "norm" not in name}
    attention = {name: x for name, x in blocks["attention"].items() if "norm" not in name}
    found = run(without, params | {"blocks": blocks | {"attention": attention}}, TOKENS)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["exact", "tanh"])
def test_gelu_of_bfloat16_is_rounded_once(kind: str) -> None:
    x = jnp.linspace(-6, 6, 999).astype(jnp.bfloat16)
    for function in (lambda x: gelu(x, kind), jax.grad(lambda x: jnp.sum(gelu(x, kind)).astype(jnp.float32))):
        expected = function(x.astype(jnp.float32)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(function(x), expected)


def test_rematerialization_takes_less_memory_also_where_blocks_are_unrolled() -> None:
    def bytes_of(remat: Any) -> int:
        graphdef, params = build(n_layers=6, d_model=24, seq_len=64, remat=remat)
        tokens = np.ones((16, 64), int)
        return square_and_gradients.lower(graphdef, params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of("full") < bytes_of("dots") < 0.7 * bytes_of("none")
