"""Updates that are no numbers, in whole runs inside this process: the policies of train.on_nonfinite."""

import json
import random
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import train
from jaxlm.data import grammar
from jaxlm.inference import load
from jaxlm.tasks import TASKS
from jaxlm.tasks.sst2 import Sst2

TINY = (
    "--task sst2 --model.d-model 12 --model.n-heads 3 --model.n-layers 1 --model.seq-len 16 --tokenizer.vocab-size 300 "
    "--train.batch-size 4 --train.log-interval 1 --train.warmup-steps 0 --train.learning-rate 0.01 "
    "--train.max-steps 20 --train.eval-interval 3 --data.test-fraction 0 --data.validation-fraction 0.2 "
)


class Poisoned(Sst2):
    """SST-2 with a loss of NaN for a batch with the label 1 in every row, which is rare."""

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Any:
        totals = super().loss(model, batch, key)
        is_poisoned = (key is not None) & jnp.all(batch["labels"] == 1)
        return totals | {"loss": jnp.where(is_poisoned, jnp.nan, totals["loss"])}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentences") / "sentences.tsv"
    rows = random.Random(0).sample(grammar.sentences("sst2")["train"], 200)
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


@pytest.fixture
def run(sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that trains with some settings and returns the exit status and the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(sentences.parent))
    monkeypatch.setitem(TASKS, "sst2", Poisoned)

    def train_with(settings: str, name: str = "run") -> tuple[int, Path]:
        folder = tmp_path / name
        argv = shlex.split(f"{TINY} --data.path {sentences} --run.dir {folder} {settings}")
        try:
            return train.main(argv), folder
        except SystemExit as error:
            return int(error.code or 0), folder

    return train_with


def rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["split"] == split]


def test_stop_names_the_step_and_keeps_the_last_good_checkpoint(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, folder = run("")
    assert status == 2
    error = capsys.readouterr().err
    bad = rows(folder)[-1]["step"] + 1
    assert f"is nan at step {bad}, and was finite at step {bad - 1}" in error
    (saved,) = {int(path.name) for path in (folder / "checkpoints").iterdir()} - {0}
    assert saved == (bad - 1) // 3 * 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(load.load_model(folder)[0])))


def test_skip_leaves_out_the_update_and_counts_it(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, folder = run("--train.on-nonfinite skip")
    output = capsys.readouterr()
    assert status == 0
    skipped = [row["step"] for row in rows(folder) if row["loss"] is None]
    assert skipped and len(rows(folder)) == 20
    assert (
        f"{len(skipped)} updates were skipped, because they were NaN or infinite: {', '.join(map(str, skipped))}"
        in (output.out.replace("1 update was", "1 updates were"))
    )
    assert [f"step {step}: the loss is nan" in output.err for step in skipped]
    assert all(np.isfinite(row["loss"]) for row in rows(folder, "validation"))


def test_rollback_goes_on_without_the_samples_of_the_update(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, folder = run("--train.on-nonfinite rollback")
    output = capsys.readouterr()
    assert status == 0, output.err
    assert "is NaN or infinite: back to step" in output.err
    assert [row["step"] for row in rows(folder)] == list(range(1, 21))
    assert all(np.isfinite(row["loss"]) for row in rows(folder))
    assert [row["step"] for row in rows(folder, "validation")] == [3, 6, 9, 12, 15, 18, 20]
    # Interrupted and resumed, it skips the same samples.
    status, other = run("--train.on-nonfinite rollback --train.max-steps 14 --train.decay-steps 20", "other")
    status, other = run("--train.on-nonfinite rollback --train.decay-steps 20 --resume auto", "other")
    assert status == 0
    timeless = [[{k: x for k, x in row.items() if k != "tokens_per_s"} for row in rows(x)] for x in (folder, other)]
    assert timeless[0] == timeless[1]
