"""Checkpoint files: the original's are read and written again alike, and a run's folder keeps the best and the last."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jaxlm import config as configs
from jaxlm.data import metrics
from jaxlm.errors import UserError
from torchlm import checkpoint, loop, optim, schedule, step
from torchlm.checkpoint import Checkpoints
from torchlm.loss import Totals, cross_entropy
from torchlm.tasks import TASKS

CASES = Path(__file__).parent.parent / "parity_tests" / "cases"
B, T, V = 2, 5, 11
SIZES = {"vocab_size": V, "d_model": 12, "n_layers": 2, "n_heads": 3, "seq_len": T, "dropout": 0.0}


def config_of(task: str = "gpt", **settings: Any) -> configs.Config:
    return configs.build({"task": task, **{f"model.{name}": x for name, x in SIZES.items()}, **settings})


def recorded_config(name: str) -> configs.Config:
    case = json.loads((CASES / name / "case.json").read_text())
    sizes = {f"model.{name}": case[name] for name in ("vocab_size", "d_model", "n_layers", "seq_len")}
    train = {"train.weight_decay": case["weight_decay"], "train.learning_rate": case["learning_rate"]}
    train |= {"train.min_learning_rate": case["min_learning_rate"], "train.warmup_steps": case["warmup_iters"]}
    train |= {"train.max_steps": case["steps"], "train.decay_steps": case["lr_decay_iters"]}
    settings = {"model.n_heads": case["heads"], "train.batch_size": case["batch_size"]} | sizes | train
    return configs.build({"task": name, "model.head_outputs": "vocabulary"} | settings)


def start(config: configs.Config) -> step.TrainState:
    model = TASKS[config.task](config).build_model(torch.Generator().manual_seed(0))
    return step.init_state(model, optim.make_optimizer(config.train, model))


def info_of(config: configs.Config, i: int) -> dict[str, Any]:
    rate = schedule.learning_rate(config.train)(i - 1)
    n = i * config.train.batch_size
    return {
        "step": i,
        "sample_iter": n,
        "task": config.task,
        "rate": rate,
        "config": configs.flat(config),
        "tokenizer": "x",
    }


def flat(value: Any, path: tuple = ()) -> dict[tuple, Any]:
    """Return the leaves of nested dicts, lists and tuples by their path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {path: value}
    return {key: leaf for name, x in items for key, leaf in flat(x, (*path, name)).items()}


@pytest.mark.parametrize("name", ["mlm", "gpt", "sst2", "cola"])
def test_a_recorded_file_is_read_and_written_again_alike(name: str, tmp_path: Path) -> None:
    config, path = recorded_config(name), CASES / name / "checkpoint.pt"
    state = loop.restored(path, start(config))
    arrays = np.load(CASES / name / "arrays.npz")
    prefix = "gpt" if name == "gpt" else "bert"
    np.testing.assert_array_equal(
        state.model.base.blocks[0].attention.output.weight.detach(),
        arrays[f"final/{prefix}.encoder_blocks.0.self_multihead.output_linear.weight"],
    )
    assert state.step == 12

    again = tmp_path / "again.pt"
    checkpoint.write(again, checkpoint.content(state, info_of(config, 12), 1.0))
    before, after = (torch.load(x, weights_only=True) for x in (path, again))
    assert list(after) == list(before) == list(checkpoint.KEYS)
    # The recorded rate has the ramp of a cycle of 1e9 updates, and the recorded settings some that are not ours.
    rate = after.pop("lr")
    assert rate == pytest.approx(before.pop("lr"), rel=1e-8)
    settings, recorded = flat(after.pop("config")), flat(before.pop("config"))
    assert {key: x for key, x in settings.items() if key in recorded} == {
        key: x for key, x in recorded.items() if key in settings
    }
    assert {key[1] for key in recorded.keys() - settings.keys()} == {
        *("val_iters", "test_iters", "resume_warmup_iters", "switch_training", "dont_load_optimizer")
    }
    before, after = flat(before), flat(after)
    assert after.keys() == before.keys()
    for key, x in before.items():
        assert torch.equal(after[key], x) if isinstance(x, torch.Tensor) else after[key] == x, key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model.positions": "learned", "model.tied_embedding": True, "model.post_norm": True},
        {"model.positions": "rotary", "model.final_norm": True},
    ],
)
@pytest.mark.parametrize("task", ["mlm", "gpt", "sst2"])
def test_a_restored_state_goes_on_alike(task: str, options: dict, tmp_path: Path) -> None:
    config = config_of(task, **options)
    state = start(config)
    batches = {"tokens": torch.randint(1, V, (1, B, T)), "labels": torch.tensor([[0, 1]])}
    rate = schedule.learning_rate(config.train)

    def loss(model: Any, batch: Any, key: None) -> Totals:
        return cross_entropy(model(batch["tokens"]).flatten(1), batch["labels"])

    for _ in range(2):
        step.train_step(step.Rule(rate, 1.0), loss, state, batches)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, info_of(config, 2), {2: 1.0})
        other = loop.restored(checkpoints.path(2), start(configs.replace(config, "train.seed", 1)))
    assert other.step == 2
    losses = [float(step.train_step(step.Rule(rate, 1.0), loss, x, batches)[1]["loss"]) for x in (state, other)]
    assert losses[0] == losses[1]
    weights, weights_2 = state.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weights_2[name], x) for name, x in weights.items())


