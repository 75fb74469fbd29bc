"""The command, which must notice what is wrong; bad folders. The replays themselves are in checks_test.py."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jaxlm.errors import UserError
from parity_tests import case as cases


def run_replay(*folders: Path, without: Sequence[str] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "parity_tests.replay", *map(str, folders)]
    env = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


def test_the_command_tells_what_is_apart_and_exits_1(tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(cases.CASES / "cola", folder)
    values = json.loads((folder / "case.json").read_text())
    values["grad_norm"][3] *= 1 + 3e-5
    (folder / "case.json").write_text(json.dumps(values))
    done = run_replay(folder)
    assert done.returncode == 1
    failed = [line.split() for line in done.stdout.splitlines() if "FAIL" in line]
    assert [line[:2] for line in failed[:2]] == [["wrong", "jaxlm"], ["wrong", "torchlm"]]
    assert all(line[2:5] == ["norms", "of", "gradients"] and line[-2:] == ["update", "3"] for line in failed[:2])
    assert done.stdout.endswith("2 of 44 quantities FAIL\n")


@pytest.mark.slow
@pytest.mark.longest  # .ci/run does the same with the newest versions
def test_the_command_passes_on_all_recorded_cases_with_all_optimizations() -> None:
    done = run_replay(without=["XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"])
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("\nall 260 quantities pass\n")


def test_the_command_exits_2_with_one_line_for_a_folder_that_is_no_case(tmp_path: Path) -> None:
    done = run_replay(tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def spoil_json(**changes: Any) -> Any:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / "case.json").read_text())
        (folder / "case.json").write_text(json.dumps(values | changes))

    return spoil


def spoil_arrays(**changes: Any) -> Any:
    def spoil(folder: Path) -> None:
        arrays = dict(np.load(folder / "arrays.npz"))
        np.savez(folder / "arrays.npz", **{name: x for name, x in (arrays | changes).items() if x is not None})

    return spoil


def spoil_checkpoint(key: str, value: Any) -> Any:
    def spoil(folder: Path) -> None:
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(checkpoint | {key: value}, folder / "checkpoint.pt")

    return spoil


BIAS = "classifier_model.classifier.bias"
SPOILED = [
    (lambda folder: (folder / "checkpoint.pt").unlink(), "checkpoint.pt is missing"),
    (lambda folder: (folder / "case.json").write_text("{"), "case.json: cannot be read as JSON"),
    (lambda folder: (folder / "arrays.npz").write_bytes(b"PK"), "arrays.npz: cannot be read as arrays"),
    (lambda folder: (folder / "checkpoint.pt").write_bytes(b"PK"), "checkpoint.pt: cannot be read as a checkpoint"),
    (spoil_json(task="qa"), r"case.json: Invalid enum value 'qa' - at \$.task"),
    (spoil_json(dropout=0.1), r"case.json: Expected float <= 0.0 - at \$.dropout"),
    (spoil_json(heads=5), "d_model=32 must be even and divisible by heads=5"),
    (spoil_json(lr=[0.0]), "lr has 1 entries, but there are steps=12"),
    (spoil_json(resume_at=12), "resume_at=12 is not below steps=12"),
    (spoil_json(resume_at=3, after_resume={"eps": 1e-3}), "after_resume.eps: only learning_rate, "),
    (spoil_json(n_layers=2), r"checkpoint.pt: weights of another model: base.blocks.1.layernorm1.weight \[32\] is m"),
    (spoil_arrays(**{f"grad0/{BIAS}": None}), r"grad0/: weights of another model: head.linear.bias \[61\] is missing"),
    (spoil_arrays(**{f"init/{BIAS}": np.zeros(2)}), r"init/: .*: head.linear.bias has the shape \[2\], but the model"),
    (spoil_arrays(x=None), "x is missing"),
    (spoil_arrays(y=np.zeros((26, 5), int)), r"y has the shape \[26, 5\], but the case needs \[26, 6\]"),
    (spoil_arrays(y=np.full((26, 6), 61)), "y has values that are no ids of vocab_size=61"),
    (spoil_arrays(x=np.zeros((3, 6, 16), int), y=np.zeros((3, 6), int)), "x has 3 batches, but the updates consume 12"),
    (spoil_checkpoint("optimizer", {"state": {}, "param_groups": []}), "no checkpoint of this case's run"),
    (spoil_checkpoint("version", "1.1"), "checkpoint of version 1.1"),
]


@pytest.mark.parametrize("spoil, message", SPOILED)
def test_a_bad_folder_is_told_in_one_line(spoil: Any, message: str, tmp_path: Path) -> None:
    shutil.copytree(cases.CASES / "cola", tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(UserError, match=message) as error:
        cases.load(tmp_path / "bad")
    assert str(error.value).startswith(str(tmp_path / "bad"))
