"""Training on meshes of 8 devices against one, in a process that has XLA split the CPU into as many."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxlm import checkpoint, loop, parallel
from jaxlm import config as configs
from jaxlm.checkpoint import Checkpoints
from jaxlm.errors import UserError
from jaxlm.step import TrainState
from jaxlm.tasks import TASKS

BATCH, SEQ_LEN, VOCAB = 16, 6, 24
ACCUMULATE = {"mlm": 2, "gpt": 1, "sst2": 1, "cola": 2}
SIZES = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 3, "n_heads": 4, "seq_len": SEQ_LEN, "dropout": 0.2}
MESHES = {
    "data 8": (8, 1, 1),
    "fsdp 8": (1, 8, 1),
    "tensor 2 x data 4": (4, 1, 2),
    "fsdp 2 x tensor 2 x data 2": (2, 2, 2),
}


def settings(task: str, mesh: tuple[int, int, int] = (-1, 1, 1), **values: Any) -> configs.Config:
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    base = {"task": task, "train.batch_size": BATCH, "train.accumulate": ACCUMULATE[task], "train.warmup_steps": 0}
    base |= {"train.learning_rate": 0.01}
    return configs.build(base | {f"model.{name}": x for name, x in SIZES.items()} | sizes | values)


def batch_of(task: str, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return random tokens and labels; how many labels count differs from row to row, and so from device to device."""
    A = ACCUMULATE[task]
    tokens = random.integers(1, VOCAB, (A, BATCH, SEQ_LEN))
    tokens[:, :, -2:] *= random.integers(0, 2, (A, BATCH, 1))  # some pads
    if task == "mlm":
        positions = random.integers(0, SEQ_LEN, (A, BATCH, 2))
        batch = {"tokens": tokens, "positions": positions, "labels": random.integers(-9, VOCAB, positions.shape)}
    elif task == "gpt":
        batch = {"tokens": tokens, "labels": random.integers(-9, VOCAB, tokens.shape)}
    else:
        batch = {"tokens": tokens, "labels": random.integers(-1, 2, (A, BATCH))}
    return {name: np.maximum(x, -1).astype(np.int32) for name, x in batch.items()}


class OnMesh:
    """A model with start values on a mesh, and its training on random batches."""

    def __init__(self, config: configs.Config, dtype: Any = jnp.float32, n_devices: int = 8):
        task = TASKS[config.task](config)
        task.dtype = dtype
        self.config, self.mesh = config, parallel.make_mesh(config, jax.devices()[:n_devices])
        self.fresh, self.compiled = loop.build(config, task, self.mesh)
        self.start = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, self.fresh())

    def train(self, n_updates: int) -> tuple[TrainState, list[list[float]], Any]:
        """Return the state after some updates with dropout, their metrics, and totals of an evaluation."""
        random, key = np.random.default_rng(0), jax.device_put(jax.random.key(0), parallel.replicated(self.mesh))
        state, numbers, batch = jax.tree.map(jnp.copy, self.start), [], {}
        for _ in range(n_updates):
            batch = batch_of(self.config.task, random)
            state, metrics = self.compiled.update(state, parallel.put_batch(self.mesh, batch, axis=1), key)
            numbers.append([float(metrics[name]) for name in ("loss", "grad_norm", "count")])
        part = {name: x[0] for name, x in batch.items()}
        part["labels"][BATCH - 3 :] = -1  # as a last evaluation batch that is not full
        return state, numbers, jax.device_get(self.compiled.totals(state.params, parallel.put_batch(self.mesh, part)))


def apart(x: Any, y: Any) -> float:
    """Return the norm of the difference between two trees, relative to that of the first."""
    x, y = (np.concatenate([a.ravel() for a in jax.tree.leaves(jax.device_get(tree))]) for tree in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(x))


