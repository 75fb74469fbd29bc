"""The run folder, the clock of the speed, the files that a person puts there, and Ctrl-C in training."""

import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.tasks import TASKS
from jaxlm.training import run_dir, signals, summary
from jaxlm.training.log import RunLog
from jaxlm.training.meter import Meter
from jaxlm.training.resume import Start
from jaxlm.training.run import Run


def run_dir_config(path: Path | str) -> Config:
    return configs.build({"run.dir": str(path)})


def test_default_folders_count_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [run_dir.make(Config(task=task), Start())[0] for task in ("mlm", "mlm", "gpt", "mlm")]
    assert [path.name.rpartition("-")[2] for path in made] == ["1", "2", "1", "3"]
    assert {path.parent for path in made} == {Path("runs")}
    assert made[0].name.startswith("mlm-20") and made[2].name.startswith("gpt-20")
    (tmp_path / made[1]).rmdir()
    assert run_dir.make(Config(task="mlm"), Start())[0] == made[1]


def test_what_was_made_for_a_run_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path, made = run_dir.make(run_dir_config(tmp_path / "a" / "b" / "c"), Start())
    (path / "config.toml").write_text("")
    (path / "tensorboard").mkdir()
    (path / "tensorboard" / "events").write_text("")
    run_dir.remove(path, made)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def test_an_empty_folder_that_was_there_stays(tmp_path: Path) -> None:
    path, made = run_dir.make(run_dir_config(tmp_path), Start())
    (path / "config.toml").write_text("")
    run_dir.remove(path, made)
    assert list(tmp_path.iterdir()) == []


def test_folders_with_another_run_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = run_dir.make(Config(), Start()), run_dir.make(Config(), Start())
    run_dir.remove(*first)
    assert list(Path("runs").iterdir()) == [second[0]]
    run_dir.remove(*second)
    assert Path("runs").is_dir()  # the second run did not make it


@pytest.mark.parametrize("name", ["file", "file/run", "used"])
def test_a_folder_that_cannot_be_had_is_a_user_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "log.txt").write_text("")
    with pytest.raises(UserError, match=f"run.dir={tmp_path / name}: .* --run.dir|a new folder"):
        run_dir.make(run_dir_config(tmp_path / name), Start())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "log.txt", "used"]


def a_run(tmp_path: Path, **train: Any) -> Run:
    """Return a run without samples."""
    config = configs.build({f"train.{name}": value for name, value in train.items()})
    run_log = RunLog()
    run_log.open(tmp_path, [])
    data: Any = None
    return Run(config, TASKS["gpt"](config), data, tmp_path, run_log, time.monotonic(), "train")


def update(loss: float) -> dict[str, float]:
    return {"loss": loss * 10, "count": 10, "rate": 0.5, "grad_norm": 2.0}


def test_metrics_are_read_one_update_late_and_speed_leaves_out_pauses(tmp_path: Path) -> None:
    run = a_run(tmp_path, log_interval=2, max_steps=5)
    read: list[float] = []
    shown: list[tuple[int, str]] = []

    def device_get(metrics: dict[str, float]) -> dict[str, float]:
        read.append(metrics["loss"] / 10)
        return metrics

    meter = Meter(run, device_get, lambda step, text: shown.append((step, text)), peak_flops=1e9)
    meter.add(1, update(7.0), 0.5, 2000, 4)
    assert read == [7.0]  # the first is waited for
    meter.add(2, update(6.0), 0.5, 2000, 4)
    assert read == [7.0]
    time.sleep(0.1)
    with meter.paused():
        time.sleep(0.5)
    meter.add(3, update(5.0), 0.5, 2000, 4)
    assert read == [7.0, 6.0]  # now that 3 is under way
    meter.add(4, update(4.0), 0.5, 2000, 4)
    meter.add(5, update(3.0), 0.5, 2000, 4)
    meter.flush()
    assert read == [7.0, 6.0, 5.0, 4.0, 3.0]
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [row.partition(', "tokens')[0] for row in rows] == [
        f'{{"step": {step}, "split": "train", "loss": {loss}, "rate": 0.5, "grad_norm": 2.0, "real_share": 0.5'
        + "}" * (step == 1)
        for step, loss in ((1, 7.0), (2, 6.0), (4, 4.0), (5, 3.0))
    ]
    row = json.loads(rows[1])
    speed = row["tokens_per_s"]
    assert 1000 / 0.5 < speed <= 1000 / 0.1  # 1,000 tokens in a little over 0.1 s; 0.6 s with the pause
    # Half of 4 flops in the same time, as half of the positions are padding, of a billion a second.
    assert row["mfu"] == pytest.approx(2 * speed / 1000 / 1e9)
    assert [step for step, _ in shown] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert [text.partition(" tokens")[0].split("  ")[:2] for _, text in shown if text] == [
        [f"loss {loss:.4f}", "rate 5.00e-01"] for loss in (7, 6, 4, 3)
    ]


def test_a_loss_that_is_not_finite_ends_the_run_with_its_steps(tmp_path: Path) -> None:
    run = a_run(tmp_path, log_interval=5)
    meter = Meter(run, lambda metrics: metrics, lambda step, text: None)
    meter.add(1, update(7.0), 0.5, 2, 4)
    meter.add(2, update(6.0), 0.5, 2, 4)
    meter.add(3, update(float("nan")), 0.5, 2, 4)
    with pytest.raises(UserError, match="rate=0.001: the loss or gradient is nan at step 3, .* finite at step 2;"):
        meter.add(4, update(float("nan")), 0.5, 2, 4)


