"""A run that was interrupted and went on is the run that was not, byte for byte."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxlm import train
from jaxlm.data import grammar
from jaxlm.training import signals
from jaxlm.weights import snapshots

# Two epochs and a half; updates 5, 10 and 15 are evaluated, at four batches each.
TINY = (
    "--model.d-model 12 --model.n-heads 3 --model.n-layers 2 --model.seq-len 16 --model.dropout 0.2 "
    "--tokenizer.vocab-size 300 --train.batch-size 8 --train.accumulate 2 --train.cycle-steps 3 --train.log-interval 2 "
    "--train.warmup-steps 3 --train.max-steps 15 --train.eval-interval 5 "
)
N_POINTS = 45  # looks for a signal in a run, at least


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "sentences.txt"
    path.write_text("".join(f"{text}\n" for text, _ in grammar.sentences("sst2")["train"][:160]))
    return path


def run(texts: Path, folder: Path, settings: str = "") -> int:
    data = f"--data.path {texts} --data.validation-fraction 0.2 --data.cache-dir {texts.parent}/cache"
    return train.main(shlex.split(f"{TINY} {data} --run.dir {folder} {settings}"))


def content(folder: Path) -> dict[str, Any]:
    """Return all of a run that is to be the same: rows but for their speed, samples, and the last checkpoint."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    snapshot = snapshots.read(folder)
    assert snapshot.moments is not None
    del snapshot.info["val_loss"]  # which a checkpoint lacks where a signal has ended its evaluation
    return {
        "rows": [{name: x for name, x in row.items() if name != "tokens_per_s"} for row in rows],
        "samples": (folder / "samples.txt").read_text(),
        "counters": (snapshot.n_updates, snapshot.info),
        **{
            name: {key: x.tobytes() for key, x in arrays.items()}
            for name, arrays in zip(("weights", "first", "second"), (snapshot.weights, *snapshot.moments), strict=True)
        },
    }


@contextlib.contextmanager
def interrupted_at(call: int, patch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGINT) -> Iterator[list[int]]:
    """Have a signal come at the n-th time that a run looks for one; the list has how often it did."""
    calls = [0]

    @contextlib.contextmanager
    def interrupts(run_log: Any) -> Iterator[Any]:
        def status() -> int:
            calls[0] += 1
            return 128 + number if calls[0] >= call else 0

        yield status

    with patch.context() as inner:
        inner.setattr(signals, "interrupts", interrupts)
        yield calls


@pytest.fixture(scope="module")
def undisturbed(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch, interrupted_at(10**9, patch) as calls:
        assert run(texts, folder) == 0
    assert calls[0] >= N_POINTS
    found = content(folder)
    assert [row["step"] for row in found["rows"] if row["split"] == "validation"] == [5, 10, 15]
    return found


def goes_on_alike(points: list[int], texts: Path, tmp_path: Path, patch: pytest.MonkeyPatch, undisturbed: Any) -> None:
    for point in points:
        folder = tmp_path / str(point)
        with interrupted_at(point, patch):
            assert run(texts, folder, "--resume auto") == 130
        assert run(texts, folder, "--resume auto") == 0
        found = content(folder)
        for name, value in undisturbed.items():
            assert found[name] == value, (point, name)


# Between two updates, and in an evaluation.
def test_a_run_interrupted_at_some_points_goes_on_alike(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    goes_on_alike([8, 17], texts, tmp_path, monkeypatch, undisturbed)


@pytest.mark.slow
def test_a_run_interrupted_at_many_points_goes_on_alike(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    goes_on_alike(list(range(2, N_POINTS, 7)), texts, tmp_path, monkeypatch, undisturbed)


@pytest.mark.slow
def test_a_run_interrupted_again_and_again_goes_on_alike(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    statuses = []
    while 0 not in statuses and len(statuses) < 20:
        with interrupted_at(12, monkeypatch):
            statuses.append(run(texts, tmp_path / "run", "--resume auto"))
    assert statuses[-1] == 0 and len(statuses) > 3
    assert content(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_a_run_by_muon_goes_on_alike(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = "--resume auto --train.optimizer muon"
    for name, calls in (("whole", (10**9,)), ("interrupted", (8, 10**9))):
        for call in calls:
            with interrupted_at(call, monkeypatch):
                assert run(texts, tmp_path / name, settings) == (130 if call == 8 else 0)
    assert content(tmp_path / "interrupted") == content(tmp_path / "whole")


def test_signals_have_their_exit_status(launch: Any, texts: Path, tmp_path: Path) -> None:
    settings = f"{TINY} --data.path {texts} --train.max-steps 1000000 --run.dir run --resume auto"
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = launch(settings, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in process.stdout:
            if line.startswith("first update done"):
                break
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == status, output
        assert "Next, resume it: python -m jaxlm.train --resume run" in output
