"""The command: each task, several processes, Ctrl-C, the files of the run folder, and bad input."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import jaxlm.train
from jaxlm import repeat
from jaxlm.data import grammar
from jaxlm.reporting import run_reader
from torchlm import checkpoint, tasks, train

Launch = Callable[..., subprocess.Popen]
TINY = (
    "--model.d-model 12 --model.n-heads 3 --model.n-layers 1 --model.seq-len 16 --tokenizer.vocab-size 300 "
    "--train.batch-size 4 --train.log-interval 1 --train.warmup-steps 0 --train.learning-rate 0.01"
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of sentences, one a line, in an order that repeats."""
    path = tmp_path_factory.mktemp("texts") / "sentences.txt"
    rows = random.Random(0).sample(grammar.sentences("sst2")["train"], 200)
    path.write_text("".join(f"{text}\n" for text, _ in rows))
    return path


@pytest.fixture(scope="module")
def labelled(texts: Path) -> Path:
    path = texts.with_name("labelled.tsv")
    lines = texts.read_text().splitlines()
    rows = (f"{('no', 'yes')[i % 2]} {line}\t{i % 2}\n" for i, line in enumerate(lines))
    path.write_text("sentence\tlabel\n" + "".join(rows))
    return path


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "caches"))


def rows_of(run_dir: Path, split: str) -> Iterator[dict]:
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return (row for row in lines if row["split"] == split)


def data_of(task: str, texts: Path, labelled: Path) -> str:
    path = texts if task in ("mlm", "gpt") else labelled
    return f"--task {task} --data.path {path} --data.validation-fraction 0.2 --data.test-fraction 0.2"


@pytest.mark.parametrize("task", ["mlm", "gpt", "sst2", "cola"])
def test_each_task_trains_and_leaves_a_run_folder(
    task: str, texts: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    more = f"--run.dir {run_dir} --train.max-steps 60 --train.eval-interval 40"
    assert train.main([*f"{TINY} {data_of(task, texts, labelled)} {more}".split()]) == 0
    losses = [row["loss"] for row in rows_of(run_dir, "train")]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert [row["step"] for row in rows_of(run_dir, "validation")] == [40, 60]
    (test,) = rows_of(run_dir, "test")
    best = min(rows_of(run_dir, "validation"), key=lambda row: row["loss"])
    assert test["step"] == best["step"]
    assert {path.name for path in run_dir.iterdir()} == {
        *(
            ".lock",
            "saved.json",
            "baseline.json",
            "checkpoints",
            "config.toml",
            "environment.jsonl",
            "log.txt",
            "metrics.jsonl",
            "samples.txt",
        ),
        "tokenizer.json",
    }
    assert json.loads((run_dir / "baseline.json").read_text())["test"].keys() == test.keys() - {"step", "split"}
    last = checkpoint.read(run_dir / "checkpoints" / "60.pt")
    assert (last["iter"], last["sample_iter"], last["task_type"]) == (60, 240, task)
    assert last["config"]["torchlm"]["settings"]["model.d_model"] == 12
    assert (run_dir / "samples.txt").read_text().count("--- step") == 2
    output = capsys.readouterr().out
    assert output.startswith(f"torchlm: task {task}; loading PyTorch\n")
    assert "python -m torchlm.train --config" in output


@pytest.mark.slow
def test_two_processes_train_as_one(launch: Launch, texts: Path, labelled: Path, tmp_path: Path) -> None:
    settings = f"{TINY} {data_of('mlm', texts, labelled)} --model.dropout 0 --train.accumulate 2 --train.max-steps 12"
    assert train.main(f"{settings} --run.dir {tmp_path}/run1".split()) == 0
    process = launch(f"{settings} --run.dir run2", tmp_path, 2, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("loading PyTorch") == output.count("run     ") == output.count("Everything is in") == 1
    assert f"device  2 x {'cuda' if torch.cuda.is_available() else 'cpu'}" in output
    for split in ("train", "validation", "test"):
        one, two = rows_of(tmp_path / "run1", split), rows_of(tmp_path / "run2", split)
        for row, row_2 in zip(one, two, strict=True):
            for name in {"step", "loss", "accuracy", "rate", "grad_norm"} & row.keys():
                # Sums of float32 over 24 labels, in another order, through up to 12 updates.
                assert row_2[name] == pytest.approx(row[name], rel=2e-5), (split, row["step"], name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run1", "run2"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def test_files_and_ctrl_c_save_and_end_a_run(launch: Launch, texts: Path, labelled: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = f"{TINY} {data_of('gpt', texts, labelled)} --run.dir run --train.max-steps 100000"
    process = launch(f"{settings} --train.eval-interval 100000", tmp_path, stdout=subprocess.PIPE)
    wait_for(lambda: (run_dir / "metrics.jsonl").exists(), process)
    (run_dir / "save_checkpoint").touch()
    wait_for(lambda: (run_dir / "checkpoints").exists() and any((run_dir / "checkpoints").glob("*.pt")), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "gpt interrupted after" in output
    (path,) = (run_dir / "checkpoints").iterdir()
    assert checkpoint.read(path)["iter"] == int(path.stem) > 1
    assert not (run_dir / "save_checkpoint").exists()


@pytest.mark.parametrize("n_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_during_setup_leaves_nothing(n_processes: int, launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "birds.txt").write_text("\n".join(f"{i} birds on wire {i * 7919 % 1000}" for i in range(100_000)))
    (tmp_path / "cwd").mkdir()
    settings = "--task mlm --data.path ../birds.txt --data.cache-dir ../cache --run.dir run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = launch(settings, tmp_path / "cwd", n_processes, **pipes)
    wait_for((tmp_path / "cwd" / "run").exists, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert "interrupted before training; nothing was saved\n" in errors
    assert list((tmp_path / "cwd").iterdir()) == []
    if n_processes == 1:  # torchrun has a status of its own
        assert process.returncode == 130


def test_the_file_stop_ends_a_run_with_its_scores(
    texts: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, losses = tmp_path / "run", []
    monkeypatch.setattr("jaxlm.training.signals.FILE_CHECK_S", 0)

    def put_stop(*args: object) -> None:
        losses.append(args)
        if len(losses) == 3:
            (run_dir / "stop").touch()

    monkeypatch.setattr("jaxlm.training.log.RunLog.row", put_stop)
    settings = f"{TINY} {data_of('sst2', texts, labelled)} --run.dir {run_dir} --train.max-steps 100"
    assert train.main(settings.split()) == 0
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["4.pt"]
    assert not (run_dir / "stop").exists()


def interrupted_at(call: int) -> Any:
    """Return a context in which a signal comes at the n-th time that a run looks for one."""
    calls = [0]

    @contextlib.contextmanager
    def interrupts(log: Any) -> Iterator[Any]:
        def status() -> int:
            calls[0] += 1
            return 0 if calls[0] < call else 130

        yield status

    return interrupts


@pytest.mark.parametrize("package", [jaxlm.train, train], ids=["jaxlm", "torchlm"])
def test_a_run_without_its_last_scores_is_said_to_resume(
    package: Any, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    settings = f"{TINY} {data_of('sst2', labelled, labelled)} --run.dir {folder} --train.max-steps 2 --resume auto"
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.training.signals.interrupts", interrupted_at(3))  # in the evaluation after update 2
        assert package.main(settings.split()) == 130
    assert f"Next, resume it: python -m {package.__name__} --resume {folder}" in capsys.readouterr().out
    assert not list(rows_of(folder, "validation"))
    assert package.main(settings.split()) == 0 and "Next, train for longer" in capsys.readouterr().out
    assert len(list(rows_of(folder, "validation"))) == len(list(rows_of(folder, "test"))) == 1


@pytest.mark.parametrize("package", [jaxlm.train, train], ids=["jaxlm", "torchlm"])
def test_patience_ends_a_run_also_one_that_was_interrupted(
    package: Any, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, program = tmp_path / "run", f"python -m {package.__name__}"
    # At a rate of 0, no evaluation after the first finds a lower loss.
    rates = "--train.learning-rate 0 --train.min-learning-rate 0 --train.eval-interval 2 --train.max-steps 20"
    settings = f"{TINY} {data_of('sst2', labelled, labelled)} --run.dir {folder} {rates} --resume auto"
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.training.signals.interrupts", interrupted_at(10))
        assert package.main([*settings.split(), "--train.patience", "2"]) == 130
    steps = [row["step"] for row in rows_of(folder, "validation")]
    assert steps in ([], [2], [2, 4]) and not run_reader.read(folder).is_over
    for _ in range(2):  # a run that has ended makes no further update
        assert package.main([*settings.split(), "--train.patience", "2"]) == 0
        said = capsys.readouterr().out
        assert "sst2 finished, with no new lowest validation loss in 2 evaluations, after" in said
        assert f"train on: {program} --resume {folder} --train.patience 0" in said
        assert [row["step"] for row in rows_of(folder, "train")] == [*range(1, 7)]
        assert [row["step"] for row in rows_of(folder, "validation")] == [2, 4, 6]
        assert len(list(rows_of(folder, "test"))) == 1
        assert repeat.has_ended(folder) and run_reader.read(folder).state == run_reader.FINISHED
    other = ["--resume", str(folder), "--run.dir", str(tmp_path / "other"), *rates.split()]
    assert package.main([*other, "--train.patience", "0", "--train.max-steps", "7"]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "other", "validation")] == [2, 4, 6, 7]


@pytest.mark.parametrize(
    "settings, message",
    [
        ("--model.d-model 10 --model.n-heads 4", "model.d_model=10 is not divisible by model.n_heads=4"),
        ("--task mml", "unknown task; did you mean mlm?"),
        ("--data.path nowhere.txt", "nowhere.txt: no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    settings: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        train.main(settings.split())
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_task_that_only_jaxlm_has_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(tasks.TASKS, "cola")
    with pytest.raises(SystemExit) as end:
        train.main(["--task", "cola"])
    assert end.value.code == 2
    assert "task=cola: python -m torchlm.train has no such task; it has mlm, gpt, sst2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_pytorch_one_line_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from torchlm.train import main; sys.exit(main(['--task', 'mlm']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: PyTorch is not installed") and "pip install -e '.[torch]'" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first, second", [(train, jaxlm.train), (jaxlm.train, train)], ids=["torchlm", "jaxlm"])
def test_a_run_goes_on_in_the_other_package_with_the_same_losses(
    first: Any, second: Any, texts: Path, labelled: Path, tmp_path: Path
) -> None:
    settings = f"{TINY} {data_of('mlm', texts, labelled)} --model.dropout 0 --train.decay-steps 12".split()
    here, there = tmp_path / "here", tmp_path / "there"
    assert first.main([*settings, "--train.max-steps", "6", "--run.dir", str(here)]) == 0
    assert second.main(["--resume", str(here), "--train.max-steps", "12", "--run.dir", str(there)]) == 0
    assert first.main(["--resume", str(here), "--train.max-steps", "12"]) == 0
    for split, n in (("train", 12), ("validation", 2), ("test", 1)):
        pairs = list(zip(rows_of(here, split), rows_of(there, split), strict=True))
        assert len(pairs) == n
        for row, row_2 in pairs:
            assert (row["step"], row.get("accuracy")) == (row_2["step"], row_2.get("accuracy"))
            assert row_2["loss"] == pytest.approx(row["loss"], rel=5e-6)
            if split == "train":
                # Near its end, the cosine is a small difference of float32 numbers of the size of the peak rate, 0.01.
                assert row_2["rate"] == pytest.approx(row["rate"], rel=1e-6, abs=1.2e-7 * 0.01)
