"""Layers and optimizers that others made, in PyTorch and in JAX: Flax Linen, Equinox, optax."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen

from parity_tests import compare, record

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(3, 7, 16)).astype(np.float32)


class Layer(linen.Module):
    """A layer of a transformer of Linen's own parts."""

    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = linen.LayerNorm(epsilon=self.epsilon, name="norm1")
        x = x + linen.MultiHeadDotProductAttention(2, name="self_attn")(norm(x))
        y = linen.Dense(32, name="linear1")(linen.LayerNorm(epsilon=self.epsilon, name="norm2")(x))
        return x + linen.Dense(16, name="linear2")(linen.gelu(y, approximate=False))


def of_linen(state: dict[str, np.ndarray]) -> Any:
    """Return the parameters of a torch.nn.TransformerEncoderLayer of 2 heads as Linen's layer has them."""
    joined = zip(("query", "key", "value"), np.split(state["self_attn.in_proj_weight"], 3), strict=True)
    biases = np.split(state["self_attn.in_proj_bias"], 3)
    attention: dict[str, Any] = {
        name: {"kernel": w.T.reshape(16, 2, 8), "bias": b.reshape(2, 8)}
        for (name, w), b in zip(joined, biases, strict=True)
    }
    output = state["self_attn.out_proj.weight"].T.reshape(2, 8, 16)
    attention["out"] = {"kernel": output, "bias": state["self_attn.out_proj.bias"]}
    norms = {n: {"scale": state[f"{n}.weight"], "bias": state[f"{n}.bias"]} for n in ("norm1", "norm2")}
    linears = {n: {"kernel": state[f"{n}.weight"].T, "bias": state[f"{n}.bias"]} for n in ("linear1", "linear2")}
    return {"self_attn": attention, **norms, **linears}


