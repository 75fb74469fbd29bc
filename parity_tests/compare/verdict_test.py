"""A two-layer network ported to JAX, rightly and wrongly: passes, names by themselves, first divergence, causes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen

from jaxlm.errors import UserError
from parity_tests import compare, record
from parity_tests.compare import divergence, pairing
from parity_tests.compare.command import main
from parity_tests.record.files import Record

N, RATE, DECAY = 4, 0.01, 0.1
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(N, 16, 6)).astype(np.float32)
Y = RANDOM.integers(0, 3, (N, 16))


class Port(linen.Module):
    """The network in Linen; `wrong` is a mistake."""

    wrong: str = ""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(6, name="first")(x)
        x = linen.gelu(x, approximate=self.wrong == "gelu")
        x = linen.LayerNorm(epsilon=1e-3 if self.wrong == "epsilon" else 1e-5, name="norm")(x)
        return linen.Dense(3, name="second")(x)


def original() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = {"first": torch.nn.Linear(6, 6), "act": torch.nn.GELU(), "norm": torch.nn.LayerNorm(6)}
    model = torch.nn.Sequential()
    for name, layer in (layers | {"second": torch.nn.Linear(6, 3)}).items():
        model.add_module(name, layer)
    return model


def train_torch(model: torch.nn.Module) -> Any:
    is_double = next(model.parameters()).dtype == torch.float64
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    with record.torch(model, optimizer) as a:
        for x, y in zip(X, Y, strict=True):
            a.batch(labels=y)
            optimizer.zero_grad()
            inputs = torch.from_numpy(x.astype(np.float64) if is_double else x)
            torch.nn.functional.cross_entropy(model(inputs), torch.from_numpy(y)).backward()
            optimizer.step()
    return a


def train_jax(wrong: str = "", dtype: Any = np.float32) -> Any:
    state = {name: x.detach().numpy().astype(dtype) for name, x in original().named_parameters()}
    params = {
        name: {"kernel": state[f"{name}.weight"].T.copy(), "bias": state[f"{name}.bias"]}
        for name in ("first", "second")
    }
    params["norm"] = {"scale": state["norm.weight"], "bias": state["norm.bias"]}
    if wrong == "transposed":
        params["first"]["kernel"] = params["first"]["kernel"].T.copy()
    model, weights = Port(wrong), {"params": jax.tree.map(jnp.asarray, params)}
    decay = 0.0 if wrong == "decay" else DECAY
    optimizer = optax.adamw(RATE, weight_decay=decay)
    opt_state = optimizer.init(weights)

    @jax.jit
    def step(weights: Any, opt_state: Any, x: Any, y: Any) -> Any:
        def loss(weights: Any) -> Any:
            each = optax.softmax_cross_entropy_with_integer_labels(model.apply(weights, x), y)
            return each.sum() if wrong == "sum" else each.mean()

        value, grads = jax.value_and_grad(loss)(weights)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        return optax.apply_updates(weights, updates), opt_state, value, grads

    with record.jax(model, params=weights) as b:
        for x, y in zip(X, Y, strict=True):
            b.batch(labels=y)
            weights, opt_state, value, grads = step(weights, opt_state, x.astype(dtype), y)
            b.step(loss=value, grads=grads, params=weights, state=opt_state, rate=RATE)
    return b


@pytest.fixture(scope="module")
def a() -> Any:
    return train_torch(original())


@pytest.fixture(scope="module")
def b() -> Any:
    return train_jax()


def test_a_right_port_passes_and_names_are_found(a: Any, b: Any, tmp_path: Path) -> None:
    found = compare.assert_same_training(a, b)
    assert found.n_updates == N
    assert {str(pair.a): (str(pair.b), pair.axes) for pair in found.names.pairs} == {
        "first.weight": ("first.kernel", (1, 0)),
        "first.bias": ("first.bias", None),
        "norm.weight": ("norm.scale", None),
        "norm.bias": ("norm.bias", None),
        "second.weight": ("second.kernel", (1, 0)),
        "second.bias": ("second.bias", None),
    }
    stages = {x.stage for x in found.found}
    assert stages == {"parameter", "batch", "forward", "loss", "gradient", "rate", "moment", "update"}
    (tmp_path / "names.json").write_text(found.names.json())
    again = compare.runs(a, b, names=tmp_path / "names.json")
    assert again.passes and len(again.found) == len(found.found)


@pytest.mark.parametrize(
    ("wrong", "kind", "stage", "name"),
    [
        ("gelu", "gelu", "forward", "norm"),
        ("epsilon", "epsilon", "forward", "norm"),
        ("transposed", "transposed kernel", "forward", "first"),
        ("sum", "sum against mean", "loss", "loss"),
        ("decay", "decay group", "update", ""),
    ],
)
def test_a_wrong_port_is_named(a: Any, wrong: str, kind: str, stage: str, name: str) -> None:
    b = train_jax(wrong)
    found = compare.runs(a, b)
    assert found.first and not found.passes
    assert found.first.stage == stage and name in found.first.name
    assert kind in [cause.kind for cause in found.causes[:3]], found.text()
    with pytest.raises(AssertionError, match=kind):
        compare.assert_same_training(a, b)


def test_tolerances_come_from_rounding_and_any_tensor_scaled_is_seen(a: Any, b: Any) -> None:
    exact = train_torch(original().double())
    found = compare.runs(a, b, rounding=[exact], until=1)
    assert "8 times the rounding" in found.bounds
    # optax takes 1 - 0.999**1 in float32, which is off by 1e-5, and so are its first updates by half of that.
    assert {x.stage for x in found.found if not x.passes} == {"update"} and found.first.difference < 1e-5
    one, two = a.read(), b.read()
    n_seen = 0
    for entry in list(two.entries):
        if (
            entry.update > 0
            or not entry.is_number
            or "same" in entry.line
            or entry.kind not in ("activation", "gradient")
        ):
            continue
        scaled = b.read()
        scaled.known[entry.number] = two.array(entry) * np.float32(1.0001)
        changed = compare.runs(one, scaled, rounding=[exact], until=1)
        assert changed.first and changed.first.stage in ("forward", "gradient"), entry.name
        n_seen += 1
    assert n_seen == 4 - 1 + 6  # the activation function is no module of the port
    assert max(x.tolerance for x in found.found if x.stage in ("forward", "loss", "gradient")) < divergence.VISIBLE


def test_any_stored_tensor_scaled_is_seen() -> None:
    """Each array of the first update: values before and after it, activations, loss, gradients, rate, moments."""
    a = train_torch(original().double()).read()
    with jax.enable_x64(True):
        b = train_jax(dtype=np.float64)
    assert compare.runs(a, b, until=1).passes
    seen: dict[str, int] = {}
    for entry in b.read().entries:
        is_first = entry.update == 0 or (entry.update == 1 and entry.kind == "parameter")
        if not (is_first and entry.is_number and entry.source is entry and "dtype" in entry.line):
            continue
        if not entry.array().any():  # the bias of the norm at the start
            continue
        scaled = b.read()
        scaled.known[entry.number] = entry.array() * 1.0001
        changed = compare.runs(a, scaled, until=1)
        assert changed.first, f"{entry.kind} {entry.name} of update {entry.update}"
        seen[entry.kind] = seen.get(entry.kind, 0) + 1
    # Of two moments each. What a module passes on as it is, is stored once.
    assert seen == {"parameter": 11, "input": 2, "activation": 3, "loss": 1, "gradient": 6, "rate": 1, "moment": 12}


def test_what_cannot_be_seen_is_told() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with record.torch(model, optimizer) as a:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    notes = " ".join(compare.runs(a, a).unseen)
    for text in ("all zero", "zero gradients: 0.weight", "dropout is active", "1 update:", "learning rate is 0"):
        assert text in notes, notes


def test_stacked_and_joined_parameters_are_paired() -> None:
    random = np.random.default_rng(1)
    q, k, v, stack = (random.normal(size=(2, 6, 6)).astype(np.float32) for _ in range(4))
    a = {f"layers.{i}.qkv.weight": np.concatenate([q[i], k[i], v[i]]) for i in range(2)}
    a |= {f"layers.{i}.fc.weight": stack[i] for i in range(2)}
    b = {
        f"blocks.{name}.kernel": x.swapaxes(1, 2) for name, x in (("query", q), ("key", k), ("value", v), ("fc", stack))
    }
    found = pairing.find(of_parameters(a), of_parameters(b))
    assert found.lonely == ([], []) and len(found.pairs) == 8
    for pair in found.pairs:
        np.testing.assert_array_equal(pair.a.of(a[pair.a.name]), pair.laid_out(b[pair.b.name]))
    reversed_ = pairing.find(of_parameters(a), of_parameters({name: x[::-1] for name, x in b.items()}))
    assert any("fc.weight has the values of blocks.fc.kernel[1]" in text for text in reversed_.moved)


def test_the_map_of_renamed_split_and_stacked_parameters_is_a_file_to_keep(tmp_path: Path) -> None:
    """A has queries, keys and values apart and its layers in a stack; B has them in one matrix, and layers apart."""
    random = np.random.default_rng(2)
    q, k, v, gate, up, out = (random.normal(size=(2, 6, 6)).astype(np.float32) for _ in range(6))
    stacked = {"query": q, "key": k, "value": v, "gate": gate, "up": up, "out": out}
    a = {f"blocks.{name}.kernel": x for name, x in stacked.items()}
    b = {f"h.{i}.in_proj.weight": np.concatenate([x[i].T for x in (q, k, v)]) for i in range(2)}
    b |= {f"h.{i}.gated.weight": np.concatenate([x[i].T for x in (gate, up)]) for i in range(2)}
    b |= {f"h.{i}.o.weight": out[i].T for i in range(2)}
    found = pairing.find(of_parameters(a), of_parameters(b))
    assert found.lonely == ([], []) and len(found.pairs) == 12
    (tmp_path / "names.json").write_text(found.json())
    kept = pairing.read_names(tmp_path / "names.json").pairs
    assert [dataclasses.replace(pair, by="map") for pair in found.pairs] == kept
    for pair in kept:
        np.testing.assert_array_equal(pair.a.of(a[pair.a.name]), pair.laid_out(b[pair.b.name]))
        into = np.zeros_like(b[pair.b.name])
        pair.put(a[pair.a.name], into)  # the other way
        np.testing.assert_array_equal(pair.b.of(into), pair.b.of(b[pair.b.name]))


def test_two_ways_are_refused() -> None:
    x = np.zeros((3, 3), np.float32)
    with pytest.raises(UserError, match="two ways are possible: .*give names=FILE"):
        pairing.find(of_parameters({"u.one": x, "u.two": x}), of_parameters({"w.three": x, "w.four": x, "w.five": x}))


def of_parameters(arrays: dict[str, np.ndarray]) -> Record:
    with record.torch(torch.nn.Module()) as recorder:
        for name, x in arrays.items():
            recorder.add("parameter", name, x)
    found = recorder.read()
    for entry in found.entries:
        entry.array()
    return found


def test_the_command(a: Any, b: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {key: tmp_path / f"out.{key}" for key in ("html", "json", "names")}
    options = ["--html", str(files["html"]), "--json", str(files["json"]), "--write-names", str(files["names"])]
    assert main([str(a.path), str(b.path), *options]) == 0
    assert "numbers pass, of 4 updates" in capsys.readouterr().out
    assert json.loads(files["json"].read_text())["passes"] and "within tolerance" in files["html"].read_text()
    wrong = train_jax("gelu")
    assert main([str(a.path), str(wrong.path), "--names", str(files["names"])]) == 1
    assert "computes GELU by tanh" in capsys.readouterr().out
    for bad in ([str(tmp_path), str(tmp_path)], [str(a.path), str(files["json"])]):
        with pytest.raises(SystemExit) as error:
            main(bad)
        assert error.value.code == 2


TEST = """
import torch
def test_port(parity):
    x = torch.ones(2, 3)
    for scale in (1.0, {scale}):
        layer = torch.nn.Linear(3, 3)
        torch.nn.init.ones_(layer.weight); torch.nn.init.ones_(layer.bias)
        with parity.torch(layer) as b:
            layer(x * scale).sum().backward()
        a = b if scale == 1.0 and parity.n_records == 1 else a
    parity.assert_same(a, b)
