"""Conversion against the recorded original, both trainers' own checkpoints, and every way and back bit for bit."""

import json
import os
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm import config as configs
from jaxlm import convert, optim, parallel, schedule, step
from jaxlm import loop as jax_loop
from jaxlm import tasks as jax_tasks
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import Config
from jaxlm.params import muon, names
from jaxlm.params.snapshot import Snapshot
from jaxlm.tasks import parameters
from jaxlm.weights import snapshots
from jaxlm.weights.formats import CHECKPOINT_1_2, RUN, SAFETENSORS, STATE_DICT
from torchlm import checkpoint as torch_checkpoint
from torchlm import loop as torch_loop
from torchlm import parallel as torch_parallel
from torchlm import tasks as torch_tasks

CASES = Path(__file__).parent.parent / "parity_tests" / "cases"
SIZES = {"vocab_size": 11, "d_model": 12, "n_heads": 3, "seq_len": 5, "n_layers": 2, "dropout": 0.0}
MODELS = {
    "mlm, as the original": ("mlm", {}),
    "mlm, tied and learned": ("mlm", {"model.tied_embedding": True, "model.positions": "learned"}),
    "gpt, rotary, norm at the end": ("gpt", {"model.positions": "rotary", "model.final_norm": True}),
    "gpt, tied, norms after": ("gpt", {"model.tied_embedding": True, "model.post_norm": True, "model.pad_id": -1}),
    "sst2 of three labels": ("sst2", {"data.n_labels": 3, "model.positions": "learned", "model.final_norm": True}),
    "cola with the slip": ("cola", {"model.head_outputs": "vocabulary", "model.post_norm": True}),
    "sst2 with adapters": ("sst2", {"model.lora_rank": 2, "model.lora_products": "output,fc2"}),
    "gpt by Muon": ("gpt", {"train.optimizer": "muon", "model.frozen_layers": 1, "model.n_kv_heads": 1}),
    "gpt in part": ("gpt", {"model.frozen_embedding": True, "model.frozen_layers": 1, "train.layer_decay": 0.5}),
}
SUFFIXES = {RUN: "", CHECKPOINT_1_2: ".pt", STATE_DICT: ".pt", SAFETENSORS: ".safetensors"}


def config_of(task: str, **settings: Any) -> Config:
    train = {"train.warmup_steps": 2, "train.max_steps": 9, "train.batch_size": 2, "train.weight_decay": 0.1}
    return configs.build({"task": task, **{f"model.{name}": x for name, x in SIZES.items()}, **train, **settings})


def snapshot_of(config: Config) -> Snapshot:
    """Return a training state of random bits: NaNs, infinities, tiny and negative zero numbers are among them."""
    random = np.random.default_rng(0)

    def arrays() -> dict[str, np.ndarray]:
        shapes = parameters.shapes(config)
        return {
            name: random.integers(0, 2**32, shape, np.uint32, endpoint=False).view(np.float32)
            for name, shape in shapes.items()
        }

    info = {"step": 7, "task": config.task, "rate": 0.1 + 0.2, "tokenizer": "a hash", "sample_iter": 17}
    weights, *moments = arrays(), *(names.trained(config.model, arrays()) for _ in range(2))
    moments[1] = muon.with_second_moment(config.train, moments[1])
    return Snapshot(config, {**info, "val_loss": 1 / 3}, weights, (moments[0], moments[1]), n_updates=5)


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for name, x in a.items():
        assert (x.dtype, x.shape, x.tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes()), name


