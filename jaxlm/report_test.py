"""The page of runs: complete, from run folders alone, in one file; and its picture, by a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jaxlm import report
from jaxlm import runs as runs_command
from jaxlm.reporting import run_page, run_reader
from jaxlm.reporting.run_reader_test import write
from jaxlm.training import environment

EVALUATION = {
    "step": 20,
    "scores": {"accuracy": {"value": 0.75, "low": 0.7, "high": 0.8125, "baseline": 0.5, "better": "higher"}},
    "calibration_error": {"value": 0.125, "low": 0.1, "high": 0.25, "baseline": None, "better": "lower"},
    "bins": [{"low": 0.5, "high": 0.6, "count": 8, "confidence": 0.55, "accuracy": 0.5}],
    "confusion": [[3, 1, 0], [2, 10, 0]],
    "worst": [{"text": "a <b>cat</b>", "label": 0, "predicted": 1, "probability": 0.03125}],
}


class Page(HTMLParser):
    """The tags with their attributes, the text, and the cells of tables row by row."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text, self.is_cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.is_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.is_cell = self.is_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.is_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a task; one was evaluated, and was started twice."""
    path = tmp_path_factory.mktemp("runs")
    first, _ = write(path / "first", "sst2"), write(path / "second", "sst2", **{"train.learning_rate": 0.5})
    (first / "evaluation_test.json").write_text(json.dumps(EVALUATION))
    (first / "samples.txt").write_text("".join(f"--- step {i} ---\n<i>made</i> after {i}\n\n" for i in range(1, 31)))
    for step in (0, 20):
        with open(first / environment.FILE, "a") as file:
            file.write(json.dumps(environment.describe(step, "2 x chip")) + "\n")
    return path


def page_of(*runs: Path) -> tuple[str, Page]:
    text = run_page.page([run_reader.read(run) for run in runs])
    return text, Page(text)


def test_the_page_of_a_run(runs: Path) -> None:
    text, found = page_of(runs / "first")
    assert ["score of step 20, the best", "validation", "baseline", "test", "baseline"] in found.rows
    assert ["accuracy", "0.5000", "-", "0.2500", "-"] in found.rows and "not recorded in this run" in found.text
    assert "Checkpoint of step 20, the best." in found.text
    figures = [attrs["aria-label"] for tag, attrs in found.tags if tag == "svg" and attrs.get("role") == "img"]
    titles = [str(label).partition(":")[0] for label in figures]
    assert titles == ["loss, nats", "validation accuracy", "throughput, tokens/s", "calibration, sst2"]
    assert ["accuracy", "0.7500", "0.7000 to 0.8125", "0.5000", "higher"] in found.rows
    assert ["calibration error", "0.1250", "0.1000 to 0.2500", "", "lower"] in found.rows
    assert "Worst errors: 1 of 3" in found.text
    assert ["label 0", "3", "1"] in found.rows and ["a <b>cat</b>", "0", "1", "0.0312"] in found.rows
    steps = [i for i in range(1, 31) if f"<i>made</i> after {i}\n" in f"{found.text}\n"]
    assert len(steps) == run_page.MOST_STEPS + 1 and {1, 20, 30} <= set(steps) and "step 20, the best" in found.text
    assert "9 of 30 evaluations are shown; the other 21 are in " in found.text
    assert ["after updates", "0", "20"] in found.rows and ["device", "2 x chip", "2 x chip"] in found.rows
    assert ["model.d_model", "12", ""] in found.rows and ["train.seed", "0", "default"] in found.rows


def test_the_page_of_several_runs(runs: Path) -> None:
    text, found = page_of(runs / "first", runs / "second")
    assert found.text.strip().startswith("Runs compared: first, second")
    assert ["train.learning_rate", "0.001", "0.5"] in found.rows
    assert ["validation accuracy", "0.5000", "0.5000"] in found.rows
    assert ["first", "20 (best)", "accuracy", "0.7500", "0.7000 to 0.8125", "0.5000", "higher"] in found.rows
    (figure,) = [part for part in text.split("<figure>") if part.startswith("<b>validation loss")]
    assert figure.count('stroke-linejoin="round"') == 2 and "</svg> first</span>" in figure
    assert "second: not recorded." in found.text


def record(run: Path, accuracy: float, loss: float | None = 0.6875) -> Path:
    scores = {"accuracy": accuracy, "loss": loss}
    told = {"name": "a guess", "lower_is_better": ["loss"], "validation": scores, "test": scores}
    (run / "baseline.json").write_text(json.dumps(told))
    return run


