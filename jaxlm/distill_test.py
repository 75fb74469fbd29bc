"""Distillation: losses against those of PyTorch, the student's initial weights, errors, and resuming."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxlm import config as configs
from jaxlm import distill, parallel, train
from jaxlm.errors import UserError
from jaxlm.tasks import TASKS
from jaxlm.testing import tiny_runs
from jaxlm.training import resume, teacher
from jaxlm.training.teacher import Teacher
from jaxlm.weights import snapshots
from jaxlm.weights.formats import RUN
from torchlm import train as torch_train

SETTINGS = (
    *("--task", "mlm", "--model.n-heads", "3", "--model.n-layers", "2", "--model.positions", "rotary"),
    *("--train.max-steps", "4", "--train.eval-interval", "2", "--train.batch-size", "4", "--train.warmup-steps", "1"),
)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write(tmp_path_factory.mktemp("runs") / "teacher", "mlm", **{"model.n_layers": 4})


def test_losses_are_those_of_pytorch() -> None:
    random = np.random.default_rng(0)
    logits, target = random.normal(size=(2, 3, 5, 11)).astype(np.float32)
    labels = random.integers(-1, 11, (3, 5))
    temperature = 2.5
    log_p, log_q = (torch.log_softmax(torch.tensor(x[labels >= 0]) / temperature, dim=-1) for x in (target, logits))
    want = temperature**2 * torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    np.testing.assert_allclose(distill.soft_loss(logits, target, labels, temperature), want, rtol=1e-5)

    x, y = random.normal(size=(2, 3, 7, 6)).astype(np.float32)
    is_pad = np.arange(7) >= np.array([[7], [4], [1]])
    each = [
        torch.nn.functional.cosine_embedding_loss(torch.tensor(a[~p]), torch.tensor(b[~p]), torch.ones(sum(~p)))
        for a, b, p in zip(x, y, is_pad, strict=True)
    ]
    counts = (labels >= 0).sum(axis=1)
    want = sum(n * float(one) for n, one in zip(counts, each, strict=True))
    np.testing.assert_allclose(distill.cosine_loss(x, y, is_pad, labels), want, rtol=1e-5)


def test_a_teacher_taught_by_itself_has_nothing_to_learn_and_no_dropout() -> None:
    config = configs.build({"task": "sst2", "model.vocab_size": 11, "model.d_model": 12, "model.n_heads": 3})
    config = configs.replace(configs.replace(config, "model.dropout", 0.5), "distill.hard_weight", 0.0)
    weights = tiny_runs.weights(config, 1)
    task = TASKS["sst2"](config)
    model = distill.model_of(Teacher(config, weights, ""), task, parallel.make_mesh(config, jax.devices()[:1]))
    batch: Any = {"tokens": np.arange(1, 11).reshape(2, 5), "labels": np.array([0, 1])}
    assert abs(float(distill.loss(task, model, model, batch, None)["loss"])) < 1e-5
    assert float(distill.loss(task, model, model, batch, jax.random.key(0))["loss"]) > 1e-2  # of the student


def test_a_student_has_evenly_spaced_layers_and_all_else() -> None:
    config = configs.build({"task": "mlm", "model.n_layers": 6, "model.vocab_size": 9, "model.d_model": 8})
    weights = tiny_runs.weights(config, 2)
    found = Teacher(config, weights, "").every_layer(3)
    for i, of in enumerate((0, 2, 4)):
        np.testing.assert_array_equal(
            found[f"base.blocks.{i}.attention.query.weight"], weights[f"base.blocks.{of}.attention.query.weight"]
        )
    assert len([name for name in found if "blocks" in name]) == len([name for name in weights if "blocks" in name]) / 2
    assert {name for name in weights if "blocks" not in name} == {name for name in found if "blocks" not in name}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("--model.n-layers", "3"), "model.n_layers=3: the student starts from every k-th of the 4 layers"),
        (("--model.seq-len", "8"), "model.seq_len=8, but distill.teacher="),
        (("--model.d-model", "24"), "model.d_model=24, but "),
        (("--distill.teacher", "nowhere/at/all"), "distill.teacher=nowhere/at/all: there is no such run"),
        (("--task", "sst2"), "task=sst2, but distill.teacher="),
        (
            ("--task", "gpt", "--model.pad-id", "0"),
            "task=gpt has no distillation; use mlm, sst2, cola or a task based on one",
        ),
        (
            ("--distill.soft-weight", "0", "--distill.hard-weight", "0", "--distill.cosine-weight", "0"),
            "are all 0; raise one of them",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(taught: Path, changes: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as caught:
        resume.load([*SETTINGS, "--distill.teacher", str(taught), *changes], "", RUN)
    assert told in str(caught.value)


def test_another_teacher_than_before_is_refused(taught: Path) -> None:
    found = resume.to_use(taught).path
    assert found is not None
    known = teacher.load(found)
    assert teacher.load(found, known.fingerprint).fingerprint == known.fingerprint
    with pytest.raises(UserError, match=r"weights differ from those of .* give that teacher with --distill.teacher"):
        teacher.load(found, "another")


@pytest.mark.slow
@pytest.mark.parametrize("program", [train.main, torch_train.main])
def test_a_run_with_a_teacher_goes_on_bit_for_bit(program: Any, taught: Path, tmp_path: Path) -> None:
    here = shutil.copytree(taught, tmp_path / "teacher")
    args = [*SETTINGS, "--distill.teacher", str(here)]
    assert program([*args, "--run.dir", str(tmp_path / "whole")]) == 0
    half = str(tmp_path / "half")
    assert program([*args, "--train.decay-steps", "4", "--train.max-steps", "2", "--run.dir", half]) == 0
    assert program(["--resume", half, "--train.max-steps", "4"]) == 0
    whole, again = (snapshots.read(resume.to_use(tmp_path / name).path) for name in ("whole", "half"))
    for name, x in whole.weights.items():
        np.testing.assert_array_equal(x, again.weights[name])
    assert {name.split(".")[2] for name in whole.weights if "blocks" in name} == {"0", "1"}

    here.rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="2"):
        program(["--resume", half, "--train.max-steps", "6"])
    moved = str(tmp_path / "elsewhere")
    own = ["--distill.teacher", moved, "--tokenizer.path", f"{half}/tokenizer.json"]
    assert program(["--resume", half, "--train.max-steps", "6", *own]) == 0
