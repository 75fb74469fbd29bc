"""Generation with a cache against the whole model, and the choice of tokens against NumPy's sorting."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.heads import LanguageModel
from jaxlm.inference import decode
from jaxlm.inference.decode import Decoder, Sampling

T, V, STOP, NEVER = 40, 11, 3, -1
GREEDY = Sampling([0.0], [0], [1.0], [0])
MODELS: dict[str, dict[str, Any]] = {
    "rotary": {"positions": "rotary", "pad_id": -1},
    "fixed, tied, with pads": {"positions": "fixed", "tied_embedding": True, "pad_id": 0},
    "learned, norm after": {"positions": "learned", "post_norm": True, "pad_id": -1},
    "grouped heads": {"n_kv_heads": 1, "head_dim": 6, "qk_norm": True, "positions": "rotary", "norm": "rmsnorm"},
    "window": {"window": 3, "positions": "rotary", "first_norm": False, "mlp": "swiglu", "biases": "none"},
    "global and local layers": {
        **{"n_layers": 4, "window": 2, "global_every": 3, "positions": "rotary", "rotary_base_local": 9.0},
        **{"first_norm": False, "pad_id": 0, "logit_softcap": 9.0},
    },
    "final norm, with pads": {"positions": "rotary", "final_norm": True, "pad_id": 0},
}


def model_of(**settings: Any) -> LanguageModel:
    sizes = {"vocab_size": V, "d_model": 12, "n_layers": 2, "n_heads": 3, "seq_len": T, "dropout": 0.0}
    config = ModelConfig(**sizes | settings)
    model = LanguageModel(config, is_causal=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    if not config.tied_embedding:
        model.head.linear.kernel[...] *= 50  # far from ties, and from one token again and again
    return model


def made(decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, most: int, at_once: int = 99) -> list:
    rows = decoder.begin(prompts, most)
    for _ in range(-(-most // at_once)):
        rows = decoder.extend(rows, sampling, at_once)
    starts = map(len, prompts)
    return [
        row[i:n].tolist() for row, i, n in zip(*map(np.asarray, rows[:1]), starts, np.asarray(rows.n_B), strict=True)
    ]


def batch(sampling: Sampling, n: int) -> Sampling:
    return Sampling(*(x * n for x in sampling))


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(model_of(positions="rotary", pad_id=-1), (NEVER,))


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_the_whole_model(settings: dict[str, Any]) -> None:
    model = model_of(**settings)
    tokens = np.random.default_rng(0).integers(0, V, (2, T)).astype(np.int32)  # pads among them
    expected = jax.jit(lambda tokens: model(tokens))(tokens)
    decoder = Decoder(model, (STOP,))
    parts = jax.tree.unflatten(decoder.structure, decoder.leaves)

    @jax.jit
    def step(rows: decode.Rows, places: Any) -> Any:
        x_B1D, rows = decode.forward(parts, jnp.asarray(tokens)[jnp.arange(2), places][:, None], places[:, None], rows)
        return parts.head(x_B1D, parts.embedding.token.embedding[...])[:, 0], rows

    # One row is two positions ahead of the other, and both go on from prompts of another length than a chunk.
    starts = np.array([decode.CHUNK + 2, decode.CHUNK])
    rows = decoder.begin([row[: n + 1] for row, n in zip(tokens, starts, strict=True)], T)
    rows = rows._replace(tokens_BS=rows.tokens_BS.at[:, :T].set(tokens))
    for i in range(T - starts.max()):
        logits, rows = step(rows, jnp.asarray(starts + i))
        np.testing.assert_allclose(logits, expected[np.arange(2), starts + i], rtol=1e-5, atol=1e-5)


def test_greedy_is_that_of_the_whole_model(decoder: Decoder) -> None:
    model = model_of(positions="rotary", pad_id=-1)
    full = jax.jit(lambda tokens: model(tokens))
    prompts = [[7], [1, 2, 5], list(range(5)) * 7]
    for prompt, found in zip(prompts, made(decoder, prompts, batch(GREEDY, 3), T), strict=True):
        expected = list(prompt)
        while len(expected) <= T:  # one more than there are positions: the last is not run through the model
            tokens = np.zeros((1, T), np.int32)
            tokens[0, : len(expected)] = expected
            expected.append(int(full(tokens)[0, len(expected) - 1].argmax()))
        assert found == expected[len(prompt) :]


def test_a_row_is_the_same_alone_and_in_chunks(decoder: Decoder) -> None:
    prompts = [[1], [1, 2, 4, 5], list(range(4, 11)) * 5]
    each = [Sampling([1.5], [7], [0.9], [seed]) for seed in (5, 6, 6)]
    together = Sampling(*(sum(x, []) for x in zip(*each, strict=True)))
    alone = [made(decoder, [prompt], sampling, 12)[0] for prompt, sampling in zip(prompts, each, strict=True)]
    assert made(decoder, prompts, together, 12) == alone
    assert made(decoder, prompts, together, 12, at_once=4) == alone
    mixed = together._replace(temperature=[1.5, 0.0, 1.5])
    assert made(decoder, prompts, mixed, 12)[::2] == alone[::2]
    assert alone[1] != made(decoder, [prompts[1]], each[0], 12)[0]  # another seed


def test_it_compiles_once_for_any_length_and_way_to_choose() -> None:
    decoder = Decoder(model_of(positions="rotary", pad_id=-1), (STOP,))
    for n, sampling in ((1, GREEDY), (7, Sampling([1.0], [3], [0.5], [1])), (T, GREEDY)):
        made(decoder, [[5] * n], sampling, 3, at_once=n)
    assert (decoder._fill._cache_size(), decoder._extend._cache_size()) == (1, 1)


def test_a_row_ends_at_the_stop_token() -> None:
    model = model_of(positions="rotary", pad_id=-1)
    model.head.linear.bias = nnx.Param(jnp.zeros(V).at[STOP].set(1e4))
    assert made(Decoder(model, (STOP,)), [[1, 2], [STOP]], batch(GREEDY, 2), 5) == [[STOP], [STOP]]


kept = jax.jit(decode.kept)


def kept_by_sorting(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    p = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-p)[: top_k or None]
    p = p[order] / p[order].sum()
    return set(order[: int(np.sum(np.cumsum(p) < top_p)) + 1].tolist())


@pytest.mark.parametrize("top_k", [0, 1, 5, 200])
@pytest.mark.parametrize("top_p", [1e-300, 0.01, 0.5, 0.9, 1.0])
def test_what_can_be_drawn(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(top_k).normal(scale=3, size=(3, 101)).astype(np.float32)
    found = kept(logits, np.array([top_k, 0, top_k]), np.array([top_p, top_p, 1.0], np.float32))
    cases = ((top_k, top_p), (0, top_p), (top_k, 1.0))
    for row, is_kept, (k, p) in zip(logits, np.asarray(found), cases, strict=True):
        assert set(np.flatnonzero(is_kept)) == kept_by_sorting(row, k, p)


def test_what_is_drawn_has_the_frequencies_of_the_formula() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    n, temperature, top_k = 20_000, 2.0, 3
    sampling = Sampling(*(np.full(n, x) for x in (temperature, top_k, 1.0)), np.arange(n, dtype=np.uint32))
    sample = jax.jit(decode.sample)
    tokens = sample(jnp.tile(logits, (n, 1)), sampling, jnp.full(n, 4))
    expected = np.exp(logits / temperature) * [1, 1, 1, 0]
    expected /= expected.sum()
    found = np.bincount(tokens, minlength=4) / n
    assert np.all(np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / n))
    places = sample(jnp.tile(logits, (n, 1)), sampling._replace(seed=np.zeros(n, np.uint32)), jnp.arange(n))
    assert np.all(np.abs(np.bincount(places, minlength=4) / n - expected) <= 4 * np.sqrt(expected / n))