def levels(text: str) -> dict[str, int]:
    """Return the number of baselines in each chart that has some."""
    charts = {chart.partition("</b>")[0]: chart.count('class="level"') for chart in text.split("<figure><b>")[1:]}
    return {title: n for title, n in charts.items() if n}


def test_baselines_stand_beside_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (record(write(tmp_path / name, "sst2"), 0.5625) for name in ("one", "other"))
    text, found = page_of(one)
    assert ["accuracy", "0.5000", "0.5625", "0.2500", "0.5625", "higher"] in found.rows
    assert ["loss", "2.0000", "0.6875", "2.2500", "0.6875", "lower"] in found.rows
    assert "validation accuracy, step 20; baseline 0.5625" in found.text and "Baseline: a guess." in found.text
    assert levels(text) == {"loss, nats": 1, "validation accuracy": 1}
    for accuracy, n in ((0.5625, 1), (0.75, 2)):  # the same line is drawn once
        record(other, accuracy)
        old = write(tmp_path / f"old{n}", "sst2")  # without recorded ones
        text, found = page_of(one, other, old)
        assert ["validation accuracy, baseline", "0.5625", f"{accuracy:.4f}", "-"] in found.rows
        assert levels(text) == {"validation accuracy": n, "validation loss, nats": 1}
    assert runs_command.main(["compare", str(one), str(old)]) == 0
    assert "validation accuracy, baseline │ 0.5625" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b"[" * 100_000,
        b'{"validation": 3, "test": {"accuracy": "x"}}',
        b'{"validation": null}',
        b'{"validation": {"accuracy": 1%s}}' % (b"0" * 400),
        b'{"test": {"accuracy": NaN}}',
    ],
)
def test_baselines_that_cannot_be_read_are_missing(content: bytes, tmp_path: Path) -> None:
    run = write(tmp_path / "run", "sst2")
    (run / "baseline.json").write_bytes(content)
    assert ["accuracy", "0.5000", "-", "0.2500", "-"] in page_of(run)[1].rows


