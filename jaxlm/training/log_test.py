"""What RunLog prints, to terminals of several kinds, to pipes and to files."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.training import log
from jaxlm.training.log import RunLog

# Some lines, a bar of 100 updates, and a warning in the middle of it.
SCRIPT = """
import sys, time
from pathlib import Path
from jaxlm import terminal
from jaxlm.training.log import RunLog
terminal.safe_streams().__enter__()
log = RunLog()
log.say("  model.d_model = 32  (a setting of the command line)")
log.say("/a/" + 20 * "long/" + "path")
log.open(Path(sys.argv[1]), [])
log.say("text with [bold]brackets[/bold] and :smile:")
log.say("caf\\u00e9")
with log.training_bar(100) as show:
    for step in (1, 50, 100):
        show(step, f"loss {1 / step:.4f}  rate 1.00e-03  12,345 tokens/s")
        show(step, "")
        if step == 50:
            log.warn("something is odd")
with log.pass_bar("tokenizing", 10) as done:
    done(10)
log.say("the end")
"""


def printed(tmp_path: Path, is_terminal: bool, columns: int = 80, **env: str) -> str:
    """Return what SCRIPT prints, stderr included, to a terminal or to a pipe."""
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    options: Any = {"env": {**variables, "TERM": "xterm-256color", **env}}
    if not is_terminal:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, text=True, **options
        ).stdout
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=terminal, **options)
    os.close(terminal)
    output = b""
    try:
        while block := os.read(screen, 4096):
            output += block
    except OSError:  # how Linux tells that the other end is closed
        pass
    os.close(screen)
    assert process.wait() == 0
    return output.decode()


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    output = printed(tmp_path, is_terminal=False)
    assert "\x1b" not in output and "\r" not in output
    lines = output.splitlines()
    assert "text with [bold]brackets[/bold] and :smile:" in lines
    assert "step 1  loss 1.0000  rate 1.00e-03  12,345 tokens/s" in lines
    assert "warning: something is odd" in lines and lines[-1] == "the end"
    assert not any(line.startswith("step 50") for line in lines)  # sooner than a line is due


def test_what_the_encoding_lacks_is_printed_as_an_escape(tmp_path: Path) -> None:
    assert r"caf\xe9" in printed(tmp_path, is_terminal=False, PYTHONIOENCODING="ascii").splitlines()
    assert "café" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_terminal_gets_a_bar_with_colors(tmp_path: Path) -> None:
    output = printed(tmp_path, is_terminal=True)
    assert re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", output)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    bars = [line for line in re.split(r"[\r\n]+", text) if line.startswith("step 100/100 ")]
    assert re.match(r"step 100/100 \S+ loss 0\.0100  rate 1\.00e-03  12,345 tokens/s \S+ left", bars[-1])
    assert max(map(len, bars)) <= 80
    assert "warning: something is odd" in text


@pytest.mark.parametrize("columns", [60, 40])
def test_a_narrow_terminal_keeps_bar_and_time_and_whole_words(tmp_path: Path, columns: int) -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed(tmp_path, is_terminal=True, columns=columns))
    lines = re.split(r"[\r\n]+", text)
    assert any(re.match(r"step 100/100 ━{8,} .*\d:\d\d:\d\d left", line) for line in lines)
    assert any(re.match(r"(tokenizing )?━{8,} 100% \d:\d\d:\d\d", line) for line in lines)
    assert max(len(line) for line in lines if " " in line.strip()) <= columns
    words = set("model.d_model = 32 (a setting of the command line)".split())
    assert words <= set(text.split()), "no word is broken"
    assert f"/a/{'long/' * 20}path" in text, "nor a path"


def test_a_pass_that_takes_long_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    now_s = 100.0
    monkeypatch.setattr("jaxlm.training.log.time.monotonic", lambda: now_s)
    with RunLog().pass_bar("scoring test", 1000) as show:
        for done in range(0, 1000, 10):  # 10 a second
            show(done)
            now_s += 1
    assert capsys.readouterr().out.splitlines() == [
        "scoring test: 5%, about 95 s left",
        "scoring test: 35%, about 65 s left",
        "scoring test: 65%, about 35 s left",
        "scoring test: 95%, about 5 s left",
    ]
    with RunLog().pass_bar("scoring test", 1000) as show:
        show(500)
    assert capsys.readouterr().out == ""


def test_no_color_is_respected(tmp_path: Path) -> None:
    output = printed(tmp_path, is_terminal=True, NO_COLOR="1")
    assert "step 100/100" in output
    for codes in re.findall(r"\x1b\[([0-9;]*)m", output):
        assert not {int(code or 0) for code in codes.split(";")} & {*range(30, 50), *range(90, 108)}


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    output = printed(tmp_path, is_terminal=True, TERM="dumb")
    assert "\x1b" not in output
    assert "step 1  loss 1.0000" in output


def test_the_log_file_has_what_is_printed_without_control_codes(tmp_path: Path) -> None:
    printed(tmp_path, is_terminal=True, FORCE_COLOR="1")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines == ["text with [bold]brackets[/bold] and :smile:", "café", "warning: something is odd", "the end"]


class Kept:
    """A logger that keeps the values it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, dict[str, float]]] = []
        self.is_closed = False

    def log(self, step: int, split: str, scores: dict[str, float]) -> None:
        self.rows.append((step, split, scores))

    def close(self) -> None:
        self.is_closed = True


