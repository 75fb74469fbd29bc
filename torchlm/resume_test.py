"""A resumed run equals an uninterrupted one, byte for byte; and what happens on a loss of NaN."""

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from jaxlm.data import grammar
from jaxlm.testing.resume_after_kill_test import interrupted_at
from torchlm import checkpoint, train
from torchlm.tasks import TASKS
from torchlm.tasks.sst2 import Sst2

# Two epochs and a half; updates 5, 10 and 15 are evaluated, at four batches each.
TINY = (
    "--task sst2 --model.d-model 12 --model.n-heads 3 --model.n-layers 2 --model.seq-len 16 --model.dropout 0.2 "
    "--tokenizer.vocab-size 300 --train.batch-size 8 --train.accumulate 2 --train.cycle-steps 3 --train.log-interval 2 "
    "--train.warmup-steps 3 --train.max-steps 15 --train.eval-interval 5 --data.validation-fraction 0.2 "
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "sentences.tsv"
    rows = grammar.sentences("sst2")["train"][:160]
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


def run(table: Path, folder: Path, settings: str = "") -> int:
    data = f"--data.path {table} --data.cache-dir {table.parent}/cache"
    return train.main(shlex.split(f"{TINY} {data} --run.dir {folder} {settings}"))


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name != "tokens_per_s"} for row in found]


def content(folder: Path) -> dict[str, Any]:
    """Return all of a run that is to be the same: rows but for their speed, samples, and the last checkpoint."""
    stored = checkpoint.read(folder / "checkpoints" / "15.pt")
    arrays = {**stored["base_model"], **stored["lm_head"]}
    for i, entry in stored["optimizer"]["state"].items():
        arrays |= {f"{i} {name}": x for name, x in entry.items()}
    return {
        "rows": rows(folder),
        "samples": (folder / "samples.txt").read_text(),
        "counters": (stored["iter"], stored["sample_iter"], stored["lr"], stored["config"]["torchlm"]["info"]),
        "arrays": {name: x.numpy().tobytes() for name, x in arrays.items()},
    }


@pytest.mark.parametrize(
    ("optimizer", "n_points"),
    [("adamw", 3), *(pytest.param(name, 8, marks=pytest.mark.slow) for name in ("adamw", "muon"))],
)
def test_a_run_interrupted_anywhere_goes_on_alike(
    optimizer: str, n_points: int, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = f"--train.optimizer {optimizer} --resume auto"
    with interrupted_at(10**9, monkeypatch) as calls:
        assert run(table, tmp_path / "whole", settings) == 0
    assert calls[0] > 40
    whole = content(tmp_path / "whole")
    for point in range(1, calls[0], calls[0] // n_points):
        folder = tmp_path / str(point)
        with interrupted_at(point, monkeypatch, signal.SIGTERM):
            assert run(table, folder, settings) == 143
        assert run(table, folder, settings) == 0
        found = content(folder)
        for name, value in whole.items():
            assert found[name] == value, (point, name)


class Poisoned(Sst2):
    """SST-2 with a loss of NaN for a batch with the label 1 in almost every row, which is rare."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor], key: None) -> Any:
        totals = super().loss(model, batch, key)
        is_poisoned = model.training and batch["labels"].sum() >= 7
        return totals | {"loss": totals["loss"] * torch.nan} if is_poisoned else totals


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_loss_that_is_no_number_ends_the_run_or_is_left_out(
    policy: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "sst2", Poisoned)
    folder = tmp_path / "run"
    settings = f"--train.on-nonfinite {policy} --train.log-interval 1 --train.eval-interval 1 --train.seed 5"
    if policy == "stop":
        with pytest.raises(SystemExit):
            run(table, folder, settings)
        error = capsys.readouterr().err
        last = rows(folder)[-1]["step"]
        assert f"is nan at step {last + 1}, and was finite at step {last}" in error
        return
    assert run(table, folder, settings) == 0
    output = capsys.readouterr()
    steps = [row["step"] for row in rows(folder) if row["split"] == "train"]
    assert steps == list(range(1, 16))
    bad = [row["step"] for row in rows(folder) if row["loss"] is None]
    weights = checkpoint.read(folder / "checkpoints" / "15.pt")["base_model"]
    assert all(x.isfinite().all() for x in weights.values())
    if policy == "skip":
        assert bad and all(f"step {step}: the loss is nan" in output.err for step in bad)
        assert f"because they were NaN or infinite: {', '.join(map(str, bad))}" in output.out
    else:
        assert (
            not bad and "step 3: the loss or gradient is NaN or infinite: back to step 2, without samples" in output.err
        )
