"""Records: the format, both recorders in jit, scan, vmap and remat, bfloat16 and shards, sketches, and bad files."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from jaxlm.errors import UserError
from parity_tests import record
from parity_tests.record import sketch
from parity_tests.record.files import Writer, read

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.linear = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jax.nn.gelu(self.linear(self.norm(x)))


class Stacked(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = jax.vmap(Block)(rngs.split(3))
        self.output = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array, unroll: int = 1) -> jax.Array:
        body = jax.checkpoint(lambda x, block: (block(x), None))
        return self.output(jax.lax.scan(body, x, self.blocks, unroll=unroll)[0])


def test_stacked_layers_in_a_scan_are_told_apart_and_recorded_as_they_are() -> None:
    model = Stacked(nnx.Rngs(0))
    graph, params = nnx.split(model)
    expected = []
    x = jnp.asarray(X)
    for i in range(3):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)(x)
        expected.append(np.asarray(x))
    with record.jax(model) as b:
        for unroll in (1, 3):
            loss, grads = jax.jit(
                jax.value_and_grad(lambda p, n=unroll: (nnx.merge(graph, p)(jnp.asarray(X), n) ** 2).mean())
            )(params)
            b.step(loss=loss, grads=grads, params=params)
    found = b.read()
    for update in (0, 1):
        outputs = [e for e in found.all("activation") if e.update == update]
        names = [f"blocks.{i}{part}" for i in range(3) for part in (".norm", ".linear", "")]
        assert [e.name for e in outputs] == [*names, "output", ""]
        for i in range(3):
            (entry,) = [e for e in outputs if e.name == f"blocks.{i}"]
            np.testing.assert_allclose(entry.array(), expected[i], rtol=1e-5, atol=1e-6)
        assert outputs[-1].line["same"] == outputs[-2].number  # the model returns what its last layer does
    gradients = {e.name: e.array() for e in found.all("gradient") if e.update == 0}
    np.testing.assert_allclose(gradients["output.kernel"], grads["output"]["kernel"][...], rtol=1e-5)


class Taught(nnx.Module):
    def __init__(self, n: int, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(n)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_teacher_of_the_same_class_is_not_the_model_and_inputs_of_numpy_are_recorded() -> None:
    student, teacher = Taught(1, nnx.Rngs(0)), Taught(2, nnx.Rngs(1))
    with record.jax(student) as b:
        for scale in (1.0, 2.0):
            student(scale * X), teacher(X)
    found = [(e.kind, e.name, e.call) for e in b.read().all("input", "activation")]
    assert found == [(*place, i) for i in (0, 1) for place in (
        ("input", ""), ("input", "layers.0"), ("activation", "layers.0"), ("activation", "")
    )]  # fmt: skip
    inputs = [e.array() for e in b.read().all("input") if e.name == ""]
    np.testing.assert_array_equal(inputs[1], 2 * X)


class Grouped(Stacked):
    """The same five blocks: one apart, and two scanned groups of two."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = jax.vmap(Block)(rngs.split(5))
        self.output = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array, unroll: int = 1) -> jax.Array:
        def run_group(x: jax.Array, group: Block) -> tuple[jax.Array, None]:
            for i in range(2):
                x = jax.tree.map(lambda leaf, i=i: leaf[i], group)(x)
            return x, None

        x = jax.tree.map(lambda leaf: leaf[0], self.blocks)(x)
        groups = jax.tree.map(lambda leaf: leaf[1:].reshape(2, 2, *leaf.shape[1:]), self.blocks)
        return self.output(jax.lax.scan(run_group, x, groups, unroll=unroll)[0])


@pytest.mark.parametrize("is_jitted", [True, False])
def test_layers_in_groups_are_numbered_through(is_jitted: bool) -> None:
    model = Grouped(nnx.Rngs(0))
    with record.jax(model) as b, jax.disable_jit(not is_jitted):
        jax.jit(lambda model, x: model(x))(model, jnp.asarray(X))
    found = {e.name: e.array() for e in b.read().all("activation")}
    assert list(found) == [*(f"blocks.{i}{part}" for i in range(5) for part in (".norm", ".linear", "")), "output", ""]
    x = jnp.asarray(X)
    for i in range(5):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks)(x)
        np.testing.assert_allclose(found[f"blocks.{i}"], x, rtol=1e-5, atol=1e-6)