def test_a_row_without_a_score_is_no_score(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    log = (run / "metrics.jsonl").read_text().replace('"test", "loss": 2.25', '"test", "loss": "low"')
    (run / "metrics.jsonl").write_text(log)
    assert "test loss" not in page_of(run)[1].text


def test_the_best_step_is_marked(tmp_path: Path) -> None:
    for name, task, charts in (("one", "sst2", 2), ("other", "mlm", 1)):
        text, _ = page_of(write(tmp_path / name, task))
        assert text.count('class="best"') == text.count("</svg> best step</span>") == charts
        assert text.count("(best step)") == charts
    text, _ = page_of(tmp_path / "one", write(tmp_path / "third", "sst2"))
    assert text.count('class="best"') == 4


def test_curves_of_different_tasks_have_axes_of_their_own(tmp_path: Path) -> None:
    tasks = {"a": "sst2", "b": "mlm", "c": "sst2", "d": "gpt"}
    text, _ = page_of(*(write(tmp_path / name, task) for name, task in tasks.items()))
    charts = text.split("<h2>Curves</h2>")[1].split("<h2>")[0]
    assert re.findall("<h3>Task ([^<]*)</h3>", charts) == ["sst2", "mlm", "gpt"]
    for chart in re.findall("<figure>.*?</figure>", charts, re.DOTALL):
        labels = set(re.findall(r"</svg> ([abcd])</span>", chart))
        assert labels in ({"a", "c"}, set())  # a chart of one run needs no legend
    for name in "ac":
        (tmp_path / name / "evaluation_test.json").write_text(json.dumps(EVALUATION))
    other = write(tmp_path / "e", "cola")
    (other / "evaluation_test.json").write_text(json.dumps(EVALUATION | {"step": 10}))
    text, found = page_of(tmp_path / "a", tmp_path / "c", other)
    labels = [re.findall(r"</svg> ([ace])</span>", chart) for chart in text.split("<b>calibration, ")[1:]]
    assert [x[:2] for x in labels] == [["a", "c"], ["e"]]
    assert {(row[0], row[1]) for row in found.rows if row[2:3] == ["accuracy"]} >= {("a", "20 (best)"), ("e", "10")}
    text, _ = page_of(tmp_path / "a", tmp_path / "c")
    assert "<h3>Task" not in text


def test_losses_of_other_tokens_are_said_to_be(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", "gpt"), write(tmp_path / "other", "gpt", **{"data.path": "other.txt"})
    assert "These runs differ in data.path, so losses" in page_of(one, other)[1].text
    assert "These runs differ" not in page_of(one, write(tmp_path / "third", "gpt"))[1].text


def test_values_that_are_not_numbers_are_said(tmp_path: Path) -> None:
    run = write(tmp_path / "run", "sst2")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "split": "train", "loss": null}\n')
    assert "1 value is not finite, and left out." in page_of(run)[1].text


def test_many_runs_can_be_told_apart(tmp_path: Path) -> None:
    text, _ = page_of(*(write(tmp_path / f"run{i}", "sst2") for i in range(12)))
    (chart,) = re.findall("<b>training loss, nats.*?</figure>", text, re.DOTALL)
    styles = re.findall('stroke="([^"]*)" stroke-width="2" stroke-dasharray="([^"]*)"/></svg> run', chart)
    assert len(styles) == len(set(styles)) == 12


def test_a_long_name_breaks_in_a_table(tmp_path: Path) -> None:
    text, _ = page_of(write(tmp_path / ("long" * 10), "sst2"), write(tmp_path / "short", "sst2"))
    assert f'<th scope="col" class="long">{"long" * 10}</th><th scope="col">short</th>' in text


def test_the_page_needs_nothing_else(runs: Path) -> None:
    text, found = page_of(runs / "first", runs / "second")
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "img", "iframe", "i", "base")]
    assert not [name for _, attrs in found.tags for name in attrs if name in ("src", "href", "xlink:href")]
    assert "@import" not in text and "url(" not in text and "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    _, found = page_of(run)
    assert "interrupted" in found.text and "Nothing is logged yet." in found.text
    assert f"python -m jaxlm.evaluate --checkpoint {run}" in found.text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        write(tmp_path / parent / "run")
    _, found = page_of(tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert found.text.strip().startswith("Runs compared: a/run, b/run")


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    try:
        status = report.main([str(arg) for arg in argv])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_where_the_page_is_written(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told(capsys, runs / "first") == (0, f"{runs}/first/report.html\n", "")
    assert told(capsys, runs / "first", runs / "second") == (0, "report.html\n", "")
    assert told(capsys, runs / "first", "--out", "x.html") == (0, "x.html\n", "")
    assert (tmp_path / "x.html").read_text() == (runs / "first" / "report.html").read_text()


def test_the_page_is_opened(runs: Path, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    command = [sys.executable, "-m", "jaxlm.report", str(runs / "first"), "--open"]
    subprocess.run(command, env={**os.environ, "BROWSER": f"{browser} %s"}, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "opened").read_text() == f"file://{runs}/first/report.html\n"


@pytest.mark.slow
def test_the_picture_is_of_the_whole_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("playwright")
    status, _, errors = told(capsys, runs / "first", "--png", tmp_path / "page.png")
    if "there is no Chromium" in errors:
        pytest.skip("no Chromium")
    content = (tmp_path / "page.png").read_bytes()
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert status == 0 and content.startswith(b"\x89PNG") and width == 1800 and height > 2 * width


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "nothing: there is no such run"),
        ([], "the following arguments are required: RUN"),
        (["RUN", "--out", "no/folder/page.html"], "no/folder/page.html: cannot be written (No such file or directory)"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = told(capsys, *[str(runs / "first") if arg == "RUN" else arg for arg in argv])
    assert (status, output, len(errors.splitlines())) == (2, "", 1) and message in errors


@pytest.mark.parametrize(
    "change",
    [
        {"scores": 1},
        {"scores": {"accuracy": {}}},
        {"scores": {"accuracy": "high"}},
        {"step": "20"},
        {"step": None},
        {"bins": [{}]},
        {"confusion": [[1]]},
        {"worst": [{"text": None}]},
    ],
)
def test_an_evaluation_that_is_none_is_told(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "run")
    (run / "evaluation_test.json").write_text(json.dumps(EVALUATION | change))
    status, _, errors = told(capsys, run)
    assert status == 2 and "evaluation_test.json: not written by jaxlm.evaluate" in errors
    assert errors.endswith("run it again, or remove it\n") and errors.count("\n") == 1


def test_scores_that_are_not_finite_are_shown_as_none(tmp_path: Path) -> None:
    run, x = write(tmp_path / "run"), {"value": None, "low": None, "high": None, "baseline": None, "better": "lower"}
    worst = [{"text": "a cat", "label": 0, "predicted": 1.5, "probability": None, "loss": None}]
    change = {"scores": {"loss": x}, "confusion": None, "worst": worst}
    (run / "evaluation_test.json").write_text(json.dumps(EVALUATION | change))
    assert "<td>-</td>" in run_page.page([run_reader.read(run)])


def test_loss_of_a_task_of_a_user_has_no_unit(tmp_path: Path) -> None:
    found = run_reader.read(write(tmp_path / "run"))
    assert "<b>loss, nats</b>" in run_page.page([found])
    found.settings["task"] = "rating"
    assert "<b>loss</b>" in run_page.page([found])
