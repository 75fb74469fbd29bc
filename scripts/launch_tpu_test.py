"""The loop of launch_tpu.py, by a gcloud whose TPUs are folders here, with real processes on their workers."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_settings import ROOT

# What each start of training does comes from plan.json: exit with a status, or be preempted.
TRAINING = """
import json, os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
worker, folder = int(pathlib.Path.home().name), pathlib.Path(os.environ["FAKE_GCLOUD"])
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
made = [x for x in folder.glob(f"start-*-{worker}")]
plan = json.loads((folder / "plan.json").read_text())[len(made)]
(folder / f"start-{len(made)}-{worker}").write_text(json.dumps(sys.argv[1:]))
run = pathlib.Path(arguments["--run.dir"])
if worker == 0:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text(f"start {len(made)}")
print(f"worker {worker} says hello, start {len(made)}", flush=True)
status = plan[worker] if isinstance(plan, list) else plan
if status == "preempted":
    # The other worker notices, and ends, before the state of the TPU tells.
    if worker == 1:
        sys.exit(1)
    time.sleep(0.3)
    subprocess.Popen(["gcloud", "fake", "preempt", "jaxlm"], env={**os.environ, "HOME": "/"}, start_new_session=True)
    time.sleep(60)
if status == "wait":
    while not (run / "stop").exists():
        time.sleep(0.02)
    sys.exit(0)
sys.exit(status)
"""
FLAGS = (
    "--checkpoint-dir gs://bucket/run --tpu.poll-s 0.05 --tpu.settle-s 1.5 --tpu.accelerator v5litepod-16 --name jaxlm"
)
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a fake gcloud, the first on PATH."""
    path = tmp_path / "bin" / "gcloud"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {ROOT}/scripts/fake_gcloud.py "$@"\n')
    path.chmod(0o755)
    (tmp_path / "cloud").mkdir()
    for name, value in {
        "PATH": f"{path.parent}:{os.environ['PATH']}",
        "FAKE_GCLOUD": str(tmp_path / "cloud"),
        "CLOUDSDK_CONFIG": str(tmp_path / "nobody"),  # a real gcloud, should a test reach one, has no account
    }.items():
        monkeypatch.setenv(name, value)
    assert shutil.which("gcloud") == str(path)
    return tmp_path / "cloud"


