"""Rows and samples that a checkpoint does not have are dropped, also where a crash has cut the last line short."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm import report, runs
from jaxlm.errors import UserError
from jaxlm.inference import load
from jaxlm.io import temporary
from jaxlm.reporting import run_page
from jaxlm.reporting import run_reader as folders
from jaxlm.testing import tiny_runs
from jaxlm.training import environment, history, resume


def row(step: int, split: str = "train", loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "split": split, "loss": step / 4 if loss is None else loss}


ROWS = [
    *(row(1), row(2), row(3), row(3, "validation"), row(4), row(5), row(6)),
    *(row(6, "validation"), row(3, "final_validation"), row(3, "test"), row(7)),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ROWS))
    samples = (f"--- step {step} ---\nwhat {step} made\n--- no step 9 ---\n\n" for step in (3, 6))
    (run / "samples.txt").write_text("".join(samples))
    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_came_after_the_checkpoint_is_dropped(folder: Path) -> None:
    scores = history.restore(folder, 5, folder, folder / "checkpoints")
    assert rows(folder) == ROWS[:6]
    assert scores == {3: {"loss": 0.75}}
    assert (folder / "samples.txt").read_text() == "--- step 3 ---\nwhat 3 made\n--- no step 9 ---\n\n"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl", "samples.txt"]


def test_the_last_scores_of_a_run_that_had_ended_are_dropped(folder: Path) -> None:
    assert history.restore(folder, 7, folder, folder / "checkpoints") == {3: {"loss": 0.75}, 6: {"loss": 1.5}}
    assert rows(folder) == [x for x in ROWS if x["split"] in ("train", "validation")]
    assert (folder / "samples.txt").read_text().count("what") == 2


@pytest.mark.parametrize("n_bytes", range(1, 40, 6))
def test_a_line_cut_short_is_none(n_bytes: int, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-n_bytes])
    history.restore(folder, 7, folder, folder / "checkpoints")
    kept = [x for x in ROWS if x["split"] in ("train", "validation")]
    assert rows(folder) == (kept if n_bytes == 1 else kept[:-1])  # of one byte less, only the end of the line is gone


def test_half_a_letter_is_read_over(folder: Path) -> None:
    with open(folder / "samples.txt", "ab") as file:
        file.write("--- step 7 ---\nü".encode()[:-1])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write('{"step": 8, "split": "ü'.encode()[:-1])
    history.restore(folder, 6, folder, folder / "checkpoints")
    assert rows(folder) == [x for x in ROWS[:8]]
    assert (folder / "samples.txt").read_text().endswith("what 6 made\n--- no step 9 ---\n\n")


def test_a_new_folder_gets_the_history_and_the_old_one_keeps_all(folder: Path, tmp_path: Path) -> None:
    before = (folder / "metrics.jsonl").read_text(), (folder / "samples.txt").read_text()
    (tmp_path / "new").mkdir()
    assert history.restore(tmp_path / "new", 4, folder, folder / "checkpoints") == {3: {"loss": 0.75}}
    assert rows(tmp_path / "new") == ROWS[:5]
    assert ((folder / "metrics.jsonl").read_text(), (folder / "samples.txt").read_text()) == before


def test_a_loss_that_was_no_number_is_none_again(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 3, "split": "validation", "loss": null}\n')
    assert math.isnan(history.restore(folder, 3, folder, folder / "checkpoints")[3]["loss"])


BAD_LINES = {
    "no loss": b'{"step": 2, "split": "validation", "accuracy": 0.5}',
    "loss is text": b'{"step": 2, "split": "validation", "loss": "low"}',
    "loss is a list": b'{"step": 2, "split": "validation", "loss": [1.0]}',
    "loss is true": b'{"step": 2, "split": "validation", "loss": true}',
    "step is text": b'{"step": "2", "split": "train", "loss": 1.0}',
    "step is true": b'{"step": true, "split": "train", "loss": 1.0}',
    "step is a float": b'{"step": 2.0, "split": "train", "loss": 1.0}',
    "step is null": b'{"step": null, "split": "train", "loss": 1.0}',
    "step is negative": b'{"step": -1, "split": "train", "loss": 1.0}',
    "step is huge": b'{"step": 1000000000000000000000, "split": "train", "loss": 1.0}',
    "step of 5000 digits": b'{"step": ' + b"1" * 5000 + b', "split": "train"}',
    "split is a list": b'{"step": 2, "split": ["train"], "loss": 1.0}',
    "no split": b'{"step": 2}',
    "a number": b"7",
    "null": b"null",
    "a list": b'[{"step": 2, "split": "train"}]',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep inside a row": b'{"step": 2, "split": "train", "loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half": b'{"step": 2, "split": "tr',
    "two in one": b'{"step": 2, "split": "train"}{"step": 3, "split": "train"}',
    "not UTF-8": b'{"step": 2, "split": "train", "loss": 1.0, "x": "\xff\xfe"}',
    "zeros": bytes(5000),
    "longer than a line": b'{"step": 2, "split": "train", "loss": 1.0, "x": "' + b"x" * (3 << 20) + b'"}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_bad_line_is_passed_over_named_once_and_kept_aside(line: bytes, folder: Path) -> None:
    path, warnings = folder / "metrics.jsonl", list[str]()
    before = path.read_bytes().splitlines(keepends=True)
    before.insert(1, line + b"\n")
    path.write_bytes(b"".join(before))
    scores = history.restore_to(folder, 5, warn=warnings.append)
    assert rows(folder) == ROWS[:6] and scores == {3: {"loss": 0.75}}
    assert warnings == [f"{path}: cannot be read: line 2; skipped, and kept as metrics.jsonl.damaged"]
    assert (folder / "metrics.jsonl.damaged").read_bytes() == b"".join(before)
    assert history.restore_to(folder, 5, warn=pytest.fail) == scores  # from then on, all can be read


def test_all_bad_lines_are_named_in_one_warning(folder: Path) -> None:
    path, warnings = folder / "metrics.jsonl", list[str]()
    path.write_bytes(b"".join(line + b"\n" for line in BAD_LINES.values()) + path.read_bytes())
    assert history.rows(path, warnings.append) == ROWS
    assert warnings == [f"{path}: cannot be read: {len(BAD_LINES)} lines, the first is line 1; skipped"]


@pytest.mark.parametrize(
    ("text", "score"),
    [("NaN", None), ("-Infinity", None), ("null", None), ("1e999", None), ("1" * 400, None), ("1", 1.0), ("0.5", 0.5)],
)
def test_scores_are_finite_floats_or_none(text: str, score: float | None, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "split": "train", "loss": 2.5, "norm": {text}, "name": "x", "on": true}}\n')
    assert history.rows(path, pytest.fail) == [{"step": 1, "split": "train", "loss": 2.5, "norm": score}]
    history.restore_to(folder, 5, warn=pytest.fail)
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_of_two_rows_for_the_same_the_later_counts(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (row(1), row(2), row(1, loss=9.0), row(1, "validation"))))
    assert history.rows(path, pytest.fail) == [row(1, loss=9.0), row(2), row(1, "validation")]
    history.restore_to(folder, 5, warn=pytest.fail)
    assert rows(folder) == [row(1, loss=9.0), row(2), row(1, "validation")]


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [a_folder, a_pipe, a_device, a_broken_link])
@pytest.mark.parametrize("name", history.FILES)
def test_what_lies_in_the_place_of_a_file_is_put_aside(name: str, put: Callable[[Path], None], folder: Path) -> None:
    (folder / name).unlink()
    put(folder / name)
    warnings: list[str] = []
    history.restore_to(folder, 5, warn=warnings.append)
    (folder / name).read_bytes()
    assert (folder / name).is_file() and os.path.lexists(folder / f"{name}.damaged")
    assert warnings == [f"{folder / name}: cannot be read (not a file); skipped, and kept as {name}.damaged"]
    if put is a_folder:
        assert (folder / f"{name}.damaged" / "notes.txt").read_text() == "mine"


def test_a_file_put_aside_replaces_none(folder: Path) -> None:
    for i in range(3):
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(f"bad {i}\n")
        history.restore_to(folder, 9, warn=lambda text: None)
    aside = [folder / f"metrics.jsonl.damaged{n}" for n in ("", 1, 2)]
    assert [path.read_text().splitlines()[-1] for path in aside] == ["bad 0", "bad 1", "bad 2"]


def test_rows_are_dropped_without_room_for_a_copy(folder: Path) -> None:
    temporary.name_for(folder / "metrics.jsonl").mkdir()  # no copy can be written
    temporary.name_for(folder / "samples.txt").mkdir()
    history.restore_to(folder, 5)
    assert rows(folder) == ROWS[:6]
    (folder / "metrics.jsonl").write_text("bad\n")
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written .*; free some space"):
        history.restore_to(folder, 5)
    assert (folder / "metrics.jsonl").read_text() == "bad\n"


LOSSES = {3: 2.0, 6: 1.0, 9: 3.0}


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A run whose checkpoints have other losses than its log, which is bad besides."""
    run = tiny_runs.write(tmp_path / "scored", "gpt", dict(LOSSES), **{"train.max_steps": 9})
    lines = [b'{"step": 3, "split": "validation", "loss": 0.1}', *BAD_LINES.values()]
    (run / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (run / "environment.jsonl").write_bytes(b"".join(line + b"\n" for line in BAD_LINES.values()))
    (run / "samples.txt").write_bytes(b"--- step " + b"1" * 5000 + b" ---\n\xff\n--- step 3 ---\nwords\n")
    return run


def test_losses_of_checkpoints_are_their_own(scored: Path) -> None:
    validation = history.restore(scored, 9, scored, scored / "checkpoints", lambda text: None)
    assert {step: scores["loss"] for step, scores in validation.items()} == LOSSES
    run = folders.read(scored)
    assert {x.step: x.loss for x in run.checkpoints} == LOSSES and run.best_score_step() == 6
    assert run.scores("validation") == {"loss": 1.0}
    assert resume.to_use(scored).path == scored / "checkpoints" / "6"
    assert load.load_model(scored)[1].task == "gpt"


def test_commands_read_a_run_with_bad_logs(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history.warn_once.cache_clear()
    for argv in (["show", scored], ["list", scored.parent], ["clean", scored, "--yes"]):
        assert runs.main([str(arg) for arg in argv]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"{scored}/metrics.jsonl: cannot be read: {len(BAD_LINES)} lines" in errors[0]
    assert report.main([str(scored)]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"{scored}/environment.jsonl: cannot be read: " in errors[0]


def test_a_run_without_logs_is_read(scored: Path) -> None:
    for name in (*history.FILES, environment.FILE):
        (scored / name).unlink()
        a_folder(scored / name)
    run = folders.read(scored)
    assert (run.state, run.best_score_step()) == ("finished", 6)
    assert "task gpt" in run_page.page([run])


@pytest.mark.parametrize(
    "content",
    [
        b"task = ",
        b"\xff",
        b"task = 7",
        b"[train]\nmax_steps = 'many'",
        b"[train]\nmax_steps = true",
        b"x = " + b"[" * 9999,
    ],
)
def test_a_run_with_bad_settings_is_passed_over_in_a_list(
    content: bytes, scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history.warn_once.cache_clear()
    (scored.parent / "other").mkdir()
    (scored.parent / "other" / "config.toml").write_bytes(content)
    assert runs.main(["list", str(scored.parent)]) == 0
    output, errors = capsys.readouterr()
    assert "scored" in output and "other/config.toml: " in errors and "; skipped" in errors
    with pytest.raises(SystemExit):
        runs.main(["show", str(scored.parent / "other")])