def matrix(
    task: str, n_updates: int, is_double: bool, meshes: Sequence[str] = tuple(MESHES), **values: Any
) -> dict[str, Any]:
    """Return how far training on some meshes is from training on one device."""
    with jax.enable_x64(is_double):
        dtype, found = (jnp.float64 if is_double else jnp.float32), {}
        one = OnMesh(settings(task, **values), dtype, n_devices=1)
        state, numbers, totals = one.train(n_updates)
        for name in meshes:
            many = OnMesh(settings(task, MESHES[name], **values), dtype)
            others = many.train(n_updates)
            assert all(x.dtype == dtype for x in jax.tree.leaves(others[0].params))
            assert jax.tree.map(lambda x: x.sharding, others[0]) == many.compiled.shardings
            found[name] = {
                "numbers": float(np.max(np.abs(np.array(others[1]) / np.array(numbers) - 1))),
                "weights": apart(state.params, others[0].params),
                "moved": apart(state.params, one.start.params),
                "loss": float(abs(others[2]["loss"] / totals["loss"] - 1)),
                "counts": [int(others[2][x] - totals[x]) for x in ("count", "correct")],
            }
        return found


def in_both_precisions(task: str, n_updates: int) -> list[dict[str, Any]]:
    return [matrix(task, n_updates, is_double) for is_double in (True, False)]


def made_and_restored(folder: Path, names: Sequence[str] = tuple(MESHES)) -> dict[str, Any]:
    """Return what devices hold while start values are made, and where a checkpoint of one mesh is another on another.

    Start values are the same on every mesh, so what is saved differs from them.
    """
    sizes = {"one device": (-1, 1, 1), "fsdp 4 x tensor 2": (1, 4, 2)} | {name: MESHES[name] for name in names}
    meshes = {name: OnMesh(settings("gpt", x), n_devices=1 if x[0] == -1 else 8) for name, x in sizes.items()}
    whole = sum(x.nbytes for x in jax.tree.leaves(meshes["one device"].start))
    found: dict[str, Any] = {"other start": [], "other restored": [], "share": {}, "share_made": {}}
    for name, this in meshes.items():
        if apart(this.start, meshes["one device"].start):
            found["other start"].append(name)
        memory = this.fresh.lower().compile().memory_analysis()  # type: ignore[attr-defined]
        found["share"][name] = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(this.start)) / whole
        found["share_made"][name] = (memory.output_size_in_bytes + memory.temp_size_in_bytes) / whole
        state = jax.tree.map(lambda x: x + 1, this.start)
        with Checkpoints(folder / name) as checkpoints:
            info = {"format": checkpoint.FORMAT, "step": 1, "sample_iter": 0, "task": "gpt", "rate": 0.0}
            checkpoints.save(state, info | {"tokenizer": "", "config": configs.flat(this.config)}, {})
        for other, like in meshes.items():
            restored = checkpoint.restore(folder / name / "1", like.start)
            placed = jax.tree.map(lambda x: x.sharding, restored) == like.compiled.shardings
            if not placed or apart(restored.params, state.params) or apart(restored.opt_state, state.opt_state):
                found["other restored"].append(f"{name} to {other}")
    return found


def run_with_8_devices(call: str, module: str = "jaxlm.parallel_test") -> Any:
    """Return what a function of a module of tests returns, called in a process of 8 devices."""
    script = f"import json, {module}; print(json.dumps({module}.{call}))"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run([sys.executable, "-c", script], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict[str, Any], tolerance: float, of_movement: float) -> None:
    """Check losses and norms, and the weights by how far they have moved."""
    for name, differences in found.items():
        assert differences["counts"] == [0, 0], name
        assert max(differences[x] for x in ("numbers", "loss")) < tolerance, (name, differences)
        assert differences["weights"] < of_movement * differences["moved"], (name, differences)


def test_every_mesh_trains_as_one_device_does() -> None:
    check(run_with_8_devices("matrix('mlm', 3, True, ['fsdp 2 x tensor 2 x data 2'])"), 1e-10, 1e-10)