"""


@pytest.mark.parametrize(("scale", "status"), [(1.0, 0), (1.5, 1)])
def test_the_fixture_of_pytest(scale: float, status: int, tmp_path: Path) -> None:
    (tmp_path / "port_test.py").write_text(TEST.format(scale=scale))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "parity_tests.pytest_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "--parity", "kept", "port_test.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    (folder,) = (tmp_path / "kept").iterdir()
    assert json.loads((folder / "parity.json").read_text())["passes"] == (status == 0)
    assert ("first: update 0" in done.stdout) == (status == 1)


@pytest.mark.slow
def test_the_page_walks_through_a_port() -> None:
    text = (Path(__file__).parents[1] / "PROVE_A_PORT.md").read_text()
    program = text.split("```python\n")[1].split("```")[0]
    output = run_program(program)
    shown = [line.strip() for line in text.splitlines() if line.startswith("    first:") or line.startswith("      1.")]
    assert cause_of(output) == cause_of("\n".join(shown[:2])) and "of the output of 0" in output
    program = program.replace('(nn.Dense(8, name="first")(x))', '(nn.Dense(8, name="first")(x), approximate=False)')
    output = run_program(program)
    assert cause_of(output) == cause_of("\n".join(shown[2:])) and "B has epsilon 1e-06, A has epsilon 1e-05" in output
    assert "numbers pass, of 4 updates" in run_program(
        program.replace("LayerNorm(name", "LayerNorm(epsilon=1e-5, name")
    )


def cause_of(output: str) -> list[str]:
    return [line.split(":")[0].strip() for line in output.splitlines() if line.strip().startswith("1. ")]


def run_program(program: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout
