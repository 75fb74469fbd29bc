"""The end of a run whose files could not be written says what is on the disk, in both packages."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import jaxlm.train
from jaxlm.errors import UserError
from jaxlm.reporting import run_reader
from jaxlm.training import history, summary
from jaxlm.training.log import RunLog
from jaxlm.training.run import UNSAVED
from torchlm import checkpoint, train

SIZES = (
    "--task gpt --data.path {texts} --data.validation-fraction 0.2 --data.test-fraction 0.2 --model.d-model 12 "
    "--model.n-heads 3 --model.n-layers 1 --model.seq-len 16 --tokenizer.vocab-size 300 --train.batch-size 4 "
    "--train.log-interval 1 --train.warmup-steps 0 --train.learning-rate 0.01 --train.eval-interval 2"
)
STEPS = (2, 4, 6)


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "caches"))
    monkeypatch.setattr(checkpoint, "PAUSES_S", (0, 0, 0))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "birds.txt"
    path.write_text("".join(f"{i} birds sit on wire {i % 7} and sing of {i * 7919 % 10}\n" for i in range(200)))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield path
    subprocess.run(["umount", path], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def trained(texts: Path, run: Path, settings: str = "") -> int:
    return train.main(f"{SIZES.format(texts=texts)} --train.max-steps 6 --run.dir {run} {settings}".split())


def listing(output: str) -> dict[str, str]:
    """Return what the end of a run lists, by file."""
    return dict(re.findall(r"^  (\S+) +(.*)$", output[output.index("\nEverything is in ") :], re.MULTILINE))


def steps_on_disk(run: Path) -> set[int]:
    return {int(path.stem) for path in (run / "checkpoints").glob("*.pt") if path.is_file()}


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("blocked", [(), (2,), (6,), (2, 4), (4, 6), STEPS])
def test_the_end_lists_what_was_saved(
    blocked: tuple[int, ...], keep: int, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    elsewhere = tmp_path / "elsewhere"
    for step in blocked:  # a folder in the place of the file
        (elsewhere / f"{step}.pt").mkdir(parents=True)
    status = trained(texts, run, f"--run.checkpoint-dir {elsewhere} --run.keep-checkpoints {keep}")
    output, errors = capsys.readouterr()
    checkpoints.symlink_to(elsewhere)
    saved, is_lost = steps_on_disk(run), 6 in blocked
    assert status == (UNSAVED if is_lost else 0)
    assert "No scores" not in output and "loss (lower is better)" in output
    listed = listing(output)
    assert {name for name in listed if "/" not in name} == {path.name for path in run.iterdir()} & set(listed)
    assert [int(step) for step in re.findall(r"step (\d+)", listed.get(str(elsewhere), ""))] == sorted(saved)
    assert ("Use it: " in output) == bool(saved)
    n_warnings = len(re.findall("warning: the checkpoint of step .* could not be saved", errors))
    assert n_warnings == len(blocked)
    state = run_reader.read(run).state
    if not is_lost:
        assert saved and "error: " not in errors and state == "finished"
    else:
        assert "error: " in errors and "the weights of step 6 are not saved; free some space, or save else" in errors
        assert state != "finished" or run_reader.read(run).best_score_step() in saved
        # Where else to save is a command that works.
        settings = re.search(r"python -m torchlm.train (.*?)(, which resumes from step \d+)?$", errors, re.MULTILINE)
        assert settings is not None and bool(settings[2]) == bool(saved)
        again = settings[1].replace("NEW", str(tmp_path / "new")).replace("FOLDER", str(tmp_path / "other"))
        assert train.main(again.split()) == 0
        assert run_reader.read(tmp_path / "new").state == "finished"


def test_the_last_save_is_tried_again(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "elsewhere" / "6.pt"
    blocked.mkdir(parents=True)

    def pauses() -> Iterator[int]:
        yield 0
        blocked.rmdir()
        yield 0

    monkeypatch.setattr(checkpoint, "PAUSES_S", pauses())
    assert trained(texts, tmp_path / "run", f"--run.checkpoint-dir {tmp_path / 'elsewhere'}") == 0
    assert blocked.is_file() and run_reader.read(tmp_path / "run").state == "finished"


def at_row(n: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen before the n-th row of metrics is logged."""
    rows, log_row = [0], RunLog.row

    def row(self: RunLog, *args: Any) -> None:
        rows[0] += 1
        if rows[0] == n:
            act()
        log_row(self, *args)

    monkeypatch.setattr(RunLog, "row", row)


def logged(run: Path) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["split"]) for row in rows]


