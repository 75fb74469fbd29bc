"""Training a part: what is frozen stays to the bit, has no moments, and costs no product that is not needed."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxlm.train
import torchlm.load
import torchlm.optim
import torchlm.step
import torchlm.tasks
from jaxlm import checkpoint, convert, loop, optim, parallel
from jaxlm import config as configs
from jaxlm.checkpoint import Checkpoints
from jaxlm.cost import compile_ahead
from jaxlm.data import grammar
from jaxlm.errors import UserError
from jaxlm.inference import load
from jaxlm.io import checksums
from jaxlm.params import frozen, names
from jaxlm.params.snapshot import Snapshot
from jaxlm.tasks import flops, parameters
from jaxlm.weights import snapshots
from jaxlm.weights.formats import CHECKPOINT_1_2
from parity_tests.plan import random_batch, random_weights

SIZES = {"vocab_size": 17, "d_model": 12, "n_layers": 3, "n_heads": 3, "seq_len": 6, "dropout": 0.0}
FREEZES: list[dict[str, Any]] = [
    {"model.frozen_embedding": True, "model.positions": "learned"},
    {"model.frozen_layers": 2},
    {"model.frozen_layers": 3, "model.frozen_embedding": True, "model.tied_embedding": True},
    {"model.frozen_layers": 1, "model.lora_rank": 2, "model.lora_products": "key, fc1,fc2", "model.lora_alpha": 3.0},
]


def settings(**changes: Any) -> configs.Config:
    train = {"train.warmup_steps": 0, "train.weight_decay": 0.5, "train.learning_rate": 0.1, "train.batch_size": 2}
    return configs.build({"task": "gpt"} | train | {f"model.{name}": x for name, x in SIZES.items()} | changes)


def batches(config: configs.Config, n: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{name: x[None] for name, x in random_batch(config, random, 2).items()} for _ in range(n)]


def is_frozen(config: configs.Config, name: str) -> bool:
    """Return the rule anew, by torchlm's names."""
    if config.model.lora_rank and name.startswith("base.") and ".lora_" not in name:
        return True
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
    other = torchlm.step.init_state(model, torchlm.optim.make_optimizer(config.train, model))
    for batch in batches(config, 2):
        tensors = {name: torch.tensor(x).long() for name, x in batch.items()}
        torchlm.step.train_step(torchlm.step.Rule(lambda i: 0.1, 1.0), task.loss, other, tensors)
    found["torchlm"] = {name: x.detach().numpy() for name, x in model.named_parameters()}
    assert len(other.optimizer.state) == len(moments)
    for package, weights in found.items():
        same = {name for name in start if np.array_equal(weights[name], start[name])}
        assert same == {name for name in start if is_frozen(config, name)}, package


@pytest.mark.parametrize("changes", [*FREEZES, {}, {"task": "sst2", **FREEZES[2]}])
def test_an_update_has_the_products_that_are_needed_and_no_other(changes: dict[str, Any]) -> None:
    config = settings(**changes)
    mesh = parallel.abstract_mesh((2, 1, 1))  # on one device, rows of logits are rounded up
    update, arguments = compile_ahead.abstract_update(config, mesh)
    program = compile_ahead.needed(update.trace(*arguments).jaxpr.jaxpr)
    confusion = 2 * 2 * 2 * 3 if config.task == "sst2" else 0  # its matrix is a product of one-hot rows
    assert compile_ahead.product_flops(program) == flops.flops_per_update(config) + confusion


def test_the_rate_of_each_layer_is_that_of_the_paper() -> None:
    # BEiT's numbers: embedding 0, blocks 1 to L, head L + 1; the share is decay^(L + 1 - number).
    config = settings(**{"model.frozen_layers": 1, "model.final_norm": True})
    model = nnx.eval_shape(lambda: loop.TASKS["gpt"](config).build_model(nnx.Rngs(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape), nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))
    part = frozen.trained(config.model, params)
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


LORA = settings(**FREEZES[3])
INFO = {"format": 2, "task": "gpt", "rate": 0.1, "tokenizer": None, "sample_iter": 0, "config": configs.flat(LORA)}


def logits_of(config: configs.Config, weights: names.Arrays, tokens: np.ndarray) -> np.ndarray:
    model = loop.TASKS["gpt"](config).build_model(nnx.Rngs(0))
    nnx.update(model, names.to_jax(weights))
    return np.asarray(model(tokens))


def test_adapters_change_nothing_at_first_and_are_merged_on_export(tmp_path: Path) -> None:
    tokens = np.arange(1, 7, dtype=np.int32)[None]
    plain = configs.replace(LORA, "model.lora_rank", 0)
    start = loop.TASKS["gpt"](LORA).build_model(nnx.Rngs(0))
    weights = names.to_torch(nnx.to_pure_dict(nnx.state(start)))
    expected = logits_of(plain, names.without_adapters(weights), tokens)
    np.testing.assert_allclose(start(tokens), expected, rtol=0, atol=1e-6)

    weights = random_weights(LORA, 1)
    wanted = logits_of(LORA, weights, tokens)
    zero = {name: 0 * x if name.endswith("lora_b") else x for name, x in weights.items()}
    assert np.abs(wanted - logits_of(LORA, zero, tokens)).max() > 0.1
    snapshot = Snapshot(LORA, {**INFO, "step": 3, "val_loss": None}, weights, None, 0).merge_adapters()
    assert list(snapshot.weights) == list(parameters.shapes(plain))
    np.testing.assert_allclose(logits_of(plain, snapshot.weights, tokens), wanted, rtol=0, atol=3e-5)
    snapshots.write(tmp_path / "merged.pt", snapshot, CHECKPOINT_1_2)
    model, config = torchlm.load.load_model(tmp_path / "merged.pt")
    assert config.model.lora_rank == 0
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(tokens).long()).numpy(), wanted, rtol=0, atol=3e-5)