def random_start(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Set biases and norms, which are all alike at the start, to random values; return all parameters."""
    torch.manual_seed(0)
    for name, x in model.named_parameters():
        if x.ndim == 1:
            torch.nn.init.normal_(x, mean=float(name.endswith("weight")), std=0.1)
    return {name: x.detach().numpy().copy() for name, x in model.named_parameters()}


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, n: int = 2) -> Any:
    """Record updates in PyTorch by the mean of squares of the output."""
    dtype = next(model.parameters()).dtype
    with record.torch(model, optimizer) as a:
        for _ in range(n):
            optimizer.zero_grad()
            (model(torch.from_numpy(X).to(dtype)) ** 2).mean().backward()
            optimizer.step()
    return a


def trained_in_jax(model: Any, apply: Any, params: Any, tx: Any, n: int = 2, **given: Any) -> Any:
    """Record the same updates in JAX; `apply` computes the output."""
    state, x = tx.init(params), jnp.asarray(X, jax.tree.leaves(params)[0].dtype)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: (apply(p, x) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    with record.jax(model, params=params) as b:
        for _ in range(n):
            params, state, loss, grads = step(params, state)
            b.step(loss=loss, grads=grads, params=params, state=state, **given)
    return b


@pytest.mark.slow
def test_a_transformer_layer_of_linen_is_pytorchs() -> None:
    model = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    params = {"params": jax.tree.map(jnp.asarray, of_linen(random_start(model)))}
    a = trained(model, torch.optim.SGD(model.parameters(), lr=0.1))
    layer = Layer()
    found = compare.runs(a, trained_in_jax(layer, layer.apply, params, optax.sgd(0.1), rate=0.1))
    assert found.passes and found.names.lonely == ([], []), found.text()
    assert {x.stage for x in found.found} == {"parameter", "forward", "loss", "gradient", "rate", "update"}
    wrong = Layer(epsilon=1e-6)  # the default of Linen
    found = compare.runs(a, trained_in_jax(wrong, wrong.apply, params, optax.sgd(0.1), n=1, rate=0.1))
    assert found.first and found.first.name == "norm1" and found.causes[0].kind == "epsilon", found.text()


@pytest.mark.slow
def test_layers_of_equinox_are_pytorchs() -> None:
    eqx = pytest.importorskip("equinox")
    nn = torch.nn
    model = nn.Sequential(nn.Conv1d(7, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv1d(8, 5, 3, padding=1))
    state = random_start(model)

    def port(approximate: bool) -> Any:
        gelu = eqx.nn.Lambda(lambda x: jax.nn.gelu(x, approximate=approximate))
        keys = jax.random.split(jax.random.key(0))
        ends = eqx.nn.Conv1d(7, 8, 3, key=keys[0]), eqx.nn.Conv1d(8, 5, 3, padding=1, key=keys[1])
        made = eqx.nn.Sequential([ends[0], eqx.nn.GroupNorm(2, 8), gelu, ends[1]])
        places = [tuple(name.split(".")) for name in state]
        old = [getattr(made[int(i)], name) for i, name in places]
        values = [jnp.asarray(x).reshape(y.shape) for x, y in zip(state.values(), old, strict=True)]
        return eqx.tree_at(lambda m: [getattr(m[int(i)], name) for i, name in places], made, values)

    def recorded(approximate: bool = False) -> Any:
        made = port(approximate)
        params, static = eqx.partition(made, eqx.is_inexact_array)
        return trained_in_jax(made, lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, optax.sgd(0.1), rate=0.1)

    a = trained(model, torch.optim.SGD(model.parameters(), lr=0.1))
    found = compare.runs(a, recorded())
    assert found.passes and found.names.lonely == ([], []), found.text()
    assert {x.name for x in found.found if x.stage == "forward"} >= {"0", "1", "3"}
    found = compare.runs(a, recorded(approximate=True))
    assert found.first and found.first.stage == "forward" and found.causes[0].kind == "gelu", found.text()


def updated_by_both(name: str, tx: Any, n: int = 3, bias: bool = True, **options: Any) -> compare.Verdict:
    """Compare updates of PyTorch's optimizer with optax's in float64."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 12, bias), torch.nn.Tanh(), torch.nn.Linear(12, 4, bias)
    model = torch.nn.Sequential(*layers).double()
    start = {key: x.detach().numpy().copy() for key, x in model.named_parameters()}
    a = trained(model, getattr(torch.optim, name)(model.parameters(), lr=0.01, **options), n)

    def linear(p: Any, x: Any) -> Any:
        y = x @ p["kernel"]
        return y + p["bias"][None, None] if bias else y

    with jax.enable_x64(True):
        params: Any = {"first": {}, "second": {}}
        for key, x in start.items():
            layer, _, kind = key.partition(".")
            of = params["first" if layer == "0" else "second"]
            of["kernel" if kind == "weight" else "bias"] = jnp.asarray(x.T)

        def apply(p: Any, x: Any) -> Any:
            return record.tag("2", linear(p["second"], jnp.tanh(linear(p["first"], x))))

        return compare.runs(a, trained_in_jax(None, apply, params, tx, n, rate=0.01))


def test_adamw_of_optax_is_pytorchs_in_float64() -> None:
    found = updated_by_both("AdamW", optax.adamw(0.01, weight_decay=0.1), weight_decay=0.1)
    assert found.passes and {x.stage for x in found.found} >= {"gradient", "moment", "update"}, found.text()
    found = updated_by_both("AdamW", optax.adamw(0.01))  # the defaults differ: 1e-2 in PyTorch, 1e-4 in optax
    assert found.first and found.first.stage == "update" and found.causes[0].kind == "decay group", found.text()


def test_adafactor_of_optax_is_pytorchs_if_small_matrices_are_factored() -> None:
    found = updated_by_both("Adafactor", optax.adafactor(0.01, min_dim_size_to_factor=2))
    assert all(x.passes for x in found.found if x.update == 0)
    # From then on, optax takes the share of the second moment, 1 - t^-0.8, in float32.
    assert found.first and found.first.stage == "update" and max(x.difference for x in found.found) < 1e-8, found.text()
    found = updated_by_both("Adafactor", optax.adafactor(0.01))  # factors no axis below 128, and PyTorch all
    assert found.first and (found.first.update, found.first.stage, found.first.name) == (0, "update", "0.weight")
    is_matrix = {x.name: x.name.endswith("weight") for x in found.found if x.stage == "update"}
    assert {x.name: not x.passes for x in found.found if x.stage == "update" and x.update == 0} == is_matrix


def test_muon_of_optax_differs_from_pytorchs_by_bfloat16_and_by_the_bias_correction() -> None:
    tx, updates = optax.contrib.muon(0.01), []
    for cast in (torch.Tensor.bfloat16, lambda x: x):  # PyTorch's iterations in bfloat16, as they are, and in float64
        with mock.patch.object(torch.Tensor, "bfloat16", cast):
            found = updated_by_both("Muon", tx, bias=False, weight_decay=0.0)
        assert found.first and (found.first.update, found.first.stage) == (0, "update"), found.text()
        assert all(x.passes for x in found.found if x.update == 0 and x.stage != "update")
        updates.append({(x.update, x.name): x.difference for x in found.found if x.stage == "update"})
    assert 0.01 < min(updates[0].values()) and max(updates[0].values()) < 0.1
    # optax corrects the bias of gradient and momentum by other counts: the first update is that of PyTorch.
    is_near = {key: x < 1e-6 for key, x in updates[1].items()}
    assert is_near == {key: key[0] == 0 for key in is_near} and max(updates[1].values()) < 0.01