def test_the_best_and_the_last_are_kept(tmp_path: Path) -> None:
    config = config_of()
    state, checkpoints = start(config), Checkpoints(tmp_path / "checkpoints")
    losses: dict[int, float] = {}
    assert metrics.best(checkpoints.steps(), losses) is None
    kept = []
    for i, loss in enumerate([3.0, 1.0, None, 2.0, 1.0, None, None], start=1):
        state.step = i
        losses |= {} if loss is None else {i: loss}
        checkpoints.save(state, info_of(config, i), losses)
        kept.append(
            (metrics.best(checkpoints.steps(), losses), sorted(int(path.stem) for path in checkpoints.folder.iterdir()))
        )
    expected = [(1, [1]), (2, [2]), (2, [2, 3]), (2, [2, 4]), (2, [2, 5]), (2, [2, 6]), (2, [2, 7])]
    assert kept == expected


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "3.pt"
    checkpoint.write(path, {"version": "1.2"})
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle|local object"):
        checkpoint.write(path, {"version": "1.2", "wrong": lambda: None})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class Harmful:
    """What torch.load must never call."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("called"),)


def test_files_that_are_no_checkpoint_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, path = config_of(), tmp_path / "x.pt"

    def told() -> str:
        with pytest.raises(UserError) as error:
            loop.restored(path, start(config))
        assert str(error.value).startswith(f"{path}: ")
        return str(error.value)

    assert "cannot be read" in told()
    path.write_bytes(b"nothing of the kind")
    assert "neither a file of torch.save nor safetensors" in told()
    torch.save({"version": "1.2", "wrong": Harmful()}, path)
    assert "refused: its pickle" in told()
    assert not Path("called").exists()
    torch.save([1, 2], path)
    assert "it has a value of type list" in told()
    content = checkpoint.content(start(config), info_of(config, 1), 1.0)
    torch.save({name: x for name, x in content.items() if name != "lm_head"}, path)
    assert "it lacks lm_head" in told()
    torch.save(content | {"version": "1.1"}, path)
    assert "version 1.1, but only 1.2" in told()
    wide = config_of(**{"model.d_model": 18})
    torch.save(checkpoint.content(start(wide), info_of(wide, 1), 1.0), path)
    assert "base.embedding.token.weight has the shape [11, 18], but the model needs [11, 12]" in told()


def test_the_masks_of_all_blocks_take_the_space_of_one(tmp_path: Path) -> None:
    sizes = []
    for n_layers in (1, 5):
        config = config_of(**{"model.n_layers": n_layers, "model.d_model": 3, "model.seq_len": 200})
        path = tmp_path / f"{n_layers}.pt"
        checkpoint.write(path, checkpoint.content(start(config), info_of(config, 1), 1.0))
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] < 4 * 200 * 200


@pytest.mark.parametrize(("keep", "kept"), [(1, [2, 6]), (3, [2, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_as_many_of_the_last_are_kept_as_asked_for(keep: int, kept: list[int], tmp_path: Path) -> None:
    config = config_of()
    state, checkpoints = start(config), Checkpoints(tmp_path / "checkpoints", keep)
    losses: dict[int, float] = {}
    for i in range(1, 7):
        state.step, losses[i] = i, abs(i - 2)
        checkpoints.save(state, info_of(config, i), losses)
    assert checkpoints.steps() == kept


def test_a_save_that_fails_warns_and_the_next_one_is_tried(tmp_path: Path) -> None:
    config, warnings = config_of(), []
    state, checkpoints = start(config), Checkpoints(tmp_path / "checkpoints", warn=warnings.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for i in (1, 2, 3):
        state.step = i
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if i == 2 else limits[0], limits[1]))
        try:
            checkpoints.save(state, info_of(config, i), {1: 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["1.pt", "3.pt"]
    (warning,) = warnings
    assert warning.startswith("the checkpoint of step 2 could not be saved (")
    assert checkpoints.summary().startswith("2 checkpoints saved; each stopped training for ")