class Dropped(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dropout(0.5, deterministic=False)(linen.Dense(6, name="first")(x))
        return linen.Dropout(0.25, deterministic=False)(linen.Dense(6, name="second")(x))


def test_masks_of_dropout_are_carried_from_jax_to_torch() -> None:
    model = Dropped()
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)["params"]
    with record.jax(model, params=params) as a:
        for i in range(2):
            jax.jit(model.apply)({"params": params}, X, rngs={"dropout": jax.random.key(i)})
            a.step(params=params)
    first, second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 6)
    port = torch.nn.Sequential(first, torch.nn.Dropout(0.5), second, torch.nn.Dropout(0.25))
    with torch.no_grad():
        for layer, name in ((first, "first"), (second, "second")):
            layer.weight.copy_(torch.tensor(np.asarray(params[name]["kernel"]).T))
            layer.bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))
    with record.torch(port, masks=a) as b:
        for i in range(2):
            b.update = i
            port(torch.from_numpy(X))
    outputs = [[e.array() for e in x.read().all("activation") if e.name == ""] for x in (a, b)]
    assert len(outputs[0]) == 2 and (outputs[0][0] == 0).any() and (outputs[0][0] != outputs[0][1]).any()
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="this model drops more often"), record.torch(port, masks=a):
        port(torch.from_numpy(X)), port(torch.from_numpy(X))
    with pytest.raises(UserError, match="a mask has the shape"), record.torch(port, masks=a):
        torch.nn.functional.dropout(torch.ones(3))


def test_linen_and_functions_with_tags_and_vmap() -> None:
    model = linen.Sequential([linen.Dense(3), linen.relu, linen.Dense(2)])
    params = model.init(jax.random.key(0), X)
    with record.jax(model) as b:
        value = jax.jit(model.apply)(params, X)
    assert [e.name for e in b.read().all("activation")] == ["layers_0", "layers_2", ""]
    np.testing.assert_array_equal([*b.read().all("activation")][-1].array(), value)
    with record.jax() as b:
        jax.jit(jax.vmap(lambda x: record.tag("doubled", 2 * x)))(X)
    (entry,) = b.read().entries
    assert entry.name == "doubled"
    np.testing.assert_array_equal(entry.array(), 2 * X)
    assert record.tag("outside", 3) == 3


