"""What RunLog prints, to terminals of several kinds, to pipes and to files."""

import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config as configs
from jaxlm import log
from jaxlm.config import Config
from jaxlm.errors import UserError

# Some lines, a bar of 100 updates, and a warning in the middle of it.
SCRIPT = """
import sys, time
from pathlib import Path
from jaxlm.log import RunLog
log = RunLog()
log.open(Path(sys.argv[1]), [])
log.say("text with [bold]brackets[/bold] and :smile:")
log.say("caf\\u00e9")
with log.training_bar(100) as show:
    for step in (1, 50, 100):
        show(step, f"loss {1 / step:.4f}  rate 1.00e-03  12,345 tokens/s")
        show(step, "")
        if step == 50:
            log.warn("something is odd")
with log.bytes_bar("tokenizing", 10) as done:
    done(10)
log.say("the end")
"""


def printed(tmp_path: Path, is_terminal: bool, **env: str) -> str:
    """Return what SCRIPT prints, stderr included, to a terminal of 80 columns or to a pipe."""
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    options: Any = {"env": {**variables, "TERM": "xterm-256color", **env}}
    if not is_terminal:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, text=True, **options
        ).stdout
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
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
    """A logger that keeps what it is told."""

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


def test_samples_go_to_the_terminal_on_request_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_log = log.RunLog()
    run_log.open(tmp_path, [])
    run_log.samples(3, "one [MASK]", to_terminal=False)
    assert capsys.readouterr().out == ""
    run_log.samples(6, "two [MASK]", to_terminal=True)
    assert "two [MASK]" in capsys.readouterr().out
    assert (tmp_path / "samples.txt").read_text() == "--- step 3 ---\none [MASK]\n\n--- step 6 ---\ntwo [MASK]\n\n"


def test_loggers_are_off_unless_asked_for(tmp_path: Path) -> None:
    assert log.open_loggers(Config(), tmp_path, {}, 0) == []
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