@pytest.fixture
def launch(folder: Path, tmp_path: Path) -> Launch:
    """Return a function that runs launch_tpu.py in a repository whose jaxlm.train is TRAINING."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "scripts", repository / "scripts", ignore=shutil.ignore_patterns("*_test.py", "__pycache__"))
    (repository / "jaxlm").mkdir()
    (repository / "jaxlm" / "__init__.py").touch()
    (repository / "jaxlm" / "train.py").write_text(TRAINING)
    shutil.copytree(ROOT / "configs", repository / "configs")
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in ("init --quiet", "add .", "commit --quiet --message x"):
        subprocess.run([*git, *words.split()], check=True)

    def run(verb: str, *plan: object, flags: str = "") -> subprocess.CompletedProcess[str]:
        (folder / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, str(repository / "scripts" / "launch_tpu.py"), verb, *shlex.split(FLAGS)]
        command += ["--tpu.python", sys.executable, "--tpu.setup", "touch installed", *shlex.split(flags)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    return run


def verbs(folder: Path) -> list[str]:
    """Return what gcloud was asked, without looks at the state."""
    calls = [json.loads(line) for line in (folder / "calls.txt").read_text().splitlines()]
    names = [f"{call[3]} {call[-3]}" if call[3] in ("ssh", "scp") else call[3] for call in calls if call[0] != "fake"]
    return [name.split()[0] for name in names if name != "describe"]


def n_starts(folder: Path) -> int:
    return len(list(folder.glob("start-*-0")))


def test_loop_trains_on_all_workers_collects_and_deletes(folder: Path, launch: Launch, tmp_path: Path) -> None:
    done = launch("loop", 0)
    assert done.returncode == 0, done.stderr
    assert verbs(folder) == ["create", "scp", *["ssh"] * 4, "scp", "scp", "delete"]
    for worker in range(2):
        arguments = json.loads((folder / f"start-0-{worker}").read_text())
        run = "--run.dir runs/gpt_base --run.checkpoint-dir gs://bucket/run --resume auto"
        assert shlex.join(arguments) == f"--config configs/gpt_base.toml {run}"
    assert not (folder / "jaxlm.json").exists()
    # The output is that of worker 0, which is process 0, and so is the run folder.
    assert "worker 0 says hello" in done.stdout and "worker 1" not in done.stdout
    run_dir = tmp_path / "repository" / "runs" / "gpt_base"
    assert (run_dir / "metrics.jsonl").read_text() == "start 0"
    assert "worker 0 says hello" in (run_dir / "train.log").read_text()


def test_loop_goes_on_after_sigterm_and_with_a_new_tpu_where_one_is_preempted(folder: Path, launch: Launch) -> None:
    done = launch("loop", 143, "preempted", 0)
    assert done.returncode == 0, done.stderr
    assert [x for x in verbs(folder) if x in ("create", "delete")] == ["create", "delete", "create", "delete"]
    assert n_starts(folder) == 3
    assert "--resume auto" in shlex.join(json.loads((folder / "start-2-0").read_text()))


def test_loop_does_not_retry_bad_input(folder: Path, launch: Launch) -> None:
    """At once, without a wait for the state; here after a preemption, and of a TPU that is no queued resource."""
    done = launch("loop", "preempted", 2, 0, flags="--tpu.queued false --tpu.settle-s 1000")
    assert done.returncode == 2, done.stderr
    assert n_starts(folder) == 2 and not (folder / "jaxlm.json").exists()
    assert "training ended with status 2; its last lines:" in done.stderr


def test_loop_does_not_retry_an_error_of_any_worker(folder: Path, launch: Launch) -> None:
    done = launch("loop", [0, 1], 0, flags="--tpu.settle-s 0.1")
    assert done.returncode == 1, done.stderr
    assert n_starts(folder) == 1 and not (folder / "jaxlm.json").exists()
    assert "training ended with status 1; its last lines:\nworker 1 says hello" in done.stderr


def test_loop_ends_after_max_starts(folder: Path, launch: Launch) -> None:
    assert launch("loop", 143, 0, flags="--tpu.max-starts 1").returncode == 143
    assert n_starts(folder) == 1


def test_loop_keeps_the_tpu_when_the_run_cannot_be_collected(folder: Path, launch: Launch) -> None:
    done = launch("loop", 0, flags="--run-dir /dev/null/x --tpu.settle-s 0.1")
    assert done.returncode == 1, done.stderr
    assert (folder / "jaxlm.json").exists()


def test_loop_stops_where_the_state_is_not_known(folder: Path, launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "bin" / "gcloud").write_text("#!/bin/sh\necho 'ERROR: PERMISSION_DENIED' >&2\nexit 1\n")
    done = launch("loop", 0)
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr and "create" not in done.stderr


def test_loop_wants_checkpoints_that_outlive_the_tpu(folder: Path, launch: Launch) -> None:
    done = launch("loop", 0, flags="--checkpoint-dir ''")
    assert done.returncode == 2
    assert done.stderr == "error: checkpoint_dir='': a preempted TPU takes its disk along; give gs://BUCKET/FOLDER\n"


def test_training_outlives_the_launcher_and_stop_ends_it(folder: Path, launch: Launch, tmp_path: Path) -> None:
    """The steps one by one; training continues while nobody follows, a second `run` joins it, and `stop` ends it."""
    for verb in ("create", "setup"):
        assert launch(verb, ["wait", 0]).returncode == 0
    launcher = [sys.executable, str(tmp_path / "repository" / "scripts" / "launch_tpu.py"), "run", *shlex.split(FLAGS)]
    launcher += ["--tpu.python", sys.executable]
    (folder / "plan.json").write_text(json.dumps([["wait", 0]]))
    with subprocess.Popen(launcher, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True) as process:
        wait_for(lambda: n_starts(folder) == 1)
        process.kill()
    assert launch("stop", ["wait", 0]).returncode == 0
    assert launch("logs", ["wait", 0]).returncode == 0
    assert n_starts(folder) == 1
    assert launch("collect").returncode == 0 and launch("delete").returncode == 0


def test_a_worker_by_itself(tmp_path: Path) -> None:
    """It installs each version once, starts one process at most, and records how that ends."""
    home = tmp_path / "jaxlm"
    (home / "jaxlm" / "run").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "tpu_worker.sh", home)

    def worker(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "tpu_worker.sh", *words]
        environment = {**os.environ, "HOME": str(home)}
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)

    waits = ("start", "bash", "-c", "until [[ -e run/stop ]]; do sleep 0.02; done; exit 7")

    def setup(content: str) -> None:
        (home / "version").write_text(content)
        subprocess.run(["tar", "-czf", "jaxlm.tar.gz", "version"], cwd=home, check=True)
        assert worker("setup", "cat version >>installed").returncode == 0

    setup("1")
    assert worker("setup", "cat version >>installed").returncode == 0
    setup("2")
    assert (home / "jaxlm" / "installed").read_text() == "12"
    assert worker("follow").returncode == 1
    assert worker("wait").returncode == 1
    assert worker(*waits).stderr == ""
    assert worker(*waits).stderr == "training is at work already\n"
    setup("3")
    assert (home / "jaxlm" / "version").read_text() == "2"
    # When the machine shuts down, every process gets SIGTERM: the one that keeps training has to record how it ends.
    os.kill(int((home / "train.pid").read_text()), 15)
    time.sleep(0.1)
    assert worker("stop", "run").returncode == 0
    assert worker("wait").returncode == 7
    assert worker("restart").returncode == 2


def test_dry_run_prints_every_command_and_runs_none(folder: Path, launch: Launch, tmp_path: Path) -> None:
    done = launch("loop", flags="--dry-run --tpu.queued false -- --train.max-steps 7")
    assert done.returncode == 0 and not (folder / "calls.txt").exists() and not list(folder.glob("*.json.tmp"))
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert {command[0] for command in commands} == {"gcloud", "git", "mkdir"}
    assert not (tmp_path / "repository" / "build").exists()
    start = next(command for command in commands if any("tpu_worker.sh start" in word for word in command))
    assert "--train.max-steps 7 --run.dir runs/gpt_base" in shlex.join(start)
    # What it prints is what gcloud takes: typed in, it makes, uses and gives back a TPU.
    (folder / "plan.json").write_text("[0]")
    script = done.stdout.partition("# after")[0].partition("\n")[2]
    assert subprocess.run(["bash", "-ec", script]).returncode == 0


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.02)