@pytest.mark.parametrize("is_mended", [False, True])
def test_a_disk_that_is_full_from_some_row_on(
    is_mended: bool, disk: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_row(1, lambda: fill(disk), monkeypatch)
    if is_mended:
        at_row(7, (disk / "ballast").unlink, monkeypatch)
    status = trained(texts, disk / "run", "--log.tensorboard")
    output, errors = capsys.readouterr()
    assert errors.count("the run continues, and keeps metrics, lines and samples in memory") == 1
    assert "loss (lower is better)" in output
    expected = [(i, split) for i in range(1, 7) for split in ("train", "validation") if split == "train" or i % 2 == 0]
    if is_mended:
        assert status == 0 and logged(disk / "run")[:9] == expected and len(logged(disk / "run")) == 10
        assert (disk / "run" / "samples.txt").read_text().count("--- step") == 3
        assert "not written" not in output + errors
    else:
        assert status == UNSAVED and logged(disk / "run") == []
        assert "checkpoints" not in listing(output) and "Use it" not in output
        assert re.search(r"metrics.jsonl: \d+ entries not written \(No space left on device\)", errors)
        assert run_reader.read(disk / "run").state != "finished"


def test_a_rollback_on_a_full_disk(disk: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_row(5, lambda: fill(disk), monkeypatch)  # after the first checkpoint
    monkeypatch.setattr("torchlm.loop._read", spoiled(at=4))
    assert trained(texts, disk / "run", "--train.on-nonfinite rollback") == UNSAVED
    steps = [step for step, split in logged(disk / "run") if split == "train"]
    assert steps == sorted(set(steps)) and steps[:3] == [1, 2, 3]


def spoiled(at: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a reader of metrics that finds the loss of one update not finite, once."""
    from torchlm import loop

    n_read, read = [0], loop._read

    def spoil(metrics: dict[str, Any]) -> dict[str, Any]:
        found = read(metrics)
        n_read[0] += "grad_norm" in found
        return found | ({"grad_norm": float("nan")} if n_read[0] == at and "grad_norm" in found else {})

    return spoil


def test_a_best_checkpoint_that_is_damaged_makes_room_for_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    losses = {2: 1.0, 4: 2.0, 6: 3.0, 8: 2.5}
    run: Any = SimpleNamespace(losses=lambda: losses, log=RunLog())

    def restore(step: int, state: str) -> str:
        if step in (2, 4):
            raise UserError(f"checkpoints/{step}: damaged: head/d/x is missing")
        return f"restored {step}"

    saved = [2, 4, 6]
    assert summary.best_state(run, 6, saved, "last", restore) == "restored 6" and saved == [6]
    assert capsys.readouterr().err.count("is missing") == 2
    # The last state, which is in memory, counts where it is not saved.
    assert summary.best_state(run, 8, [6], "last", restore) == "last"
    assert summary.best_state(run, 8, [2, 6], "last", restore) == "last"


def test_a_log_that_cannot_be_read_does_not_stop_a_resume(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert trained(texts, run, "--train.decay-steps 6") == 0
    best = run_reader.read(run).best_score_step()
    lines = ['{"step": 2, "split": "validation"}', '{"step": "3", "split": "train"}', "[" * 100_000]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "samples.txt").unlink()
    (run / "samples.txt").mkdir()
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--train.max-steps", "8"]) == 0
    output, errors = capsys.readouterr()
    assert errors.count("cannot be read") == 2 and "metrics.jsonl: cannot be read: 3 lines" in errors
    assert logged(run) == [(7, "train"), (8, "train"), (8, "validation"), (8, "test")]
    assert (run / "metrics.jsonl.damaged").is_file() and (run / "samples.txt.damaged").is_dir()
    shown = re.search(r"scores of step (\d+), the best", output)
    assert shown is not None and int(shown[1]) in (best, 8)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["jaxlm", "torchlm"])
@pytest.mark.parametrize("what", ["unsaved", "folder gone"])
def test_a_run_that_is_ended_by_a_signal(program: str, what: str, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "run"
    where = f"--run.checkpoint-dir {tmp_path / 'file' / 'checkpoints'}" if what == "unsaved" else ""
    settings = f"{SIZES.format(texts=texts)} --train.max-steps 1000000 --run.dir {run} {where}"
    command = [sys.executable, "-m", f"{program}.train", *settings.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2  validation"):
            break
    if what == "folder gone":
        run.rename(tmp_path / "removed")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    assert "No scores" not in output
    assert set(listing(output)) - {str(tmp_path / "file" / "checkpoints")} == {
        path.name for path in run.iterdir() if not path.name.startswith(".") and path.name in listing(output)
    }
    if what == "unsaved":
        assert "are not saved; free some space, or save elsewhere: " in errors and "Use it: " not in output
    else:  # all that it takes to use the weights is there again
        assert "Use it: " in output
        predict = [
            sys.executable,
            "-m",
            "jaxlm.predict",
            "--checkpoint",
            run,
            "--text",
            "12 birds",
            "--max-new-tokens",
            "3",
        ]
        done = subprocess.run(predict, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_whose_reader_has_gone_saves(texts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = f"{SIZES.format(texts=texts)} --train.max-steps 1000000 --run.dir {run}"
    command = [sys.executable, "-m", "torchlm.train", *settings.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any(line.startswith("step 2  validation") for line in process.stdout)
        process.stdout.close()
        errors = process.stderr.read().splitlines()
    # A step that takes more than 5 s on a busy machine says so.
    assert process.returncode == 141 and [line for line in errors if " ..." not in line] == []
    assert "interrupted: saving" in (run / "log.txt").read_text()
    assert max(steps_on_disk(run)) == run_reader.read(run).last_step


@pytest.mark.slow
def test_jaxlm_on_a_full_disk(disk: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("jaxlm.checkpoint.PAUSES_S", (0, 0))
    at_row(3, lambda: fill(disk), monkeypatch)
    settings = f"{SIZES.format(texts=texts)} --train.max-steps 4 --run.dir {disk / 'run'}"
    assert jaxlm.train.main(settings.split()) == UNSAVED
    output, errors = capsys.readouterr()
    assert "checkpoints" not in listing(output) and "loss (lower is better)" in output
    assert "the weights of step 4 are not saved" in errors
    assert run_reader.read(disk / "run").state == run_reader.LOST
    assert history.rows(disk / "run" / "metrics.jsonl", pytest.fail)
