"""What reaches terminals and pages: nothing that they obey, and nothing that their encoding lacks."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from jaxlm import evaluate, predict, report, runs, terminal
from jaxlm.errors import UserError, reported
from jaxlm.reporting import html_page, plot_schedule
from jaxlm.testing import tiny_runs
from jaxlm.training import log

HOSTILE = "\x1b]0;owned\x07\x1b[2J \x9b31m \x85 \x7f \r over \b\0 \u202eevil\u202c \u200fx\u061c \u2066x\u2069 \udc80"
MASKED = "the cat \x1b[2J \x7f \x9b é 日"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
FOREIGN = "café 日本 Привет 🎉 ï"
ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]


class Captured:
    """Standard streams of an encoding, which refuse what it lacks, as those of Python do."""

    def __init__(self, encoding: str, monkeypatch: pytest.MonkeyPatch):
        self.encoding, self.bytes = encoding, io.BytesIO()
        # Both are kept: a stream that is collected closes its bytes.
        self.streams = [io.TextIOWrapper(self.bytes, encoding, "strict", write_through=True) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", self.streams[0])
        monkeypatch.setattr(sys, "stderr", self.streams[1])

    def text(self) -> str:
        return self.bytes.getvalue().decode(self.encoding)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a hostile name, with hostile samples and data."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / f"{FOREIGN} \x1b[31m.tsv"
    words = ["the cat", "a dog", "both of them", FOREIGN, "\x1b[2J \u202e"]
    rows = (f"{words[i % 5]} sat on the mat {i} \x1b[31m\t{i % 2}" for i in range(90))
    data.write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    settings = {"data.path": str(data), "data.n_labels": 2, "data.cache_dir": str(folder / "cache")}
    run = tiny_runs.write(folder / f"run \x1b[31m {FOREIGN}", "sst2", {3: 0.5}, **settings)
    (run / "samples.txt").write_text(f"--- step 3 ---\n{HOSTILE[:-1]} {FOREIGN}\n\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 3, "split": "validation", "loss": 0.5}) + "\n")
    (run / "text.txt").write_text(MASKED, encoding="utf-8")
    return run


def ran(main: object, *argv: object) -> int:
    try:
        return int(main([str(arg) for arg in argv]))  # type: ignore[operator]
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_all_commands_print_what_is_safe_in_every_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    captured = Captured(encoding, monkeypatch)
    assert ran(runs.main, "list", run.parent) == 0
    assert ran(runs.main, "show", run) == 0
    assert ran(runs.main, "verify", run) == 0
    assert ran(report.main, run) == 0
    assert ran(report.main, run.parent / HOSTILE[:-1].replace("\0", "")) == 2, "an error names the folder"
    assert ran(predict.main, "--checkpoint", run, "--file", run / "text.txt") == 0
    assert ran(evaluate.main, "--checkpoint", run, "--split", "validation") == 0
    text = captured.text()
    assert not OBEYED.search(text)
    assert "run \\x1b[31m" in text and "worst errors" in text
    if captured.encoding == "utf-8":
        assert FOREIGN in text


def test_json_is_printable_ascii_and_whole(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    captured = Captured("ascii", monkeypatch)
    assert ran(predict.main, "--checkpoint", run, "--json", "--text", MASKED) == 0
    line = next(line for line in captured.text().splitlines() if line.startswith("{"))
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["text"] == MASKED
    assert json.loads(terminal.dumps({"x": HOSTILE})) == {"x": HOSTILE}


def test_a_page_shows_them(run: Path) -> None:
    assert ran(report.main, run) == 0
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not OBEYED.search(text) and "\\x1b]0;owned\\x07" in text and FOREIGN in text
    assert not OBEYED.search(html_page.page(HOSTILE, [HOSTILE]))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_files_of_a_run_are_safe_with_cat(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Captured(encoding, monkeypatch)
    with reported(debug=False):
        run_log = log.RunLog()
        run_log.open(tmp_path, [])
        run_log.say(f"says {HOSTILE} {FOREIGN}")
        run_log.warn(f"warns {HOSTILE} {FOREIGN}")
        run_log.samples(3, f"made {HOSTILE} {FOREIGN}", to_terminal=True)
    for text in (captured.text(), *((tmp_path / name).read_text("utf-8") for name in ("log.txt", "samples.txt"))):
        assert not OBEYED.search(text) and "\\x1b]0;owned\\x07" in text
    assert "warns" in (tmp_path / "log.txt").read_text("utf-8")
    assert FOREIGN in (tmp_path / "samples.txt").read_text("utf-8")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_error_that_quotes_data_is_shown(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = Captured(encoding, monkeypatch)
    with pytest.raises(SystemExit), reported(debug=True):
        raise UserError(f"{HOSTILE} {FOREIGN}: is bad")
    assert not OBEYED.search(captured.text()) and "error: " in captured.text() and "Traceback" in captured.text()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_schedule_is_drawn_only_where_it_can_be_shown(
    encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    captured = Captured(encoding, monkeypatch)
    (tmp_path / "\x1b[31mé.toml").write_text("[train]\nmax_steps = 9\nwarmup_steps = 3\n")
    assert ran(plot_schedule.main, "--config", tmp_path / "\x1b[31mé.toml") == 0
    assert not OBEYED.search(captured.text())
    assert ("not drawn" in captured.text()) == (captured.encoding != "utf-8")


@pytest.mark.parametrize(("command", "columns"), [("train", 60), ("train", 40), ("serve", 40), ("runs", 40)])
def test_help_fits_a_narrow_terminal_in_whole_words(command: str, columns: int) -> None:
    def text(columns: int) -> str:
        screen, terminal_end = pty.openpty()
        fcntl.ioctl(terminal_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {name: x for name, x in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        help_command = [sys.executable, "-m", f"jaxlm.{command}", "--help"]
        with subprocess.Popen(help_command, stdout=terminal_end, env=env | {"TERM": "xterm-256color"}) as process:
            os.close(terminal_end)
            output = b""
            with contextlib.suppress(OSError), open(screen, "rb", buffering=0) as file:
                while block := file.read(4096):
                    output += block
        assert process.returncode == 0
        return re.sub(r"\x1b\[[0-9;]*m|[─│╭╮╰╯]", "", output.decode()).replace("\r", "")

    narrow = text(columns)
    assert "\\x1b" not in narrow, "colours are sent"
    assert max(map(len, narrow.splitlines())) <= columns
    # A list of choices may break at its commas.
    words = {piece for word in text(200).split() for piece in word.split(",")}
    assert {piece for word in narrow.split() for piece in word.split(",")} <= words | {"", f"jaxlm.{command}"}


def test_newlines_and_tabs_stay_and_escapes_are_not_escaped_again() -> None:
    assert terminal.shown("a\n\tb\\x1b") == "a\n\tb\\x1b"
    assert terminal.shown(terminal.shown(HOSTILE)) == terminal.shown(HOSTILE)
    assert terminal.shown("\x1b\x9b\u202e\r\udc80") == "\\x1b\\x9b\\u202e\\r\\udc80"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_the_null_device(closed: str, run: Path, tmp_path: Path) -> None:
    command = f'{sys.executable} -m jaxlm.runs show "$0" {closed}'
    done = subprocess.run(["sh", "-c", command, run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and (": task sst2" in done.stdout) == (" >&-" not in f" {closed}")