def state_at(i: int) -> Any:
    """Return a state with random numbers everywhere, a function of i but for what is frozen."""
    fresh, _ = loop.build(LORA, loop.TASKS["gpt"](LORA), parallel.make_mesh(LORA))
    state = fresh()
    random = np.random.default_rng(i)
    floats = lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype) if x.ndim else jnp.full_like(x, i)  # noqa: E731
    part = jax.tree.map(floats, frozen.trained(LORA.model, state.params))
    other = jax.tree.map(floats, state)
    return type(state)(other.step, frozen.with_trained(state.params, part), other.opt_state)


def test_what_is_frozen_is_stored_once_and_is_part_of_every_checkpoint(tmp_path: Path) -> None:
    one, two = state_at(1), state_at(2)
    folder = tmp_path / "checkpoints"
    stale = folder / checksums.FROZEN / "base" / "manifest.stale"
    stale.parent.mkdir(parents=True)
    stale.write_text("of a run that ended before its first checkpoint")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(one, INFO | {"step": 1}, {1: 1.0})
        checkpoints.wait()
        times = {path: path.stat().st_mtime_ns for path in sorted(folder.glob("frozen/**/*"))}
        checkpoints.save(two, INFO | {"step": 2}, {1: 1.0, 2: 2.0})
        restored = checkpoints.restore(1, two)
    assert not stale.exists()
    assert times == {path: path.stat().st_mtime_ns for path in sorted(folder.glob("frozen/**/*"))}
    jax.tree.map(np.testing.assert_array_equal, restored, one)
    for i, state in enumerate((one, two), start=1):
        stored = snapshots.read(folder / str(i))
        for name, x in names.to_torch(jax.device_get(state.params)).items():
            np.testing.assert_array_equal(stored.weights[name], x)
        assert stored.moments is not None
        assert list(stored.moments[0]) == [name for name in stored.weights if not is_frozen(LORA, name)]
    kept = names.to_torch(checkpoint.parts_of(one)["base"], LORA.model.frozen_layers)
    assert kept and all(re.search("lora_[ab]$", name) for name in kept)

    sums = (folder / "2" / checksums.FILE).read_text()
    assert f"../{checksums.FROZEN}/base/" in sums and not checksums.damage(folder / "2")
    (file,) = [path for path in (folder / checksums.FROZEN / "base").rglob("d/*") if path.is_file()][:1]
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    for parts in (None, ["base"]):
        with pytest.raises(UserError, match=f"damaged: ../{checksums.FROZEN}/base/.* does not match its checksum"):
            checksums.check(folder / "1", parts)
    checksums.check(folder / "1", ["head"])
    shutil.rmtree(folder / checksums.FROZEN)
    with pytest.raises(UserError, match="is missing"):
        snapshots.read(folder / "2")


@pytest.mark.slow
@pytest.mark.parametrize("changes", ["--model.lora-rank 2", "--model.frozen-layers 1 --model.frozen-embedding"])
def test_a_part_is_trained_resumed_exported_and_trained_further(
    changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    texts = [text for text, _ in grammar.sentences("sst2")["train"][:200]]
    Path("texts.txt").write_text("\n".join(texts))
    Path("labelled.tsv").write_text("".join(["sentence\tlabel\n", *(f"{x}\t{i % 2}\n" for i, x in enumerate(texts))]))

    def train(settings: str) -> None:
        sizes = "--train.batch-size 4 --train.warmup-steps 0 --train.eval-interval 2 --train.decay-steps 4"
        assert jaxlm.train.main(shlex.split(f"{sizes} {settings}")) == 0

    shape = "--model.d-model 12 --model.n-heads 3 --model.n-layers 2 --tokenizer.vocab-size 300"
    train(f"--task mlm --data.path texts.txt --model.seq-len 16 {shape} --train.max-steps 2 --run.dir base")
    data = f"--task sst2 --data.path labelled.tsv --model.seq-len 16 --init-from base {changes}"
    train(f"{data} --train.max-steps 4 --run.dir whole")
    train(f"{data} --train.max-steps 2 --run.dir parts")
    train("--resume parts --train.max-steps 4")
    one, two = (snapshots.read(Path(run)) for run in ("whole", "parts"))
    assert one.moments is not None and two.moments is not None
    for a, b in zip((one.weights, *one.moments), (two.weights, *two.moments), strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    base = snapshots.read(Path("base")).weights
    kept = [name for name in base if name in one.weights and np.array_equal(base[name], one.weights[name])]
    assert {"base.embedding.token.weight", "base.blocks.0.feed_forward.fc2.weight"} <= set(kept)

    assert convert.main(["whole", "whole.pt"]) == 0
    tokens = np.arange(1, 17, dtype=np.int32)[None]
    model, _ = load.load_model("whole/checkpoints/4")
    other, _ = torchlm.load.load_model("whole.pt")
    with torch.no_grad():
        np.testing.assert_allclose(other(torch.tensor(tokens).long()).numpy(), model(tokens), rtol=1e-4, atol=1e-5)
    train("--task mlm --data.path texts.txt --model.seq-len 16 --init-from whole --train.max-steps 2 --run.dir further")
    assert not any("lora" in name for name in snapshots.read(Path("further")).weights)
