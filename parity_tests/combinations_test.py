"""The table of combinations: each option of the model with each way of using it. No cell is empty, each has a number.

An option is a row of OPTIONS, small enough for all columns; a column is a function of an option. Float64 but where a
column says otherwise.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import optim, parallel
from jaxlm import parallel_test as on_devices
from jaxlm.config import Config
from jaxlm.cost import compile_ahead
from jaxlm.inference import attention_maps, decode
from jaxlm.model import Places
from jaxlm.ops.plain_attention import Mask, hidden
from jaxlm.ops.stacks import block_of
from jaxlm.params import names
from jaxlm.params.names import Arrays
from jaxlm.tasks import TASKS, flops, parameters
from jaxlm.training.teacher import Teacher
from parity_tests import trajectory
from parity_tests.compare.tolerances import FLOAT64
from parity_tests.drift import config_of
from parity_tests.packages import PACKAGES, Jaxlm
from parity_tests.plan import Plan, random_batch, random_plan, random_weights

T, V, D = 13, 24, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "RMSNorm, SwiGLU": {"norm": "rmsnorm", "final_norm": True, "mlp": "swiglu", "d_ff": 24, "biases": "attention"},
    "norm without scale, squared ReLU": {"norm": "rmsnorm_no_scale", "embedding_norm": True, "mlp": "relu2"},
    "norm without bias, GEGLU": {"norm": "layernorm_no_bias", "mlp": "geglu", "biases": "none", "output_bias": False},
    "norms after sums": {"post_norm": True, "gelu": "tanh", "biases": "feed_forward"},
    "grouped heads": {"n_kv_heads": 2, "head_dim": 6},
    "norm of queries and keys": {
        **{"qk_norm": True, "positions": "rotary", "rotary_base": 50.0, "rotary_scaling": 8.0},
        **{"rotary_scaling_len": 12, "pad_id": -1},
    },
    "window": {"window": 5, "positions": "learned"},
    "window in blocks": {"window": 2, "positions": "rotary", "n_kv_heads": 2},
    "global and local layers": {
        **{"window": 2, "global_every": 2, "n_layers": 5, "positions": "rotary", "rotary_base_local": 7.0},
        "first_norm": False,
    },
    "tied, soft cap, z-loss": {"tied_embedding": True, "logit_softcap": 0.9, "z_loss": 0.1, "initialization": "gpt2"},
}


def settings(option: str, **changes: Any) -> dict[str, Any]:
    sizes = {"vocab_size": V, "d_model": D, "n_heads": 4, "n_layers": 3, "seq_len": T, "dropout": 0.0}
    return {f"model.{name}": x for name, x in (sizes | OPTIONS[option] | changes).items()}


def config_with(option: str, task: str = "gpt", **changes: Any) -> Config:
    train = {"train.max_steps": 2, "train.warmup_steps": 0, "train.accumulate": 1, "train.clip_norm": 1.0}
    return config_of(task, **train | settings(option, **changes))


def batch_of(option: str) -> Any:
    return random_batch(config_with(option), np.random.default_rng(1), 2)


@functools.cache
def whole(option: str) -> tuple[np.ndarray, Arrays]:
    """Return the logits and gradients of the plain model."""
    config = config_with(option)
    _, logits, gradients = Jaxlm(config, random_weights(config, 1), "float64").forward(batch_of(option))
    return logits, gradients


def assert_alike(option: str, plan: Plan) -> None:
    jaxlm, torchlm = (trajectory.run(package, plan, "float64") for package in PACKAGES)
    failed = [row for row in trajectory.compare(option, "", jaxlm, torchlm, FLOAT64) if not row.passes]
    assert not failed


def training(option: str) -> None:
    """Updates are those of torchlm."""
    assert_alike(option, random_plan(option, config_with(option), seed=3))


def distillation(option: str) -> None:
    """An update of a student with another teacher is that of torchlm; of mlm, since gpt has no distillation."""
    config = config_with(option, "mlm", **{"z_loss": 0.0} if "z_loss" in OPTIONS[option] else {})
    plan, teacher = random_plan(option, config, seed=3), Teacher(config, random_weights(config, 9), "")
    assert_alike(option, dataclasses.replace(plan, batches=plan.batches[:1], teacher=teacher))


def lora(option: str) -> None:
    """Adapters give the logits of weights that they are merged into, and alone have gradients."""
    adapted = config_with(option, lora_rank=2, lora_products="query,key,value,output,fc1,fc2")
    weights = random_weights(adapted, 2)
    _, found, gradients = Jaxlm(adapted, weights, "float64").forward(batch_of(option))
    wide = {name: x.astype(np.float64) for name, x in weights.items()}
    merged = Jaxlm(config_with(option), names.merge_adapters(adapted.model, wide), "float64")
    _, expected, _ = merged.forward(batch_of(option))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    assert not np.allclose(
        expected,
        Jaxlm(config_with(option), names.without_adapters(weights), "float64").forward(batch_of(option))[1],
        atol=1e-2,
    )
    of_base = {name for name in gradients if name.startswith("base.")}
    assert of_base and all(".lora_" in name and np.any(gradients[name]) for name in of_base)


def freezing(option: str) -> None:
    """What is trained has the gradients that it has where all is trained."""
    config = config_with(option, frozen_layers=2, frozen_embedding=True)
    _, logits, gradients = Jaxlm(config, random_weights(config, 1), "float64").forward(batch_of(option))
    expected_logits, expected = whole(option)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-12)
    assert gradients.keys() == names.trained(config.model, expected).keys() < expected.keys()
    for name, x in gradients.items():
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-12 + 1e-11 * np.abs(expected[name]).max())


def layer_decay(option: str) -> None:
    """The first step of each layer is its share of the step without decay."""
    config, (_, gradients) = config_with(option), whole(option)
    n = config.model.n_layers
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.float64(x), names.to_jax(random_weights(config, 1)))
        steps = []
        for decay in (1.0, 0.5):
            train = config_of("gpt", **{"train.layer_decay": decay}).train
            optimizer = optim.make_optimizer(train, lambda step: 0.1, n)
            updates, _ = optimizer.update(names.to_jax(gradients), optimizer.init(params), params)
            steps.append(names.to_torch(jax.device_get(updates)))
    for name, step in steps[0].items():
        part = name.split(".")
        depth = n - int(part[2]) if part[1] == "blocks" else n + 1 if part[1] == "embedding" else 0
        np.testing.assert_allclose(steps[1][name], 0.5**depth * step, rtol=1e-12, atol=1e-15)
        assert np.any(step) or not np.any(gradients[name])


def model_with(option: str) -> Any:
    config = config_with(option)
    model = TASKS["gpt"](config).build_model(nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    nnx.replace_by_pure_dict(params, jax.tree.map(jnp.asarray, names.to_jax(random_weights(config, 1))))
    return nnx.merge(graphdef, params)


def cached_decoding(option: str) -> None:
    """Chunks of positions with a cache give the logits of the whole; in float32."""
    tokens, model = batch_of(option)["tokens"], model_with(option)
    decoder = decode.Decoder(model, (V - 1,))
    parts = jax.tree.unflatten(decoder.structure, decoder.leaves)
    rows = decoder.empty(len(tokens))
    rows = rows._replace(tokens_BS=rows.tokens_BS.at[:, :T].set(tokens))
    found = []
    for chunk in np.split(np.arange(T), [1, 6]):
        places_BC = jnp.broadcast_to(chunk, (len(tokens), len(chunk)))
        x_BCD, rows = jax.jit(decode.forward)(parts, tokens[:, chunk], places_BC, rows)
        found.append(parts.head(x_BCD, parts.embedding.token.embedding[...]))
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole(option)[0], rtol=0, atol=1e-4)


def maps(option: str) -> None:
    """The weights of each head, times its values, give what attention adds; hidden keys have none. In float32."""
    tokens, base = jnp.asarray(batch_of(option)["tokens"]), model_with(option).base
    config = base.config
    H, K, L = config.n_heads, config.head_size, config.n_layers

    @jax.jit
    def both(base: Any) -> Any:
        of_heads = jax.vmap(lambda layer, head: attention_maps.weights(base, tokens, layer, head), (None, 0))
        weights_LHBTS = jax.vmap(of_heads, (0, None))(jnp.arange(L), jnp.arange(H))
        places = Places(tokens == 0 if config.pad_id == 0 else None)
        x_BTD, pairs = base.embedding(tokens, None), []
        for i in range(L):
            block = block_of(config, base.blocks, i)
            has_norm = not config.post_norm and (config.first_norm or i > 0)
            seen_BTD = block.layernorm1(x_BTD) if has_norm else x_BTD
            value_BTGK = block.attention.value(seen_BTD).reshape(*tokens.shape, -1, K)
            value_BTHK = jnp.repeat(value_BTGK, H // value_BTGK.shape[2], 2)
            taken = jnp.einsum("HBTS,BSHK->BTHK", weights_LHBTS[i], value_BTHK)
            added = block.attention.output(taken.reshape(*tokens.shape, H * K))
            pairs.append((added, block.attention(seen_BTD, places, i, [None, None])))
            x_BTD = block(x_BTD, places, i, None)
        return weights_LHBTS, pairs

    weights_LHBTS, pairs = both(base)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(weights_LHBTS.sum(axis=-1), 1, rtol=0, atol=1e-5)
    for i in range(L):
        is_hidden = np.broadcast_to(visible(config, i) == 0, weights_LHBTS[i].shape)
        assert not np.any(np.asarray(weights_LHBTS[i])[is_hidden])


def visible(config: Any, layer: int) -> np.ndarray:
    """Return which keys each query of a causal model sees, [T, T], counted one by one."""
    n = config.window_of(layer)
    return np.array([[s <= t and (not n or t - s <= n) for s in range(T)] for t in range(T)])


def plan(option: str) -> None:
    """Parameters and flops are those counted by hand: windows as windows, all other attention whole."""
    config, shapes = config_with(option), parameters.shapes(config_with(option))
    step = compile_ahead.analytic(config, parallel.abstract_mesh((1, 1, 1)), "TPU v4")
    n = sum(int(np.prod(shape)) for shape in shapes.values())
    assert (step.n_parameters, step.weights, step.moments) == (n, 4 * n, 8 * n)
    matrices = sum(int(np.prod(x)) for name, x in shapes.items() if len(x) == 2 and "embedding" not in name)
    matrices += V * D if config.model.tied_embedding else 0
    n_pairs = sum(
        int(visible(config.model, i).sum()) if config.model.window_of(i) else T * T
        for i in range(config.model.n_layers)
    )
    products = 2 * T * matrices + 4 * config.model.n_heads * config.model.head_size * n_pairs
    assert flops.forward_flops(config) == products


def sharded() -> dict[str, float]:
    """Return how far an update on 8 devices, 2 of each axis, is from one on one device."""
    found = {}
    with jax.enable_x64(True):
        for option in OPTIONS:
            values = settings(option)
            one, many = (
                on_devices.OnMesh(on_devices.settings("gpt", mesh, **values), jnp.float64, n)
                for mesh, n in (((-1, 1, 1), 1), ((2, 2, 2), 8))
            )
            (state, numbers, _), (other, others, _) = (x.train(1) for x in (one, many))
            moved = on_devices.apart(state.params, one.start.params)
            weights = on_devices.apart(state.params, other.params)
            found[option] = max(weights / moved, float(np.max(np.abs(np.array(others) / np.array(numbers) - 1))))
    return found


@functools.cache
def on_eight_devices() -> dict[str, float]:
    return on_devices.run_with_8_devices("sharded()", "parity_tests.combinations_test")


def sharding(option: str) -> None:
    """An update is the same where data, fsdp and tensor split it."""
    assert on_eight_devices()[option] < 1e-9


COLUMNS: tuple[Callable[[str], None], ...] = (
    *(training, cached_decoding, maps, sharding, lora, freezing, distillation, layer_decay, plan),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "column",
    [pytest.param(x, marks=pytest.mark.longest if x is sharding else []) for x in COLUMNS],
    ids=lambda column: column.__name__,
)
@pytest.mark.parametrize(
    "option", [list(OPTIONS)[0], *(pytest.param(x, marks=pytest.mark.longest) for x in list(OPTIONS)[1:])]
)
def test_each_option_works_in_each_use(option: str, column: Callable[[str], None]) -> None:
    column(option)


def test_hidden_keys_are_those_counted_one_by_one() -> None:
    for option in ("window", "window in blocks", "global and local layers"):
        model = config_with(option).model
        for i in range(model.n_layers):
            is_hidden = hidden(Mask(is_causal=True, window=model.window_of(i)), T, T)
            np.testing.assert_array_equal(~is_hidden[0], visible(model, i))