@pytest.mark.parametrize("first", [1, 41])
def test_weights_that_never_were_finite_are_not_called_so(tmp_path: Path, first: int) -> None:
    meter = Meter(a_run(tmp_path, log_interval=1), lambda x: x, lambda step, text: None)
    with pytest.raises(UserError, match=f"nan at step {first}, and was never finite; check the initial weights"):
        meter.add(first, update(float("nan")), 0.5, 20, 4)
    with pytest.raises(UserError, match="nan at step 3, and was never finite"):
        summary.log_scores(a_run(tmp_path), 3, {"": {"loss": float("nan"), "count": 10, "correct": 0, "bytes": 9}})


def test_files_are_looked_for_once_a_second_and_taken(tmp_path: Path) -> None:
    watch = signals.FileWatch(tmp_path)
    assert not watch.take("stop")
    (tmp_path / "stop").touch()
    assert not watch.take("stop")
    time.sleep(signals.FILE_CHECK_S)
    assert watch.take("stop")
    assert not (tmp_path / "stop").exists()


def test_first_ctrl_c_is_a_flag_and_later_ones_are_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    with signals.interrupts(RunLog()) as is_interrupted:
        assert not is_interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        deadline_s = time.monotonic() + 120
        while not is_interrupted() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert is_interrupted() == 130
    assert "a second signal ends immediately" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_second_ctrl_c_ends_the_process_in_the_middle_of_c_code(tmp_path: Path) -> None:
    script = """
import hashlib
from jaxlm.training.log import RunLog
from jaxlm.training.resume import Start
from jaxlm.training.signals import interrupts
with interrupts(RunLog()):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, in one call
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert "a second signal ends immediately" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr == "interrupted again: ended immediately\n"


def test_a_rollback_is_asked_for_from_the_first_bad_update_on(tmp_path: Path) -> None:
    meter = Meter(a_run(tmp_path, log_interval=1, on_nonfinite="rollback"), lambda x: x, lambda step, text: None)
    assert [meter.add(i, update(7.0), 0.5, 2, 4) for i in (1, 2, 3)] == [0, 0, 0]
    assert meter.add(4, update(float("inf")), 0.5, 2, 4) == 0
    assert meter.add(5, update(float("nan")), 0.5, 2, 4) == 4  # found while 5 is under way
    meter.forget()
    assert meter.flush() == 0
    assert meter.add(3, update(6.0), 0.5, 2, 4) == 0 and meter.flush() == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3]  # what was rolled back is dropped by history.restore_to


def test_a_bad_norm_counts_as_a_bad_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, log_interval=10, on_nonfinite="skip")
    meter = Meter(run, lambda metrics: metrics, lambda step, text: None)
    for i in range(1, 6):
        assert meter.add(i, update(7.0) | {"grad_norm": math.inf if i in (1, 4) else 2.0}, 0.5, 2, 4) == 0
    assert run.skipped == [1, 4]
    assert "step 4: the loss is 7.0 and the gradient norm inf; this update is skipped" in capsys.readouterr().err


def test_gradient_spikes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter(a_run(tmp_path), lambda metrics: metrics, lambda step, text: None)
    norms = {30: 900.0, 70: 21.0, 71: 19.9, 72: 25.0}  # too early, more than ten times 2, not so, and again
    for i in range(1, 80):
        meter.add(i, update(7.0) | {"grad_norm": norms.get(i, 2.0)}, 0.5, 2, 4)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] + line.partition(":")[2].partition(":")[0] for line in told] == [
        "warning step 70",
        "warning step 72",
    ]
    assert "the gradient norm, 21, is 10 times the median of the last 50 updates" in told[0]


HOLDER = """
import sys
from pathlib import Path
from jaxlm.training.run_dir import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], **pipes)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {first.pid} on {socket.gethostname()} uses it; wait for it"):
        run_dir.lock(tmp_path)
    first.kill()
    first.communicate()
    with run_dir.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(UserError, match=f"process {os.getpid()} on "):  # whoever asks
            run_dir.lock(tmp_path)
    run_dir.lock(tmp_path).close()


@pytest.mark.parametrize(
    ("is_first_update_done", "left"), [(False, set()), (True, {".lock", "file", "log.txt", "metrics.jsonl"})]
)
def test_a_run_that_fails_lets_go_of_its_folder_and_removes_it_before_its_first_update(
    is_first_update_done: bool, left: set[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    run = dataclasses.replace(a_run(tmp_path / "run"), lock=run_dir.lock(tmp_path / "run"))
    (run.dir / "file").touch()
    run.undo.append(lambda: shutil.rmtree(run.dir))
    with pytest.raises(MemoryError), run:
        if is_first_update_done:
            meter = Meter(run, lambda metrics: metrics, lambda step, text: None)
            meter.add(1, update(7.0), 0.5, 2, 4)
        raise MemoryError
    assert {path.name for path in tmp_path.glob("run/*")} == left
    assert run.lock is not None and run.lock.closed