def test_muon_updates_whole_matrices_on_every_mesh() -> None:
    meshes = ["fsdp 2 x tensor 2 x data 2"]  # three layers over eight devices
    found = run_with_8_devices(f"matrix('gpt', 3, True, {meshes}, **{{'train.optimizer': 'muon'}})")
    check(found, 1e-10, 1e-10)


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("task", ["mlm", "gpt", "cola"])
def test_every_mesh_trains_as_one_device_does_over_50_updates(task: str) -> None:
    double, single = run_with_8_devices(f"in_both_precisions('{task}', 50)")
    check(double, 1e-10, 1e-9)
    # Roundings of 6e-8; AdamW moves by its rate also where a gradient is no more than that, as a key's bias has it.
    check(single, 1e-5, 0.01)


@pytest.mark.parametrize("names", [(), pytest.param(tuple(MESHES), marks=pytest.mark.slow)])
def test_a_state_is_made_in_parts_and_restored_on_any_mesh(tmp_path: Path, names: tuple[str, ...]) -> None:
    found = run_with_8_devices(f"made_and_restored(__import__('pathlib').Path({str(tmp_path)!r}), {names})")
    assert found["other start"] == found["other restored"] == []
    # An eighth of all but norms and biases, and never a copy of the whole in between.
    assert 0.125 < found["share"]["fsdp 4 x tensor 2"] < 0.17
    assert found["share_made"]["fsdp 4 x tensor 2"] < 0.3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mesh.fsdp": 3}, r"mesh.data=-1, mesh.fsdp=3, mesh.tensor=1: there are 8 devices, and 3 does not fill them"),
        ({"mesh.data": 2}, r"mesh.data=2, .* there are 8 devices, and 2 does not fill them; set mesh.data to -1"),
        ({"train.batch_size": 12}, r"train.batch_size=12 is not divisible by the 8 parts of a batch .*; use 8 or 16"),
        ({"mesh.tensor": 8, "model.n_heads": 4}, r"model.n_heads=4 is not divisible by mesh.tensor=8; use 8 heads"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parallel.make_mesh(settings("gpt", **values), [None] * 8)


@pytest.mark.parametrize(
    ("sizes", "model", "message"),
    [
        ((1, 1, 4), {"vocab_size": 26}, r"mesh.tensor=4: .*token/embedding has the shape \[26, 16\], .*vocab_size=28$"),
        ((1, 8, 1), {"d_model": 20}, r"mesh.fsdp=8: .* \[24, 20\], and 20 is not divisible by it; .*model.d_model=32$"),
    ],
)
def test_dimensions_that_do_not_divide_are_refused(sizes: Any, model: dict[str, int], message: str) -> None:
    config = settings("gpt", sizes, **{f"model.{name}": x for name, x in model.items()})
    mesh = parallel.abstract_mesh(sizes)
    shapes = {
        "base": {"embedding": {"token": {"embedding": np.zeros((config.model.vocab_size, config.model.d_model))}}}
    }
    with pytest.raises(UserError, match=message):
        parallel.shardings(mesh, shapes, "LanguageModel", config.model)


def test_the_table_tells_what_is_whole_on_every_device() -> None:
    config = settings("sst2")
    mesh = parallel.abstract_mesh((1, 4, 2))
    fresh, _ = loop.build(config, TASKS["sst2"](config), parallel.make_mesh(config, jax.devices()[:1]))
    shapes = jax.eval_shape(fresh).params
    rows = {path: rest for path, *rest in parallel.rows_of_table(mesh, shapes, "Classifier")}
    assert rows["embedding/token/embedding"] == ["tensor x fsdp", VOCAB * 16, VOCAB * 16 // 8]
    assert rows["(query|key|value|fc1|up)/bias"] == ["tensor", 3 * (3 * 16 + 64), 3 * (3 * 16 + 64) // 2]
    # Two norms of scale and bias, two biases of sums, in 3 blocks, and the classifier's head.
    whole = 3 * 6 * 16 + 2 * 16 + 2
    assert rows["all else"] == ["", whole, whole]
    n = sum(x.size for x in jax.tree.leaves(shapes))
    assert sum(total for _, total, _ in rows.values()) == n
    console = Console(record=True, width=120)
    console.print(parallel.table(mesh, shapes, "Classifier"))
    text = console.export_text()
    assert re.search(rf"all else\W+\(replicated\)\W+{whole}\W+{whole}\b", text)
    assert re.search(rf"together\W+{n:,}\b", text)