def test_a_torch_loop_is_recorded_without_a_change() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU(), torch.nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    start = model[0].weight.detach().clone()
    with record.torch(model, optimizer) as a:
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(torch.from_numpy(X)).square().mean()
            loss.backward()
            gradient = model[0].weight.grad.clone()
            optimizer.step()
    found = a.read()
    by = {(e.update, e.kind, e.name): e.array() for e in found.entries if e.kind != "setting"}
    np.testing.assert_array_equal(by[0, "parameter", "0.weight"], start)
    np.testing.assert_array_equal(by[2, "parameter", "0.weight"], model[0].weight.detach())
    np.testing.assert_array_equal(by[1, "gradient", "0.weight"], gradient)
    np.testing.assert_array_equal(by[1, "moment", "exp_avg/0.weight"], optimizer.state[model[0].weight]["exp_avg"])
    assert by[1, "loss", "loss"] == loss.item() and by[0, "rate", "group 0"] == 0.1
    assert [e.name for e in found.all("activation") if e.update == 1] == ["0", "1", "2", ""]
    (group,) = [e.info for e in found.all("setting") if e.update == 0]
    assert group["weight_decay"] == 0.01 and group["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.Tensor.backward.__qualname__ == "Tensor.backward" and not model[0]._forward_hooks


def test_an_optimizer_that_calls_the_step_of_its_class_makes_one_update() -> None:
    class Further(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)

    model = torch.nn.Linear(3, 2)
    torch.optim.SGD(model.parameters())  # PyTorch gives hooks to the step of this class, too
    optimizer = Further(model.parameters(), lr=0.1, momentum=0.9)
    with record.torch(model, optimizer) as recorder:
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    found = recorder.read()
    assert [(e.update, e.name) for e in found.all("moment") if "bias" in e.name] == [
        (0, "momentum_buffer/bias"),
        (1, "momentum_buffer/bias"),
    ]
    assert sum(e.name == "weight" for e in found.all("parameter")) == 3


def test_bfloat16_is_recorded_as_it_is_by_both() -> None:
    half = jnp.asarray(X, jnp.bfloat16)
    with record.jax() as b:
        record.tag("x", half)
        b.batch(y=half)
    layer = torch.nn.Identity()
    with record.torch(layer) as a:
        layer(torch.from_numpy(X).bfloat16())
    for entry in [*b.read().entries, *a.read().all("activation")]:
        assert entry.dtype == "bfloat16" and entry.source.line["bytes"] == 2 * X.size
        np.testing.assert_array_equal(entry.array(), np.asarray(half, np.float32))


def test_float64_is_recorded_as_it_is_from_whatever_thread() -> None:
    """Callbacks of larger programs run in threads of their own, in which jax.enable_x64 does not hold."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)))
        for whole in (300**2, 1000):
            for _ in range(4):
                with record.jax(whole=whole) as b:
                    y = jax.jit(lambda x: record.tag("y", jnp.tanh(record.tag("x", x @ x)) @ x))(x)
                one, two = b.read().all("activation")
                assert one.dtype == two.dtype == "float64"
                rows, columns = sketch.axes(x.shape) if whole < x.size else (slice(None), slice(None))
                np.testing.assert_array_equal(two.array(), np.asarray(y)[rows][:, columns])


def test_a_sketch_sees_each_element_and_goes_with_a_transpose() -> None:
    large = np.random.default_rng(1).normal(size=(300, 200)).astype(np.float32)
    rows, columns = sketch.axes(large.shape)
    assert len(rows) * len(columns) <= sketch.KEPT and np.array_equal(sketch.axes((200, 300))[0], columns)
    changed = large.copy()
    changed[next(i for i in range(300) if i not in rows), 0] += 1
    entries = []
    for x in (large, changed, large.T.copy()):
        layer = torch.nn.Identity()
        with record.torch(layer, whole=1000) as a:
            layer(torch.from_numpy(x))
        with record.jax(whole=1000) as b:
            jax.jit(lambda x: record.tag("x", x))(x)
        entries.append([next(c.read().all("activation")) for c in (a, b)])
        assert entries[-1][0].shape == x.shape
        np.testing.assert_array_equal(entries[-1][0].array(), entries[-1][1].array())
        one, two = ([e.sketch["norm"], *e.sketch["projections"]] for e in entries[-1])
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-2)
    projections = [np.array(one.sketch["projections"]) for one, _ in entries]
    assert np.abs(projections[0] - projections[1]).min() > 0.9
    np.testing.assert_allclose(projections[0], projections[2])
    np.testing.assert_array_equal(entries[0][0].array().T, entries[2][0].array())


PROGRAM = """
import sys
for name in {hidden!r}:
    sys.modules[name] = None
from parity_tests import compare, record
{body}
"""
OF_TORCH = """
import torch
layer = torch.nn.Linear(3, 2)
with record.torch(layer, path=sys.argv[1]) as a:
    layer(torch.ones(1, 3))
"""
OF_JAX = """
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.device_put(jax.numpy.arange(24.0).reshape(8, 3), NamedSharding(mesh, P("x")))
with record.jax(path=sys.argv[1]) as b:
    y = jax.jit(lambda x: record.tag("doubled", 2 * x))(x)
    b.step(params={"w": y})
"""


@pytest.mark.parametrize(
    ("hidden", "body"),
    [(("jax", "jaxlib", "flax", "optax"), OF_TORCH), (("torch", "flax", "optax", "transformers"), OF_JAX)],
)
def test_each_recorder_runs_without_the_other_framework(hidden: Any, body: str, tmp_path: Path) -> None:
    program = PROGRAM.format(hidden=hidden, body=body)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "run")
    if body == OF_JAX:
        doubled, sharded = found.entries
        assert len(sharded.line["shards"]) == 4
        for entry in (doubled, sharded):
            np.testing.assert_array_equal(entry.array(), 2 * np.arange(24.0).reshape(8, 3))
    else:
        assert next(found.all("activation")).array().shape == (1, 2)


def test_a_run_that_was_stopped_can_be_read(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "test")
    for i in range(2):
        writer.add(0, "activation", f"layer {i}", **writer.array(X))
    writer.close()
    lines = tmp_path / "entries.jsonl"
    lines.write_text(lines.read_text()[:-5])
    (entry,) = read(tmp_path).entries
    np.testing.assert_array_equal(entry.array(), X)


def test_bad_records_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record"):
        read(tmp_path)
    writer = Writer(tmp_path / "a", "test")
    writer.add(0, "activation", "layer", **writer.array(X))
    writer.close()
    with pytest.raises(UserError, match="has a record already"):
        Writer(tmp_path / "a", "test")
    line = json.loads((tmp_path / "a" / "entries.jsonl").read_text())
    for changed, message in (({"kind": "activity"}, "unknown kind activity"), ({"bytes": 999}, "ends too early")):
        (tmp_path / "a" / "entries.jsonl").write_text(json.dumps(line | changed) + "\n")
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a").entries[0].array()
    (tmp_path / "a" / "record.json").write_text('{"format": "parity-record", "version": 2}')
    with pytest.raises(UserError, match="no record of version 1"):
        read(tmp_path / "a")
    with pytest.raises(TypeError, match="no module of NNX, Linen or Equinox"), record.jax(3):
        pass


def test_the_tool_imports_numpy_and_the_framework_that_it_records() -> None:
    own = {"jax_taps": {"jax"}, "torch_hooks": {"torch"}, "pytest_plugin": {"pytest"}}
    files = [*ROOT.glob("parity_tests/record/*.py"), *ROOT.rglob("parity_tests/compare/**/*.py")]
    files += [ROOT / "parity_tests" / name for name in ("carry.py", "pytest_plugin.py")]
    plain = {"errors", "io", "reporting"}
    for path in files:
        if path.name.endswith("_test.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (name.split(".") for name in names):
                allowed = sys.stdlib_module_names | {"numpy"} | own.get(path.stem, set())
                is_ours = name[0] == "parity_tests" and (name[1:2] or ["record"])[0] in ("record", "compare", "carry")
                assert name[0] in allowed or is_ours or (name[0] == "jaxlm" and name[1] in plain), (path, name)
