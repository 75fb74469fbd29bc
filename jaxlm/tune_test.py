"""Training a part: what is frozen stays to the bit, has no moments, and costs no product that is not needed."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import torchlm.optim
import torchlm.step
import torchlm.tasks
from jaxlm import ahead, flops, loop, names, optim, parallel, tune
from jaxlm import config as configs
from parity_tests.plan import random_batch

SIZES = {"vocab_size": 17, "d_model": 12, "n_layers": 3, "n_heads": 3, "seq_len": 6, "dropout": 0.0}
FREEZES: list[dict[str, Any]] = [
    {"model.frozen_embedding": True, "model.positions": "learned"},
    {"model.frozen_layers": 2},
    {"model.frozen_layers": 3, "model.frozen_embedding": True, "model.tied_embedding": True},
]


def settings(**changes: Any) -> configs.Config:
    train = {"train.warmup_steps": 0, "train.weight_decay": 0.5, "train.learning_rate": 0.1, "train.batch_size": 2}
    return configs.build({"task": "gpt"} | train | {f"model.{name}": x for name, x in SIZES.items()} | changes)


def batches(config: configs.Config, n: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{name: x[None] for name, x in random_batch(config, random, 2).items()} for _ in range(n)]


def is_frozen(config: configs.Config, name: str) -> bool:
    """Return the rule anew, by torchlm's names."""
    if name.startswith("base.embedding."):
        return config.model.frozen_embedding
    return name.startswith("base.blocks.") and int(name.split(".")[2]) < config.model.frozen_layers


@pytest.mark.parametrize("changes", FREEZES)
def test_what_is_frozen_stays_to_the_bit_in_both_packages_and_all_else_changes(changes: dict[str, Any]) -> None:
    config = settings(**changes)
    fresh, compiled = loop.build(config, loop.TASKS["gpt"](config), parallel.make_mesh(config))
    state = fresh()
    start = names.to_torch(jax.device_get(state.params))
    for batch in batches(config, 2):
        state, _ = compiled.update(state, batch, jax.random.key(0))
    found = {"jaxlm": names.to_torch(jax.device_get(state.params))}
    first, _, _ = optim.moments(state.opt_state)
    moments = names.to_torch(jax.device_get(first), config.model.frozen_layers)
    assert sorted(moments) == sorted(name for name in start if not is_frozen(config, name))

    task = torchlm.tasks.TASKS["gpt"](config)
    model = task.build_model(torch.Generator())
    model.load_state_dict({name: torch.tensor(x) for name, x in start.items()})
    other = torchlm.step.init_state(model, torchlm.optim.adamw(config.train, model))
    for batch in batches(config, 2):
        tensors = {name: torch.tensor(x).long() for name, x in batch.items()}
        torchlm.step.train_step(task.loss, lambda i: 0.1, 1.0, other, tensors)
    found["torchlm"] = {name: x.detach().numpy() for name, x in model.named_parameters()}
    assert len(other.optimizer.state) == len(moments)
    for package, weights in found.items():
        same = {name for name in start if np.array_equal(weights[name], start[name])}
        assert same == {name for name in start if is_frozen(config, name)}, package


@pytest.mark.parametrize("changes", [*FREEZES, {}, {"task": "sst2", **FREEZES[2]}])
def test_an_update_has_the_products_that_are_needed_and_no_other(changes: dict[str, Any]) -> None:
    config = settings(**changes)
    mesh = jax.sharding.AbstractMesh((2, 1, 1), configs.AXES)  # on one device, rows of logits are rounded up
    update, arguments = ahead.abstract_update(config, mesh)
    program = ahead.needed(update.trace(*arguments).jaxpr.jaxpr)
    confusion = 2 * 2 * 2 * 3 if config.task == "sst2" else 0  # its matrix is a product of one-hot rows
    assert ahead.product_flops(program) == flops.flops_per_update(config) + confusion


def test_the_rate_of_each_layer_is_that_of_the_paper() -> None:
    # BEiT's numbers: embedding 0, blocks 1 to L, head L + 1; the share is decay^(L + 1 - number).
    config = settings(**{"model.frozen_layers": 1, "model.final_norm": True})
    model = nnx.eval_shape(lambda: loop.TASKS["gpt"](config).build_model(nnx.Rngs(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape), nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))
    part = tune.trained(config.model, params)
    full = jax.tree.map(lambda x, share: x + share, part, optim.layer_shares(part, 0.5, 3))
    for name, x in names.to_torch(full, 1).items():
        number = 4
        if name.startswith("base.embedding"):
            number = 0
        elif name.startswith("base.blocks"):
            number = 1 + int(name.split(".")[2])
        assert np.all(x == 0.5 ** (4 - number)), name
    other = torchlm.tasks.TASKS["gpt"](config).build_model(torch.Generator())
    shares = torchlm.optim.layer_shares(other, 0.5)
    assert {name: x.flat[0] for name, x in names.to_torch(full, 1).items()} == names.trained(config.model, shares)
