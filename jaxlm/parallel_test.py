"""The same training on 1, 2 and 4 devices, each in a process of its own; XLA splits the CPU into as many."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm import loop, parallel
from jaxlm.errors import UserError
from jaxlm.tasks import TASKS

BATCH, ACCUMULATE = 8, 2


def train_a_little() -> dict:
    """Return the losses and gradient norms of three updates with dropout, and evaluated totals after them."""
    config = configs.build(
        {
            "task": "gpt",
            "train.batch_size": BATCH,
            "train.accumulate": ACCUMULATE,
            "train.warmup_steps": 0,
            "train.learning_rate": 0.01,
            "model.vocab_size": 11,
            "model.d_model": 12,
            "model.n_layers": 1,
            "model.n_heads": 3,
            "model.seq_len": 6,
            "model.dropout": 0.2,
        }
    )
    mesh = parallel.make_mesh(BATCH)
    fresh, compiled = loop.build(config, TASKS["gpt"](config), mesh)
    state = fresh()
    random = np.random.default_rng(0)
    result: dict = {"devices": mesh.size, "loss": [], "grad_norm": []}
    for _ in range(3):
        shape = (ACCUMULATE, BATCH, 6)
        batch = {"tokens": random.integers(0, 11, shape), "labels": random.integers(-1, 11, shape)}
        on_devices = parallel.put_batch(mesh, {name: x.astype(np.int32) for name, x in batch.items()}, axis=1)
        rows = {shard.data.shape[1] for x in on_devices.values() for shard in x.addressable_shards}
        assert rows == {BATCH // mesh.size}
        state, metrics = compiled.update(state, on_devices, jax.random.key(0))
        for name in ("loss", "grad_norm"):
            result[name].append(float(metrics[name]))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    totals = compiled.totals(state.params, parallel.put_batch(mesh, {name: x[0] for name, x in batch.items()}))
    result |= {name: float(totals[name]) for name in ("count", "correct")} | {"final_loss": float(totals["loss"])}
    try:
        parallel.make_mesh(6)
    except UserError as error:
        result["error"] = str(error)
    return result


def test_losses_are_the_same_on_any_number_of_devices() -> None:
    script = "import json; from jaxlm import parallel_test; print(json.dumps(parallel_test.train_a_little()))"
    processes = []
    for n in (2, 4):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={n}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as conftest.py has it in this process
        }
        command = [sys.executable, "-c", script]
        processes.append(subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    expected = train_a_little()
    assert expected.pop("devices") == 1
    for n, process in zip((2, 4), processes, strict=True):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        result = json.loads(output)
        assert result.pop("devices") == n
        # 6 rows are 3 for each of 2 devices, and no whole number for 4.
        error = result.pop("error", None)
        assert error == {2: None, 4: "train.batch_size=6 is not divisible by the 4 devices; use 4 or 8"}[n]
        # Sums over the batch in another order: a few roundings of 6e-8, which three updates enlarge.
        assert result == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
