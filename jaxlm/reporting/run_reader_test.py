"""What run folders tell, and the commands of jaxlm.runs that show it, compare runs, and clean up."""

import fcntl
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlm import runs
from jaxlm.inference import load
from jaxlm.io import checksums
from jaxlm.reporting import run_reader
from jaxlm.testing import tiny_runs
from jaxlm.training.resume_test import damage, write_run
from jaxlm.weights import formats

LOSSES = {10: 3.0, 20: 2.0, 30: 2.5}


def write(path: Path, task: str = "mlm", is_tested: bool = True, **settings: Any) -> Path:
    """Write a run of 30 updates whose checkpoint of step 20 is the best."""
    tiny_runs.write(path, task, dict(LOSSES), **{"train.max_steps": 30, "train.batch_size": 4, **settings})
    rows = [{"step": i, "split": "train", "loss": 3.5, "tokens_per_s": 100.0 * i} for i in (10, 20, 30)]
    score = "accuracy" if task == "sst2" else "loss"
    rows += [{"step": i, "split": "validation", score: 0.5, "loss": loss} for i, loss in LOSSES.items()]
    rows += [{"step": 20, "split": "test", score: 0.25, "loss": 2.25}] if is_tested else []
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    try:
        status = runs.main([str(arg) for arg in argv])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_table_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "runs" / "first", "sst2")
    write(tmp_path / "runs" / "deeper" / "second", **{"train.max_steps": 40}, is_tested=False)
    third = write(tmp_path / "runs" / "third", "gpt", is_tested=False)
    (third / "metrics.jsonl").unlink()
    (tmp_path / "runs" / "nothing").mkdir()
    for path in [*first.iterdir(), *third.iterdir()]:
        os.utime(path, (path.stat().st_mtime - (3 * 3600 if first in path.parents else 600),) * 2)
    with open(third / ".lock", "w") as lock:
        lock.write("process 12 on host\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.chdir(tmp_path)
        status, output, errors = told(capsys)
        rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
        assert (status, errors) == (0, "")
        size = run_reader.size(sum(path.stat().st_size for path in first.rglob("*") if path.is_file()))
        assert rows[0][:4] == ["runs/deeper/second", "mlm", "30 of 40", "loss 2.0000 (step 20)"]
        assert rows[0][4] in [f"{n} s" for n in range(60)] and rows[0][6] == "interrupted"
        assert rows[1][1:5] == ["gpt", "30 of 30", "loss 2.0000 (step 20)", "10 min"] and rows[1][6] == "running"
        assert rows[2] == ["runs/first", "sst2", "30 of 30", "accuracy 0.5000 (step 20)", "3 h", size, "finished"]
        assert [told(capsys, *argv)[0] for argv in (["runs"], ["list", "runs"])] == [0, 0]
        status, output, _ = told(capsys, "show", third)
        assert "task gpt, running, by process 12 on host" in output
    assert run_reader.read(third).state == "finished"
    assert run_reader.read(write(tmp_path / "ended by the file stop", **{"train.max_steps": 40})).state == "stopped"


def test_what_a_run_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", "sst2")
    status, output, _ = told(capsys, "show", run)
    assert status == 0
    for line in (
        "updates      30 of 30",
        "speed        2,000 tokens/s (median)",
        "validation   accuracy 0.5000  loss 2.0000  (step 20)",
        "test         accuracy 0.2500  loss 2.2500  (step 20)",
        "  model.d_model = 12",
        "validation loss 2.0000, the best",
    ):
        assert line in output
    assert "train.seed" not in output  # a default


def test_runs_are_compared_where_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other", is_tested=False, **{"train.learning_rate": 0.5})
    status, output, _ = told(capsys, "compare", one, other)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    assert status == 0
    assert rows[0] == ["train.learning_rate", "0.001", "0.5"]
    assert ["validation loss", "2.0000", "2.0000"] in rows and ["test loss", "2.2500", "-"] in rows
    status, _, errors = told(capsys, "compare", one)
    assert status == 2 and "needs another run to compare with" in errors


def test_runs_of_torchlm_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", formats.CHECKPOINT_1_2)
    (run / "config.toml").write_text('task = "mlm"\n[train]\nmax_steps = 10\n')
    (run / "metrics.jsonl").write_text('{"step": 6, "split": "validation", "loss": 1.5}\n')
    found = run_reader.read(run)
    assert [(x.step, x.path.suffix, x.loss) for x in found.checkpoints] == [
        (3, ".pt", None),
        (6, ".pt", 1.5),
        (9, ".pt", None),
    ]
    assert found.best is not None and found.best.step == 6
    assert told(capsys, "clean", run, "--yes")[0] == 0
    assert steps(run) == ["6.pt", "9.pt"]  # the best, and the last, since it has 10 updates to make


def test_clean_keeps_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run")
    (run / "checkpoints" / "10").rename(run / "checkpoints" / "10.damaged")
    unfinished = write(tmp_path / "other", is_tested=False, **{"train.max_steps": 40}) / "checkpoints" / "10"
    (unfinished / checksums.FILE).unlink()
    status, output, errors = told(capsys, "clean", tmp_path)
    assert status == 2 and "there is no terminal to ask for confirmation; add --yes" in errors
    assert steps(run) == ["10.damaged", "20", "30"]
    status, output, _ = told(capsys, "clean", tmp_path, "--yes")
    assert status == 0 and "removed 3 checkpoints" in output and f"{unfinished}: " in output
    assert steps(run) == ["20"] and steps(tmp_path / "other") == ["20", "30"]
    assert told(capsys, "clean", tmp_path)[:2] == (0, "there is nothing to remove\n")
    load.load_model(run)


def test_clean_leaves_alone_what_is_damaged_or_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = write(tmp_path / "run"), write(tmp_path / "other")
    damage(run, 20)
    with open(other / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, output, _ = told(capsys, "clean", tmp_path, "--yes")
    assert status == 0 and "there is nothing to remove" in output
    assert "checkpoints/20: damaged: head/" in output and f"{other}: another process uses it; not changed" in output
    assert steps(run) == steps(other) == ["10", "20", "30"]


@pytest.mark.parametrize(
    ("answer", "left"), [(b"y\n", ["20"]), (b"\n", ["10", "20", "30"]), (b"\x04", ["10", "20", "30"])]
)
def test_clean_asks(answer: bytes, left: list[str], tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm.runs", "clean", str(run)], stdin=there, stdout=subprocess.PIPE, text=True
    )
    os.close(there)
    os.write(here, answer)
    output, _ = process.communicate(timeout=300)
    os.close(here)
    assert "Remove 2 checkpoints, " in output and "[y/N]" in output
    assert (process.returncode, steps(run)) == (0 if len(left) == 1 else 1, left)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "nothing"], "nothing: there is no such run"),
        (["show", "."], ".: is not a run folder: it has no config.toml"),
        (["list", "nothing"], "nothing: there is no such folder"),
        (["cleam"], "cleam: neither a command nor a folder; did you mean clean?"),
        (["."], ".: there is no readable run; train one with"),
        (["compare"], "the following arguments are required: PATH"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, errors = told(capsys, *argv)
    assert (status, output, len(errors.splitlines())) == (2, "", 1) and message in errors


def test_no_framework_is_imported(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    for argv in (["list", str(run)], ["show", str(run)], ["clean", str(run), "--yes"]):
        code = (
            f"import sys; from jaxlm import runs; runs.main({argv})\n"
            "print([name for name in ('jax', 'torch') if name in sys.modules])"
        )
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert process.stdout.endswith("[]\n"), process.stderr
