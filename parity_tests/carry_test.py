"""Start values and batches of one run are the other's: layouts, stacked layers, both directions, and refusals."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from jaxlm.errors import UserError
from parity_tests import carry, compare, record

X = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)


class Theirs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.token = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Embedding(6, 6)
        self.fc, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


class Ours(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linen.Embed(6, 6, name="token")(jnp.zeros(1, int))
        x = linen.Dense(4, name="fc")(linen.Conv(4, (3, 3), name="conv")(x))
        return linen.LayerNorm(epsilon=1e-5, name="norm")(x)


def test_start_values_go_from_torch_to_jax_and_back_in_each_layout(tmp_path: Path) -> None:
    theirs, ours = Theirs(), Ours()
    torch.nn.init.normal_(theirs.norm.weight)
    with record.torch(theirs, path=tmp_path / "a") as a:
        a.batch(x=X)
        expected = theirs(torch.from_numpy(X)).detach().numpy()
    weights = ours.init(jax.random.key(1), X)
    for source in (theirs, a, tmp_path / "a"):  # a module, a recorder, a folder
        started = carry.start(source, weights)
        assert jax.tree.structure(started) == jax.tree.structure(weights)
        np.testing.assert_allclose(ours.apply(started, X), expected, rtol=1e-4, atol=1e-5)
    with record.jax(ours, params=started) as b:
        ours.apply(started, carry.batches(a)[0]["x"])
    assert compare.runs(a, b).passes
    assert carry.start(b, again := Theirs()) is again
    for one, two in zip(theirs.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


class Layers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = jax.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(rngs.split(2))
        self.out = nnx.Linear(4, 3, rngs=rngs)


class TorchLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.out = torch.nn.Linear(4, 3)


def test_stacked_layers_and_heads_are_laid_out() -> None:
    theirs = TorchLayers()
    ours = carry.start(theirs, Layers(nnx.Rngs(0)))
    for i, layer in enumerate(theirs.layers):
        np.testing.assert_array_equal(ours.blocks.kernel[i], layer.weight.detach().numpy().T)
        np.testing.assert_array_equal(ours.blocks.bias[i], layer.bias.detach().numpy())
    again = carry.start(ours, TorchLayers())
    assert torch.equal(again.layers[1].weight, theirs.layers[1].weight)
    attention = linen.MultiHeadDotProductAttention(2)
    x = jnp.asarray(X[0])
    weights = attention.init(jax.random.key(0), x)["params"]
    made: dict[str, Any] = {}
    for name in ("query", "key", "value", "out"):
        kernel = weights[name]["kernel"]
        made[f"{name}.weight"] = np.asarray(kernel.reshape(4, 4).T) + 1
        made[f"{name}.bias"] = np.arange(4.0)
    started = carry.start(made, weights)
    for name in ("query", "out"):
        np.testing.assert_allclose(started[name]["kernel"], weights[name]["kernel"] + 1, rtol=1e-6)
    assert started["query"]["bias"].tolist() == [[0, 1], [2, 3]]


def test_batches_are_those_that_were_given() -> None:
    with record.jax() as b:
        for i in range(2):
            for j in range(1 + i):  # the second update accumulates two
                b.batch(tokens=np.full((2, 3), 10 * i + j), labels=np.array([i, j]))
            b.step()
    found = carry.batches(b)
    assert [x["tokens"][0, 0] for x in found] == [0, 10, 11] and found[2]["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"a": np.zeros((3, 3))}, {"b": np.zeros((3, 3))}, "nothing is known to be b; give names=FILE"),
        ({"fc.w": np.zeros((3, 3))}, {"fc.kernel": np.zeros((3, 3))}, "how fc.kernel .* is laid out as fc.w"),
        (
            {"x.weight": np.ones(3), "y.weight": np.ones(3)},
            {"u.kernel": np.ones(3), "v.kernel": np.ones(3)},
            "two ways",
        ),
        (
            {f"{2 * i}.weight": np.ones(3) for i in range(2)},
            {f"Dense_{i}.kernel": np.ones(3) for i in range(2)},
            "2.weight may be Dense_1.kernel, but its number is another",
        ),
        ({"qkv.weight": np.ones((9, 3))}, {"q.weight": np.ones((3, 3))}, "nothing is known to be q.weight"),
    ],
)
def test_what_names_do_not_tell_is_refused(source: Any, target: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        carry.start(source, target)


def test_a_map_tells_what_names_do_not(tmp_path: Path) -> None:
    source = {"qkv.weight": np.arange(27.0).reshape(9, 3)}
    target = {name: jnp.zeros((3, 3)) for name in "kqv"}
    rows = [{"a": "qkv.weight", "a_part": [0, 3 * i, 3 * i + 3], "b": x, "axes": [1, 0]} for i, x in enumerate("qkv")]
    path = tmp_path / "names.json"
    path.write_text(f'{{"parameters": {rows}}}'.replace("'", '"'))
    started = carry.start(source, target, path)
    np.testing.assert_array_equal(np.concatenate([started[x].T for x in "qkv"]), source["qkv.weight"])
    with pytest.raises(UserError, match="does not fit"):
        carry.start({"qkv.weight": np.zeros((9, 4))}, target, path)


def test_sketches_are_refused() -> None:
    model = TorchLayers()
    with record.torch(model, whole=8) as a:
        a.batch(x=torch.ones(3, 4))
    with pytest.raises(UserError, match="only a sample of layers.0.weight is recorded; give the model"):
        carry.start(a, {"w": np.zeros(3)})
    with pytest.raises(UserError, match="only a sample of x"):
        carry.batches(a)
