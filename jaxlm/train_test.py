"""The command `python -m jaxlm.train` as real processes: the four tasks, what a person sees, and how a run ends."""

import concurrent.futures
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from jaxlm.training import environment

TASKS = ("mlm", "gpt", "sst2", "cola")
TINY = (
    "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.seq-len 16 "
    "--train.batch-size 4 --train.learning-rate 1e-3 --train.warmup-steps 2 "
    "--train.eval-interval 3 --train.log-interval 2 "
)
SHORT = TINY + "--train.max-steps 6 "
ENDLESS = TINY + "--train.max-steps 1000000 "


def finished(process: subprocess.Popen) -> tuple[str, str]:
    """Return what a process that should succeed printed."""
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return stdout, stderr


def rows(run_dir: Path, split: str = "") -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if not split or row["split"] == split]


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows(run_dir)]


def wait_for_line(process: subprocess.Popen, text: str) -> str:
    """Read lines until one has `text`; return all of them."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"no line with {text!r}: {seen}")


@pytest.fixture(scope="module")
def runs(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """A short run of each task in one folder: the folder, and stdout and stderr by task."""
    cwd = tmp_path_factory.mktemp("runs")

    def run(task: str) -> tuple[str, str]:
        more = {"cola": "--log.tensorboard", "gpt": "--data.validation-tokens 300"}.get(task, "")
        process = launch(f"--task {task} {SHORT} {more}", cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return finished(process)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return cwd, dict(zip(TASKS, pool.map(run, TASKS), strict=True))


def run_dir(runs: Any, task: str) -> Path:
    (path,) = (runs[0] / "runs").glob(f"{task}-*")
    return path


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_its_folder(task: str, runs: Any) -> None:
    folder = run_dir(runs, task)
    assert re.fullmatch(rf"{task}-\d{{8}}-1", folder.name)
    names = {path.name for path in folder.iterdir()}
    assert names - {"tensorboard"} == {
        ".lock",
        "saved.json",
        "baseline.json",
        "config.toml",
        "tokenizer.json",
        "metrics.jsonl",
        "samples.txt",
        "environment.jsonl",
        "log.txt",
        "checkpoints",
    }
    (made_with,) = environment.read(folder)
    assert made_with["step"] == 0 and made_with["packages"]["jax"] and "jaxlm.train" in made_with["command"]
    assert [int(path.name) for path in (folder / "checkpoints").iterdir()]
    assert (folder / "samples.txt").read_text().count("--- step ") == 2
    settings = tomllib.loads((folder / "config.toml").read_text())
    assert settings["task"] == task and settings["model"]["d_model"] == 16 and settings["model"]["vocab_size"] > 300


@pytest.mark.parametrize("task", TASKS)
def test_metrics_have_one_object_a_line(task: str, runs: Any) -> None:
    folder = run_dir(runs, task)
    train, validation, test = (rows(folder, split) for split in ("train", "validation", "test"))
    assert [row["step"] for row in train] == [1, 2, 4, 6]
    assert [row["step"] for row in validation] == [3, 6]
    assert len(test) == 1 and rows(folder)[-1] == test[0]
    scored = {"step", "split", "loss"} | ({"accuracy"} if task != "gpt" else set())
    for row in train:
        speed = {"tokens_per_s"} if row["step"] > 1 else set()  # the first includes the compilation
        assert set(row) == scored | {"rate", "grad_norm", "real_share"} | speed
    for row in validation + test:
        assert set(row) >= scored
    assert [row["rate"] for row in train][:2] == [0, pytest.approx(5e-4)]  # warmup of 2 updates to 1e-3
    for row in rows(folder):
        assert row["loss"] > 0 and 0 <= row.get("accuracy", 0) <= 1


def test_a_bounded_validation_is_a_sample_and_the_last_one_whole(runs: Any) -> None:
    folder, (stdout, _) = run_dir(runs, "gpt"), runs[1]["gpt"]
    (final,) = rows(folder, "final_validation")
    at_best = min(rows(folder, "validation"), key=lambda row: row["loss"])
    assert final["step"] == at_best["step"] and final["loss"] == pytest.approx(at_best["loss"], rel=0.05)
    assert final["loss"] != at_best["loss"]
    n, n_all, n_tokens, ending = re.search(
        r"\nscores  (\d+) of ([\d,]+) validation samples \((\d+) tokens\) every 3 updates, .*\n {8}(.*)\n", stdout
    ).groups()
    assert int(n) < int(n_all.replace(",", "")) and 300 <= int(n_tokens) < 316
    assert ending.startswith(f"all {n_all} validation samples (") and "test samples (" in ending
    assert f" {final['loss']:.4f} " in stdout
    assert not rows(run_dir(runs, "mlm"), "final_validation")  # its validation is whole each time


@pytest.mark.parametrize("task", TASKS)
def test_output_is_plain_lines_in_order_when_piped(task: str, runs: Any) -> None:
    stdout, stderr = runs[1][task]
    assert "\x1b" not in stdout + stderr and "\r" not in stdout + stderr
    places = [
        stdout.index(text)
        for text in (
            f"jaxlm: task {task}",
            "run     runs/",
            "model.d_model = 16  (command line)",
            "compiling the first update ...",
            "first update done",
            "step 1  loss ",
            "step 3  validation: ",
            "step 6  validation: ",
            f"{task} finished after",
            "Everything is in runs/",
            "Next, ",
        )
    ]
    assert places == sorted(places)
    log = (run_dir(runs, task) / "log.txt").read_text()
    assert log.startswith("run     runs/") and log.endswith(stdout[stdout.index("Next, ") :])


def test_the_start_tells_where_each_value_came_from(runs: Any, launch: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nbatch_size = 4\nmax_steps = 1\n[data]\nn_maskings = 3\n")
    args = f"--task gpt {TINY} --config mine.toml --train.max-steps 6 --data.hub-config x --run.dir here"
    stdout, stderr = finished(launch(args, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    origins = dict(re.findall(r"^  (\S+) = .*  \((.*)\)$", stdout, re.MULTILINE))
    assert origins["model.d_model"] == "command line"
    assert origins["train.batch_size"] == "mine.toml"
    assert origins["train.max_steps"] == "command line"
    assert re.fullmatch(r"preset .*configs.gpt\.toml", origins["tokenizer.kind"])
    assert "model.post_norm" not in origins
    assert "warning: data.n_maskings=3 has no effect: task=gpt does not use it" in stderr
    assert "warning: data.hub_config=x has no effect" in stderr


@pytest.mark.parametrize("task", TASKS)
def test_summary_shows_scores_beside_the_baseline(task: str, runs: Any) -> None:
    stdout, _ = runs[1][task]
    summary = stdout[stdout.index(f"{task} finished") :]
    best = min(rows(run_dir(runs, task), "validation"), key=lambda row: row["loss"])
    if task == "gpt":  # its validation in training is a sample; the summary has that of the whole
        (best,) = rows(run_dir(runs, task), "final_validation")
    test = rows(run_dir(runs, task), "test")[0]
    cells = [cell.strip() for cell in re.search(r"loss \(lower is better\)(.*)", summary)[1].split("│") if cell.strip()]
    assert cells[0] == f"{best['loss']:.4f}" and cells[2] == f"{test['loss']:.4f}"
    recorded = json.loads((run_dir(runs, task) / "baseline.json").read_text())
    for split, shown in (("validation", cells[1]), ("test", cells[3])):
        assert recorded[split].keys() == best.keys() - {"step", "split"} and f"{recorded[split]['loss']:.4f}" == shown
    # Six updates of a tiny model teach nothing, and the summary says so.
    assert float(cells[1]) < float(cells[0])
    assert "loss is not below the baseline" in summary
    assert "6 of 6 updates" in summary and "parameters, on " in summary


def test_the_first_line_comes_before_anything_that_takes_long_to_load(tmp_path: Path) -> None:
    program = "import sys; sys.modules['jax'] = None; from jaxlm import train; train.main(['--task', 'mlm'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "jaxlm: task mlm; loading JAX\n" and "import of jax halted" in done.stderr


def test_config_of_a_run_repeats_it_and_another_seed_does_not(runs: Any, launch: Any) -> None:
    cwd, first = runs[0], run_dir(runs, "mlm")
    again, other = (
        launch(f"--config {first}/config.toml {args}", cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for args in ("", "--train.seed 1 --run.dir other")
    )
    stdout, _ = finished(again)
    finished(other)
    second = first.with_name(first.name[:-1] + "2")
    assert f"run     {second.relative_to(cwd)}" in stdout
    assert timeless(second) == timeless(first)
    assert (second / "config.toml").read_bytes() == (first / "config.toml").read_bytes()
    assert (second / "samples.txt").read_bytes() == (first / "samples.txt").read_bytes()
    for a, b in zip(timeless(first), timeless(cwd / "other"), strict=True):
        assert a["loss"] != b["loss"]


def test_the_best_checkpoint_is_tested_where_the_last_one_is_worse(launch: Any, tmp_path: Path) -> None:
    args = f"{TINY} --train.learning-rate 10 --train.warmup-steps 6 --train.decay-steps 12"
    longer = launch(f"{args} --train.max-steps 6 --run.dir longer", tmp_path, stdout=subprocess.PIPE, stderr=-1)
    shorter = launch(f"{args} --train.max-steps 3 --run.dir shorter", tmp_path, stdout=subprocess.PIPE, stderr=-1)
    stdout, _ = finished(longer)
    finished(shorter)
    validation = {row["step"]: row["loss"] for row in rows(tmp_path / "longer", "validation")}
    assert validation[3] < validation[6]
    assert rows(tmp_path / "longer", "test") == rows(tmp_path / "shorter", "test")
    assert "scores of step 3, the best by validation loss" in stdout
    assert "step 3, the best, and step 6, the last" in stdout
    assert {path.name for path in (tmp_path / "longer" / "checkpoints").iterdir()} == {"3", "6"}


def interrupt(process: subprocess.Popen, limit_s: float = 300) -> tuple[str, str]:
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=limit_s)


def test_ctrl_c_saves_a_checkpoint_and_sums_up(launch: Any, tmp_path: Path) -> None:
    process = launch(f"{ENDLESS} --run.dir run", tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_line(process, "step 3  validation")
    stdout, stderr = interrupt(process)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "interrupted: saving a checkpoint" in stdout
    last = int(re.search(r"mlm interrupted after .*: ([\d,]+) of 1,000,000 updates", stdout)[1].replace(",", ""))
    assert f"step {last}" in re.search(r"  checkpoints .*", stdout)[0]
    assert (tmp_path / "run" / "checkpoints" / str(last) / "checksums.json").is_file()
    assert "the best by validation loss" in stdout and "Next, " in stdout
    assert rows(tmp_path / "run", "test") == []


def test_ctrl_c_while_the_first_update_compiles_ends_after_it(launch: Any, tmp_path: Path) -> None:
    # 3 layers: no other test has compiled this.
    args = f"{ENDLESS} --model.n-layers 3 --run.dir run"
    process = launch(args, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_line(process, "compiling the first update")
    stdout, stderr = interrupt(process)
    assert process.returncode == 130, stderr
    assert stdout.index("interrupted: saving a checkpoint") < stdout.index("first update done")
    assert "1 of 1,000,000 updates" in stdout and "No scores" in stdout
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


def test_ctrl_c_ends_an_evaluation_before_its_end(launch: Any, tmp_path: Path) -> None:
    # Some 40,000 validation samples, one a batch: far more than there is time for.
    text = "\n".join(
        f"{i} birds sit on wire {i * 7919 % 1000} and sing of number {i * 104729 % 9973}" for i in range(20000)
    )
    (tmp_path / "birds.txt").write_text(text)
    args = f"{ENDLESS} --data.path birds.txt --data.validation-fraction 0.9 --data.test-fraction 0 --run.dir run"
    args = f"{args} --train.batch-size 1 --train.eval-interval 1"
    process = launch(args, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_line(process, "first update done")
    time.sleep(1)
    stdout, stderr = interrupt(process)
    assert process.returncode == 130, stderr
    assert "validation:" not in stdout
    assert "1 of 1,000,000 updates" in stdout
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("begun", ["", "cwd/runs/*", "cache/tokens/*.tmp/*"], ids=["loading", "reading", "caching"])
def test_ctrl_c_during_setup_leaves_nothing(begun: str, launch: Any, tmp_path: Path) -> None:
    text = "\n".join(f"{i} birds sit on wire {i * 7919 % 1000}" for i in range(100_000))
    (tmp_path / "birds.txt").write_text(text)
    (tmp_path / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "birds", "wire")))
    (tmp_path / "cwd").mkdir()
    process = launch(
        f"{ENDLESS} --data.path ../birds.txt --tokenizer.path ../vocab.txt --data.cache-dir ../cache",
        tmp_path / "cwd",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for_line(process, "loading JAX")
    while begun and not list(tmp_path.glob(begun)):
        assert process.poll() is None
        time.sleep(0.01)
    _, stderr = interrupt(process)
    assert process.returncode == 130, stderr
    assert stderr == "interrupted before training; nothing was saved\n"
    assert list((tmp_path / "cwd").iterdir()) == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_second_ctrl_c_ends_at_once(launch: Any, tmp_path: Path) -> None:
    # An update that takes longer than anyone waits, so that only a process that is ended immediately can end.
    args = "--model.d-model 512 --model.n-layers 4 --model.seq-len 256 --train.batch-size 64 --run.dir run"
    process = launch(args, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_line(process, "compiling the first update")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "a second signal ends immediately")
    stdout, stderr = interrupt(process)  # the update itself takes longer than this waits
    assert process.returncode == 130
    assert stderr.endswith("interrupted again: ended immediately\n")


def test_files_in_the_run_folder_ask_for_a_checkpoint_and_for_the_end(launch: Any, tmp_path: Path) -> None:
    args = f"{ENDLESS} --train.eval-interval 1000000 --run.dir run"
    process = launch(args, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_line(process, "step 1 ")
    (tmp_path / "run" / "save_checkpoint").touch()
    deadline_s = time.monotonic() + 300
    while not (saved := [path.name for path in (tmp_path / "run" / "checkpoints").glob("*") if path.name.isdecimal()]):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert process.poll() is None and not (tmp_path / "run" / "save_checkpoint").exists()
    (tmp_path / "run" / "stop").touch()
    stdout, _ = finished(process)
    last = int(re.search(r"mlm stopped after .*: ([\d,]+) of 1,000,000 updates", stdout)[1].replace(",", ""))
    assert last > int(saved[0])
    assert [row["step"] for row in rows(tmp_path / "run", "validation")] == [last]
    assert not (tmp_path / "run" / "stop").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(last)]


def test_a_diverged_run_says_so_in_one_line(launch: Any, tmp_path: Path) -> None:
    rates = "--train.learning-rate 1000 --train.weight-decay 1000 --train.warmup-steps 0"
    args = f"{TINY} {rates} --train.max-steps 20 --run.dir run"
    process = launch(args, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, stderr = process.communicate()
    assert process.returncode == 2
    assert re.fullmatch(
        r"error: train.learning_rate=1000.0: the loss or gradient is \w+ at step \d+, and was .*\n", stderr
    )


def test_a_terminal_gets_a_progress_bar(launch: Any, tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    env = {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
    process = launch(f"{SHORT} --run.dir run", tmp_path, env, stdout=terminal, stderr=terminal, stdin=terminal)
    os.close(terminal)
    output = b""
    while select.select([screen], [], [], 300)[0]:
        try:
            output += os.read(screen, 4096)
        except OSError:  # Linux reports the closed other end so
            break
    os.close(screen)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    bars = [line for line in re.split(r"[\r\n]+", text) if line.startswith("step 6/6 ")]
    assert re.fullmatch(
        r"step 6/6 \S+ loss \d+\.\d{4}  rate \d\.\d\de-\d\d  [\d,]+ tokens/s \d:\d\d:\d\d left *", bars[-1]
    )
    assert len(bars[-1]) <= 80
    assert b"\x1b[?25l" in output and output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")  # cursor comes back
    assert "\x1b" not in (tmp_path / "run" / "log.txt").read_text()


def test_tensorboard_gets_the_rows_of_metrics(runs: Any) -> None:
    from tensorboardX.proto.event_pb2 import Event

    folder = run_dir(runs, "cola")
    (file,) = (folder / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # records of a length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    expected = {
        (f"{row['split']}/{name}", row["step"]): pytest.approx(value)
        for row in rows(folder)
        for name, value in row.items()
        if name not in ("split", "step")
    }
    assert found == expected


def test_tables_of_files_are_read_without_torch(tmp_path: Path) -> None:
    rows = "sentence,label\n" + "".join(f"film number {i},{i % 2}\n" for i in range(200))
    (tmp_path / "reviews.csv").write_text(rows)
    # A batch larger than the file ends it after the data, before a compile.
    args = "--task sst2 --data.path reviews.csv --data.cache-dir cache --train.batch-size 500"
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        f"from jaxlm.train import main; main({args.split()})"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "500 are needed" in output.stderr
    assert output.stdout.splitlines()[-1] == "False"