def assert_same(a: Snapshot, b: Snapshot) -> None:
    assert (a.config, a.info, a.n_updates) == (b.config, b.info, b.n_updates)
    assert_same_bits(a.weights, b.weights)
    assert a.moments is not None and b.moments is not None
    for x, y in zip(a.moments, b.moments, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("model", MODELS)
def test_every_form_gives_back_every_bit(model: str, tmp_path: Path) -> None:
    task, settings = MODELS[model]
    snapshot = last = snapshot_of(config_of(task, **settings))
    # Each form is read into the next one: all of them have the same.
    for i, form in enumerate((RUN, CHECKPOINT_1_2, SAFETENSORS, RUN)):
        path = tmp_path / f"{i}{SUFFIXES[form]}"
        snapshots.write(path, last, form)
        last = snapshots.read(path)
        assert_same(last, snapshot)
    snapshots.write(tmp_path / "weights.pt", last, STATE_DICT)
    bare = snapshots.read(tmp_path / "weights.pt", snapshot.config)
    assert_same_bits(bare.weights, snapshot.weights)
    assert (bare.moments, bare.n_updates, bare.info["step"]) == (None, 0, 0)


@pytest.mark.parametrize("form", [RUN, CHECKPOINT_1_2, SAFETENSORS])
def test_a_state_without_moments_stays_one(form: str, tmp_path: Path) -> None:
    snapshot = snapshot_of(config_of("gpt"))
    snapshot = Snapshot(snapshot.config, {**snapshot.info, "val_loss": None}, snapshot.weights, None, 0)
    snapshots.write(tmp_path / f"x{SUFFIXES[form]}", snapshot, form)
    back = snapshots.read(tmp_path / f"x{SUFFIXES[form]}")
    assert (back.info, back.moments, back.n_updates) == (snapshot.info, None, 0)
    assert_same_bits(back.weights, snapshot.weights)


def same(a: Any, b: Any) -> bool:
    """Return whether two checkpoints of PyTorch are equal, tensors bit for bit, in whatever order of keys."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("case", sorted(path.name for path in CASES.iterdir()))
def test_a_recorded_checkpoint_of_the_original_converts_to_jaxlm_and_back(case: str, tmp_path: Path) -> None:
    source, run, back = CASES / case / "checkpoint.pt", tmp_path / "run", tmp_path / "back.pt"
    convert.main([str(source), str(run)])
    convert.main([str(run), str(back)])
    original = torch.load(source, weights_only=True)
    assert same(original, torch.load(back, weights_only=True))

    config = snapshots.read(run).config
    settings = json.loads((CASES / case / "case.json").read_text())
    state = restored(run, config)
    assert int(state.step) == original["iter"] == int(state.opt_state[0].count) == int(state.opt_state[2].count)
    info = json.loads((run / "checkpoints" / str(original["iter"]) / "info" / "metadata").read_text())
    assert info["rate"] == settings["lr"][original["iter"] - 1]
    # All that the original was told, in jaxlm's words.
    model, train = config.model, config.train
    told = [config.task, model.vocab_size, model.d_model, model.n_layers, model.n_heads, model.seq_len]
    assert told == [settings[name] for name in ("task", "vocab_size", "d_model", "n_layers", "heads", "seq_len")]
    told = [train.max_steps, train.learning_rate, train.min_learning_rate, train.warmup_steps, train.decay_steps]
    keys = ("steps", "learning_rate", "min_learning_rate", "warmup_iters", "lr_decay_iters")
    assert told == [settings[name] for name in keys]
    told = [train.weight_decay, train.batch_size, [train.beta1, train.beta2], train.epsilon]
    assert told == [settings[name] for name in ("weight_decay", "batch_size", "betas", "eps")]

    # Some tensors by hand: PyTorch's optimizer numbers the decayed ones first, in model order.
    blocks, moments = original["base_model"], original["optimizer"]["state"]
    n_decayed = len(original["optimizer"]["param_groups"][0]["params"])
    adam = state.opt_state[0]
    last_output = f"encoder_blocks.{model.n_layers - 1}.self_multihead.output_linear.weight"
    for got, want in [
        (state.params["base"]["blocks"]["attention"]["output"]["kernel"][-1], blocks[last_output].T),
        (adam.mu["base"]["embedding"]["token"]["embedding"], moments[0]["exp_avg"]),
        (adam.mu["base"]["blocks"]["feed_forward"]["fc1"]["kernel"][0], moments[5]["exp_avg"].T),
        (adam.nu["head"]["linear"]["kernel"], moments[n_decayed - 1]["exp_avg_sq"].T),
        (adam.nu["base"]["blocks"]["attention"]["query"]["bias"][0], moments[n_decayed + 2]["exp_avg_sq"]),
        (adam.mu["head"]["linear"]["bias"], moments[len(moments) - 1]["exp_avg"]),
    ]:
        np.testing.assert_array_equal(got, want.numpy())


def fresh(config: Config) -> tuple[step.TrainState, jax_loop.Compiled]:
    """Return jaxlm's state before the first update, and its compiled functions."""
    mesh = parallel.make_mesh(config, jax.devices()[:1])
    build, compiled = jax_loop.build(config, jax_tasks.TASKS[config.task](config), mesh)
    return build(), compiled


def restored(run: Path, config: Config) -> step.TrainState:
    """Return the last state in a run folder, as jaxlm's own class restores it."""
    task = jax_tasks.TASKS[config.task](config)
    shapes = nnx.eval_shape(lambda: nnx.to_pure_dict(nnx.split(task.build_model(nnx.Rngs(0)), nnx.Param)[1]))
    params = jax.tree.map(lambda x: jax.numpy.asarray(np.zeros(x.shape, x.dtype)), shapes)
    like = step.init_state(
        params, optim.make_optimizer(config.train, schedule.learning_rate(config.train), config.model.n_layers)
    )
    with Checkpoints(run / "checkpoints") as checkpoints:
        return checkpoints.restore(checkpoints.steps()[-1], like)


def batches_of(config: Config) -> list[dict[str, np.ndarray]]:
    """Return four updates of one batch each, [A, B, ...]."""
    random = np.random.default_rng(1)
    shape = (1, config.train.batch_size, config.model.seq_len)
    batches = []
    for _ in range(4):
        tokens, labels = random.integers(1, SIZES["vocab_size"], (2, *shape), np.int32)
        batches.append({"tokens": tokens, "labels": labels})
        if config.task == "mlm":
            positions = np.array([[[0, 3], [4, 1]]], np.int32)
            batches[-1] |= {"positions": positions, "labels": np.take_along_axis(labels, positions, axis=2)}
    return batches


def jax_updates(state: step.TrainState, compiled: jax_loop.Compiled, batches: list) -> tuple[step.TrainState, Any]:
    for batch in batches:
        state, metrics = compiled.update(state, batch, jax.random.key(0))
    return state, metrics


def torch_fresh(config: Config) -> tuple[Any, Any]:
    mesh = torch_parallel.Mesh(0, 1, torch.device("cpu"))
    build, compiled = torch_loop.build(config, torch_tasks.TASKS[config.task](config), mesh)
    return build(), compiled


def torch_updates(state: Any, compiled: Any, batches: list) -> tuple[Any, Any]:
    for batch in batches:
        tensors = {name: torch.from_numpy(x).long() for name, x in batch.items()}
        state, metrics = compiled.update(state, tensors, (0, 0))
    return state, metrics


def assert_same_update(config: Config, jax_result: tuple[Any, Any], torch_result: tuple[Any, Any]) -> None:
    (jax_state, jax_metrics), (torch_state, torch_metrics) = jax_result, torch_result
    for name in ("loss", "count", "rate", "grad_norm"):
        assert float(jax_metrics[name]) == pytest.approx(float(torch_metrics[name]), rel=1e-6), name
    assert int(jax_state.step) == torch_state.step == 4
    weights = torch_state.model.state_dict()
    for name, x in names.to_torch(jax.device_get(jax_state.params)).items():
        # The gradient of a key's bias is only rounding error, which Adam turns into full steps.
        atol = 2 * config.train.learning_rate if name.endswith("key.bias") else 1e-7
        np.testing.assert_allclose(x, weights[name].numpy(), rtol=1e-6, atol=atol, err_msg=name)


def test_a_run_of_jaxlm_goes_on_in_torchlm(tmp_path: Path) -> None:
    config = config_of("mlm", **{"model.final_norm": True})
    batches = batches_of(config)
    state, compiled = fresh(config)
    state, metrics = jax_updates(state, compiled, batches[:3])
    info = {
        "format": 2,
        "step": 3,
        "sample_iter": 6,
        "task": "mlm",
        "rate": float(metrics["rate"]),
        "tokenizer": "a hash",
    }
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(state, {"format": 2, **info, "config": configs.flat(config)}, {3: 2.5})
    convert.main([str(tmp_path / "run"), str(tmp_path / "3.pt")])

    written = torch_checkpoint.read(tmp_path / "3.pt")
    assert (written["iter"], written["sample_iter"], written["lr"], written["val_loss"]) == (3, 6, info["rate"], 2.5)
    torch_state, torch_compiled = torch_fresh(config)
    torch_state = torch_loop.restored(tmp_path / "3.pt", torch_state)
    assert torch_state.optimizer.param_groups[1]["lr"] == info["rate"]
    results = jax_updates(state, compiled, batches[3:]), torch_updates(torch_state, torch_compiled, batches[3:])
    assert_same_update(config, *results)


def test_a_run_of_torchlm_goes_on_in_jaxlm(tmp_path: Path) -> None:
    config = config_of("gpt", **{"model.tied_embedding": True, "model.positions": "learned"})
    batches = batches_of(config)
    torch_state, torch_compiled = torch_fresh(config)
    torch_state, metrics = torch_updates(torch_state, torch_compiled, batches[:3])
    info = {"step": 3, "sample_iter": 6, "task": "gpt", "rate": float(metrics["rate"]), "tokenizer": "a hash"}
    with torch_checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(torch_state, {**info, "config": configs.flat(config)}, {})
    convert.main([str(tmp_path / "3.pt"), str(tmp_path / "run")])

    _, compiled = fresh(config)
    state = restored(tmp_path / "run", config)
    results = jax_updates(state, compiled, batches[3:]), torch_updates(torch_state, torch_compiled, batches[3:])
    assert_same_update(config, *results)
    again, origins = configs.load(["--config", str(tmp_path / "run" / "config.toml")])
    assert again == config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training state in all forms, and files that are none or were damaged."""
    folder = tmp_path_factory.mktemp("files")
    snapshot = snapshot_of(config_of("mlm"))
    for name, form in (("run", RUN), ("all.pt", CHECKPOINT_1_2), ("weights.pt", STATE_DICT)):
        snapshots.write(folder / name, snapshot, form)
    snapshots.write(folder / "all.safetensors", snapshot, SAFETENSORS)
    for task in ("mlm", "gpt"):
        (folder / f"{task}.toml").write_text(configs.dump(config_of(task)))

    class Unsafe:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return os.mkdir, (str(folder / "ran"),)

    def changed(name: str, change: Callable[[dict], Any]) -> None:
        content = torch.load(folder / "all.pt", weights_only=True)
        change(content)
        torch.save(content, folder / name)

    weights = torch.load(folder / "weights.pt", weights_only=True)
    torch.save({**weights, "base.extra": torch.ones(2, 3)}, folder / "extra.pt")
    torch.save({name: x.double() for name, x in weights.items()}, folder / "double.pt")
    torch.save({"weights": Unsafe()}, folder / "unsafe.pt")
    (folder / "unsafe.pickle").write_bytes(pickle.dumps(Unsafe()))
    torch.save([1, 2], folder / "list.pt")
    changed("version.pt", lambda x: x.update(version="1.1"))
    changed("headless.pt", lambda x: x["lm_head"].pop("linear.bias"))
    changed("misshaped.pt", lambda x: x["base_model"].update({"encoder_blocks.1.feed_forward.fc2.bias": torch.ones(7)}))
    changed("gpt.pt", lambda x: (x.update(task_type="gpt"), x["config"]["torchlm"]["settings"].update(task="gpt")))
    changed("momentless.pt", lambda x: x["optimizer"]["state"].pop(3))
    changed("sgd.pt", lambda x: [x.pop("exp_avg_sq") for x in x["optimizer"]["state"].values()])
    changed("moments.pt", lambda x: x["optimizer"]["state"][1].update(exp_avg=torch.ones(3, 4)))
    changed("counts.pt", lambda x: x["optimizer"]["state"][1].update(step=torch.tensor(4.0)))
    changed("groups.pt", lambda x: x["optimizer"]["param_groups"].reverse())
    changed("setting.pt", lambda x: x["config"]["torchlm"]["settings"].update({"model.d_modle": 3}))
    changed("value.pt", lambda x: x["config"]["torchlm"]["settings"].update({"model.d_model": "wide"}))
    changed("words.pt", lambda x: x.update(config={"model": {}}))
    for name, n in (("all.pt", 9_000), ("all.safetensors", 9_000), ("weights.pt", 3_000)):
        (folder / f"short_{name}").write_bytes((folder / name).read_bytes()[:-n])
    flipped = bytearray((folder / "all.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (folder / "flipped.pt").write_bytes(flipped)
    (folder / "notes.txt").write_text("some notes")
    (folder / "empty").mkdir()
    (folder / "torchlm" / "checkpoints").mkdir(parents=True)
    (folder / "torchlm" / "checkpoints" / "9.pt").write_bytes(b"")
    snapshots.write(folder / "broken", snapshot, RUN)
    data = max((folder / "broken" / "checkpoints" / "7" / "base").rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:100])
    return folder


BAD = {
    "no such file": ("nothing.pt x", "nothing.pt: cannot be read (No such file or directory)"),
    "text": ("notes.txt x", "notes.txt: neither a file of torch.save nor safetensors, nor the folder of a jaxlm run"),
    "empty folder": ("empty x", "empty: a folder without a checkpoint of jaxlm"),
    "run of torchlm": ("torchlm x", "give a file of it, such as torchlm/checkpoints/9.pt"),
    "list": ("list.pt x", "neither a checkpoint 1.2 nor a state dict: it has a value of type list"),
    "unsafe": ("unsafe.pt x", "unsafe.pt: refused: its pickle"),
    "unsafe pickle": ("unsafe.pickle x", "unsafe.pickle: refused: its pickle"),
    "truncated 1.2": ("short_all.pt x", "short_all.pt: cannot be read as a file of torch.save"),
    "truncated state dict": ("short_weights.pt x", "short_weights.pt: cannot be read as a file of torch.save"),
    "truncated safetensors": ("short_all.safetensors x", "short_all.safetensors: cannot be read as safetensors"),
    "truncated run": ("broken x", "broken/checkpoints/7: damaged: base/"),
    "flipped bit": ("flipped.pt x", "flipped.pt: damaged: its part data/"),
    "version": ("version.pt x", "checkpoint of version 1.1, but only 1.2 can be read"),
    "missing": ("headless.pt x", "headless.pt: weights of another model: head.linear.bias [11] is missing"),
    "extra": ("extra.pt x --config {folder}/mlm.toml", "base.extra [2, 3] is not in the model"),
    "misshaped": ("misshaped.pt x", "base.blocks.1.feed_forward.fc2.bias has the shape [7], but the model needs [12]"),
    "other head": ("weights.pt x --config {folder}/gpt.toml", "head.layernorm.weight [12] is not in the model"),
    "other head in 1.2": (
        "gpt.pt x",
        "gpt.pt: weights of another model: head.layernorm.weight [12] is not in the model",
    ),
    "float64": ("double.pt x --config {folder}/mlm.toml", "token.weight is float64, but can be read as float32"),
    "moment missing": ("momentless.pt x", "its optimizer has [] for base.blocks.0.attention.value.weight"),
    "not AdamW": ("sgd.pt x", "has ['exp_avg', 'step'] for base.embedding.token.weight, but AdamW has"),
    "misshaped moment": (
        "moments.pt x",
        "first moments of the optimizer: weights of another model: base.blocks.0.attention.query.weight has the shape "
        "[3, 4], but the model needs [12, 12]",
    ),
    "two counts": ("counts.pt x", "its optimizer has counted [4, 5] updates"),
    "groups": ("groups.pt x", "its optimizer has groups of [23, 14] tensors, but the model [14, 23], decayed first"),
    "unknown setting": ("setting.pt x", "its setting model.d_modle is unknown here; did you mean model.d_model?"),
    "value of a setting": ("value.pt x", "value.pt: in its settings: Expected `int`, got `str` - at `$.model.d_model`"),
    "settings of no one": ("words.pt x", "words.pt: not as a checkpoint 1.2 is: KeyError"),
    "no settings": ("weights.pt x", "weights.pt: bare weights without settings; give those of their run with --config"),
    "settings twice": ("all.pt x --config {folder}/mlm.toml", "all.pt has settings of its own; leave --config away"),
    "file is there": ("run all.pt", "all.pt: is there already; give a new name, or remove it"),
    "folder is there": ("all.pt empty", "empty: is there already; give a new name, or remove it"),
    "no such folder": ("all.pt no/x", "the folder {folder}/no does not exist; make it first"),
    "state dict by another name": ("all.pt x --state-dict", "--state-dict writes a file of torch.save"),
    "no target": ("all.pt", "TARGET is missing (--help shows how to call it)"),
    "unknown flag": ("--inspekt all.pt", "--inspekt"),
    "inspect and convert": ("all.pt x --inspect run", "--inspect FILE goes alone"),
    "inspect text": ("--inspect notes.txt", "notes.txt: neither a file of torch.save nor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_status_2_and_leaves_nothing(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        convert.main(BAD[name][0].format(folder=folder).split())
    stdout, stderr = capfd.readouterr()
    assert (stop.value.code, stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", stderr)
    assert BAD[name][1].format(folder=folder) in stderr
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("target", ["x.pt", "x.safetensors"])
def test_what_cannot_be_written_whole_is_not_there(
    target: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as if the disk were full
        with pytest.raises(SystemExit) as stop:
            convert.main([str(folder / "all.safetensors"), str(tmp_path / target)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: \S+{target}: cannot be written: [^\n]+\n", capfd.readouterr().err)
    assert not any(tmp_path.iterdir())


def test_the_last_checkpoint_of_a_run_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    snapshot = snapshot_of(config_of("gpt"))
    for n in (9, 10):
        other = Snapshot(snapshot.config, {**snapshot.info, "step": n}, snapshot.weights, None, 0)
        snapshots.write(tmp_path / str(n), other, RUN)
    run = tmp_path / "10" / "checkpoints"
    (tmp_path / "9" / "checkpoints" / "9").rename(run / "9")
    taken = [snapshots.read(path).info["step"] for path in (tmp_path / "10", run, run / "9")]
    assert taken == [10, 10, 9]


def test_safetensors_have_weights_moments_and_settings_where_they_should_be(folder: Path) -> None:
    snapshot = snapshot_of(config_of("mlm"))
    assert snapshot.moments is not None
    name = "base.blocks.1.attention.query.weight"
    with safe_open(folder / "all.safetensors", framework="np") as file:
        assert len(file.keys()) == 3 * len(snapshot.weights) + 1
        for key, array in (
            (name, snapshot.weights[name]),
            (f"optimizer.first_moment.{name}", snapshot.moments[0][name]),
            (f"optimizer.second_moment.{name}", snapshot.moments[1][name]),
            ("optimizer.step", np.array(5)),
        ):
            assert file.get_tensor(key).tobytes() == array.tobytes(), key
        info = json.loads(file.metadata()["jaxlm"])
    assert (info["step"], info["rate"], info["val_loss"]) == (7, 0.1 + 0.2, 1 / 3)
    assert info["config"] == configs.flat(snapshot.config)


def test_bare_safetensors_need_settings_and_then_are_a_start(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    weights = snapshot_of(config_of("mlm")).weights
    save_file(weights, tmp_path / "bare.safetensors")
    # Settings from before the tokenizer was known.
    (tmp_path / "c.toml").write_text((folder / "mlm.toml").read_text().replace("vocab_size = 11\n", "vocab_size = 0\n"))
    convert.main([str(tmp_path / "bare.safetensors"), str(tmp_path / "run"), "--config", str(tmp_path / "c.toml")])
    snapshot = snapshots.read(tmp_path / "run")
    assert (snapshot.config.model.vocab_size, snapshot.info["step"], snapshot.moments) == (11, 0, None)
    assert_same_bits(snapshot.weights, weights)


@pytest.mark.parametrize(
    "name, form, step_, row",
    [
        ("run", "jaxlm run", "7", "base/blocks/feed_forward/fc1/kernel [2, 12, 48]"),
        ("all.pt", "checkpoint 1.2", "7", "base_model/encoder_blocks.1.feed_forward.fc2.bias [12]"),
        ("weights.pt", "state dict", "unknown", "base.blocks.1.feed_forward.fc2.bias [12]"),
        ("all.safetensors", "safetensors", "7", "optimizer.second_moment.head.linear.weight [11, 12]"),
    ],
)
def test_inspect_tells_names_shapes_types_norms_and_counts(
    name: str, form: str, step_: str, row: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With weights whose norm is defined.
    snapshot = snapshot_of(config_of("mlm"))
    random = np.random.default_rng(2)
    arrays = [
        {key: random.standard_normal(x.shape).astype(np.float32) for key, x in snapshot.weights.items()}
        for _ in range(3)
    ]
    path = tmp_path / f"x{Path(name).suffix}"
    snapshots.write(path, Snapshot(snapshot.config, snapshot.info, arrays[0], (arrays[1], arrays[2]), 5), form)
    assert convert.main(["--inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    lines = [re.sub(r"  +", "  ", line) for line in out.splitlines()]
    assert lines[0].endswith(f": {form}")
    assert f"step  {step_}" in lines
    assert f"task  {'unknown' if form == STATE_DICT else 'mlm'}" in lines
    assert f"rate  {'unknown' if form == STATE_DICT else 0.1 + 0.2}" in lines
    assert f"format  {dict(zip(SUFFIXES, ('2', '1.2', 'unknown', '1'), strict=True))[form]}" in lines
    n_block = 2 * (4 * (12 * 12 + 12) + 2 * 24 + 12 * 48 + 48 + 48 * 12 + 12)
    counts = {"base.embedding": 132, "base.blocks": n_block, "head": 24 + 11 * 12 + 11}
    told = next(line for line in lines if line.startswith("parameters"))
    assert told.startswith(f"parameters  {sum(counts.values()):,}: ")
    assert set(told.partition(": ")[2].split(", ")) == {f"{part} {n:,}" for part, n in counts.items()}

    key, shape = row.split(" ", 1)
    array = {
        "run": np.stack([arrays[0][f"base.blocks.{i}.feed_forward.fc1.weight"] for i in range(2)]),
        "all.safetensors": arrays[2]["head.linear.weight"],
    }.get(name, arrays[0]["base.blocks.1.feed_forward.fc2.bias"])
    norm = np.sqrt(np.sum(array.astype(np.float64) ** 2))
    assert f"{key}  {shape}  float32  {norm:.6g}" in lines
    n_tensors = {RUN: 3 * 21 + 1, CHECKPOINT_1_2: 37 + 1 + 3 * 37, STATE_DICT: 37, SAFETENSORS: 3 * 37 + 1}
    assert len(lines) == 7 + n_tensors[form]


def errors_in(stderr: str) -> list[str]:
    """Return the lines but those of steps that take more than 5 s, which a busy machine has."""
    return [line for line in stderr.splitlines() if " ..." not in line]


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300)


def test_help_imports_no_framework() -> None:
    code = """
import atexit, sys
from jaxlm import convert
@atexit.register
def _():
    print({"jax", "torch", "orbax"} & sys.modules.keys())
convert.main(["--help"])
"""
    result = python(code)
    assert (result.returncode, errors_in(result.stderr)) == (0, [])
    assert "SOURCE TARGET" in result.stdout and "--inspect FILE" in result.stdout
    assert result.stdout.splitlines()[-1] == "set()"


def test_without_pytorch_all_but_its_files_convert(folder: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from jaxlm.convert import main; sys.exit(main(sys.argv[1:]))"
    result = python(code, str(folder / "run"), str(tmp_path / "x.safetensors"))
    assert (result.returncode, errors_in(result.stderr)) == (0, [])
    assert (tmp_path / "x.safetensors").read_bytes() == (folder / "all.safetensors").read_bytes()
    for source, target in ((folder / "all.safetensors", tmp_path / "x.pt"), (folder / "all.pt", tmp_path / "x")):
        result = python(code, str(source), str(target))
        assert result.returncode == 2
        line = r"error: \S+/(x|all)\.pt: needs PyTorch, which is not installed: pip install 'jaxlm\[torch\]'\n"
        assert re.fullmatch(line, result.stderr)
        assert not target.exists()


def test_safetensors_are_told_whatever_the_length_of_their_header(tmp_path: Path) -> None:
    # The length comes first. Its first byte is that of a pickle in one file of 32; two can be those of a zip archive.
    path, starts = tmp_path / "x.safetensors", set()
    for n in (*range(0, 256, 8), int.from_bytes(b"PK", "little") - 88):
        save_file({"w": np.zeros(1)}, path, {"padding": "x" * n})  # 88 bytes are around it
        starts.add(path.read_bytes()[:2])
        assert snapshots.load(path).form == SAFETENSORS
    assert {b"PK", b"\x80\0"} < starts