def test_rows_are_json_also_where_a_score_is_not_finite(tmp_path: Path) -> None:
    run_log, kept = log.RunLog(), Kept()
    run_log.open(tmp_path, [kept])
    run_log.row(3, "train", {"loss": 0.1 + 0.2, "perplexity": math.inf})
    run_log.row(4, "test", {"loss": math.nan})
    run_log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 3, "split": "train", "loss": 0.1 + 0.2, "perplexity": None},
        {"step": 4, "split": "test", "loss": None},
    ]
    assert kept.rows[0] == (3, "train", {"loss": 0.1 + 0.2, "perplexity": math.inf}) and kept.is_closed


def full_device(run: Path, name: str) -> Callable[[], None]:
    (run / name).symlink_to("/dev/full")
    return (run / name).unlink


def folder_in_the_way(run: Path, name: str) -> Callable[[], None]:
    (run / name).mkdir()
    return (run / name).rmdir


def pipe_without_reader(run: Path, name: str) -> Callable[[], None]:
    os.mkfifo(run / name)
    return (run / name).unlink


def folder_gone(run: Path, name: str) -> Callable[[], None]:
    run.rmdir()
    return run.mkdir


def file_size_limit(run: Path, name: str) -> Callable[[], None]:
    """Cut the second line, or the one that belongs there, short."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk(run: Path, name: str) -> Callable[[], None]:
    """Fill a file system to its last byte."""
    mount(run, "64k")
    with contextlib.suppress(OSError), open(run / "ballast", "wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    return (run / "ballast").unlink


def mount(folder: Path, size: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs root")


HINDRANCES = (full_device, folder_in_the_way, pipe_without_reader, folder_gone, file_size_limit, full_disk)
FILES = ("metrics.jsonl", "samples.txt", "log.txt", "environment.jsonl", "tensorboard/events.out.tfevents.1")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "run").mkdir()
    yield tmp_path / "run"
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if os.path.ismount(tmp_path / "run"):
        subprocess.run(["umount", tmp_path / "run"], check=True)


@pytest.mark.parametrize("hinder", HINDRANCES)
@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_written_is_written_once_it_can_be(
    name: str, hinder: Any, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "/" in name and hinder not in (folder_gone, full_disk):
        (run / "tensorboard").mkdir()
    run_log = log.RunLog()
    run_log.open(run, [])
    lines = [f"{i:02} {'x' * 60}\n" for i in range(50)]
    relieve = hinder(run, name)
    for i, line in enumerate(lines[:40]):
        run_log.append(name, line, i)
    relieve()
    for line in lines[40:]:
        run_log.append(name, line)
    run_log.close()
    written = (run / name).read_text().splitlines(keepends=True)
    assert [line for line in written if not line.startswith("warning: ")] == lines
    assert run_log.unwritten() == {}
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{name}: cannot be written (" in warning and "the run continues" in warning


def test_a_line_is_written_whole_or_not_at_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_log = log.RunLog()
    run_log.open(run, [])
    relieve = file_size_limit(run, "")
    for i in range(20):
        run_log.row(i, "train", {"loss": 1 / 3})
        run_log.samples(i, "a few words", to_terminal=False)
    text = (run / "metrics.jsonl").read_text()
    relieve()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [0] and text.endswith("\n")
    run_log.close()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(20))
    assert len(capsys.readouterr().err.splitlines()) == 1  # for two files and 40 lines


def test_what_is_never_written_is_named_at_the_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_device(run, "metrics.jsonl")
    folder_in_the_way(run, "samples.txt")
    run_log = log.RunLog()
    run_log.open(run, [])
    for i in range(3):
        run_log.row(i, "train", {"loss": 1.0})
        run_log.samples(i, "words", to_terminal=False)
    run_log.close()
    first, second, *last = capsys.readouterr().err.splitlines()
    assert "No space left on device" in first and "Is a directory" in second
    assert last == [
        f"warning: {run}/metrics.jsonl: 3 entries not written (No space left on device)",
        f"warning: {run}/samples.txt: 3 entries not written (Is a directory)",
    ]
    assert (run / "log.txt").read_text().splitlines() == [first, second, *last]


def test_what_waits_is_bounded(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(log, "MOST_WAITING", 1000)
    run_log = log.RunLog()
    run_log.open(run, [])
    relieve = full_device(run, "samples.txt")
    for i in range(150):
        run_log.append("samples.txt", f"{i:9}\n")
    relieve()
    run_log.close()
    assert (run / "samples.txt").read_text() == "".join(f"{i:9}\n" for i in range(50, 150))
    assert "samples.txt: 50 entries not written (No space left on device)" in capsys.readouterr().err


def test_a_line_that_a_killed_process_left_is_ended(run: Path) -> None:
    (run / "log.txt").write_text("whole\nhal")
    run_log = log.RunLog()
    run_log.open(run, [])
    run_log.append("log.txt", "next\n")
    assert (run / "log.txt").read_text() == "whole\nhal\nnext\n"


def test_rows_that_wait_are_dropped_by_a_rollback(run: Path) -> None:
    run_log = log.RunLog()
    run_log.open(run, [])
    relieve = full_device(run, "metrics.jsonl")
    for i in range(6):
        run_log.row(i, "train", {"loss": 1.0})
    run_log.drop_after(2, ["metrics.jsonl", "samples.txt"])
    relieve()
    run_log.row(3, "train", {"loss": 2.0})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_logger_that_fails_is_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Kept):
        def log(self, step: int, split: str, scores: dict[str, float]) -> None:
            super().log(step, split, scores)
            raise OSError(28, "No space left on device")

    run_log, failing, kept = log.RunLog(), Failing(), Kept()
    run_log.open(run, [failing, kept])
    for i in range(3):
        run_log.row(i, "train", {"loss": 1.0})
    run_log.close()
    assert (len(failing.rows), len(kept.rows), kept.is_closed) == (1, 3, True)
    assert "warning: Failing: OSError(28" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_behind_a_standard_stream_ends_nothing(stream: str, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from jaxlm.errors import outlive_full_disks
from jaxlm.training.log import RunLog
outlive_full_disks()
log = RunLog()
log.open(Path({str(tmp_path)!r}), [])
for i in range(2000):
    log.say("a line", i)
    log.warn("a warning")
"""
    other = "stderr" if stream == "stdout" else "stdout"
    with open("/dev/full", "w") as full:
        pipes: Any = {stream: full, other: subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", script], **pipes)
    assert done.returncode == 0
    assert len(getattr(done, other).splitlines()) == 2000
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4000


def test_samples_go_to_the_terminal_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_log = log.RunLog()
    run_log.open(tmp_path, [])
    run_log.samples(3, "one [MASK]", to_terminal=False)
    assert capsys.readouterr().out == ""
    run_log.samples(6, "two [MASK]", to_terminal=True)
    assert "two [MASK]" in capsys.readouterr().out
    assert (tmp_path / "samples.txt").read_text() == "--- step 3 ---\none [MASK]\n\n--- step 6 ---\ntwo [MASK]\n\n"


def test_loggers_are_off_unless_asked_for(tmp_path: Path) -> None:
    assert log.open_loggers(Config(), log.RunLog(), tmp_path, 0) == []
    assert list(tmp_path.iterdir()) == []


def test_a_logger_that_is_not_installed_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    log.check_loggers(Config())
    monkeypatch.setattr(sys, "path", [])
    for module in ("tensorboardX", "wandb"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UserError, match=r"log.tensorboard=true: .* pip install 'jaxlm\[tensorboard\]'"):
        log.check_loggers(configs.build({"log.tensorboard": True}))
    with pytest.raises(UserError, match=r"log.wandb=mine: .* pip install 'jaxlm\[wandb\]'"):
        log.check_loggers(configs.build({"log.wandb": "mine"}))
