"""The job of launch_slurm.py, by a Slurm that is this machine, with real processes."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_settings import ROOT

# A task: each start comes from plan.json; an exit status, or to wait for SIGTERM and then to save for a moment.
TASK = """
import json, os, pathlib, signal, sys, time
rank, folder = os.environ["SLURM_PROCID"], pathlib.Path(os.environ["FAKE_SLURM"])
n = len(list(folder.glob(f"start-*-{rank}")))
status = json.loads((folder / "plan.json").read_text())[n]
def end(*_):
    time.sleep(0.2 * int(rank))
    (folder / f"saved-{n}-{rank}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
(folder / f"start-{n}-{rank}").touch()
print("task", rank, "start", n, flush=True)
if status == "wait":
    time.sleep(60)
sys.exit(status)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a fake Slurm, the first on PATH."""
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "scancel", "scontrol"):
        path = tmp_path / "bin" / name
        path.write_text(f"#!{sys.executable} -S\n" + (ROOT / "scripts" / "fake_slurm.py").read_text())
        path.chmod(0o755)
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    return tmp_path / "slurm"


@pytest.fixture
def sbatch(folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Return a function that queues the command of `launch_slurm.py submit` for TASK; it returns the job's status."""
    (tmp_path / "task.py").write_text(TASK)

    def submit(*plan: object, limits: tuple[str, ...] = ()) -> int:
        (folder / "plan.json").write_text(json.dumps(plan))
        (folder / "limit").write_text(json.dumps(limits))
        command = shlex.split(launch("submit --dry-run --slurm.nodes 2 --slurm.gpus-per-node 1").stdout)
        script = command.index(str(ROOT / "scripts" / "train.sbatch"))
        output = f"--output={tmp_path / 'log'}"
        subprocess.run(
            [*command[:script], output, command[script], sys.executable, str(tmp_path / "task.py")],
            check=True,
            timeout=300,
        )
        return int((folder / "status").read_text())

    return submit


def launch(words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "launch_slurm.py"), *shlex.split(words)]
    return subprocess.run(command, capture_output=True, text=True)


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_a_job_out_of_time_saves_in_every_task_and_goes_on(sbatch: Callable[..., int], folder: Path) -> None:
    assert sbatch("wait", "wait", 0, limits=("start-0-*", "start-1-*")) == 0
    assert names(folder, "start-*") == ["start-0-0", "start-0-1", "start-1-0", "start-1-1", "start-2-0", "start-2-1"]
    # Also the task that was the last to save has not been killed.
    assert names(folder, "saved-*") == ["saved-0-0", "saved-0-1", "saved-1-0", "saved-1-1"]
    log = (folder.parent / "log").read_text()
    assert log.count("queued again") == 2 and "task 0 start 0" in log and "task 1 start 2" in log


@pytest.mark.parametrize("status", [1, 2, 143])
def test_a_job_that_ends_before_its_limit_is_not_queued_again(
    sbatch: Callable[..., int], folder: Path, status: int
) -> None:
    """143: somebody has cancelled it, or Slurm has preempted it and queues it again by itself."""
    assert sbatch(status, 0) == status
    assert names(folder, "start-*") == ["start-0-0", "start-0-1"]


def test_one_task_for_each_gpu_or_else_for_each_node() -> None:
    with_gpus = launch("submit --dry-run --slurm.nodes 3 --slurm.gpus-per-node 4 --slurm.partition gpu").stdout
    assert "--nodes=3 --ntasks-per-node=4 --gpus-per-node=4 " in with_gpus and "--partition=gpu " in with_gpus
    without = launch("submit --dry-run --slurm.nodes 3 --slurm.gpus-per-node 0").stdout
    assert "--nodes=3 --ntasks-per-node=1 --cpus-per-task=8 " in without and "--partition" not in without


def test_submit_trains_so_that_a_requeued_job_goes_on() -> None:
    text = launch("submit --dry-run --run-dir /scratch/x --slurm.stop-s 60 -- --train.max-steps 5").stdout
    assert "--signal=B:USR1@60 " in text
    expected = "-m jaxlm.train --train.max-steps 5 --run.dir /scratch/x --resume auto\n"
    assert text.endswith(f"scripts/train.sbatch .venv/bin/python {expected}")


def test_without_slurm_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = launch("submit")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: sbatch: there is no such program; install it, or see the commands by --dry-run"
    )


@pytest.mark.parametrize("verb", ["logs", "cancel"])
def test_dry_run_of_the_other_commands(verb: str) -> None:
    program = {"logs": "tail", "cancel": "scancel"}[verb]
    assert shlex.split(launch(f"{verb} --dry-run").stdout)[0] == program
