"""Rows and samples that a checkpoint does not have are dropped, also where a crash has cut the last line short."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxlm import history
from jaxlm.start import Start


def row(step: int, split: str = "train", loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "split": split, "loss": step / 4 if loss is None else loss}


ROWS = [
    *(row(1), row(2), row(3), row(3, "validation"), row(4), row(5), row(6)),
    *(row(6, "validation"), row(3, "test"), row(7)),
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


def resumed(folder: Path, step: int) -> Start:
    return Start("resume", folder / "checkpoints" / str(step), info={"step": step}, run=folder)


def test_what_came_after_the_checkpoint_is_dropped(folder: Path) -> None:
    scores = history.restore(resumed(folder, 5), folder)
    assert rows(folder) == ROWS[:6]
    assert scores == {3: {"loss": 0.75}}
    assert (folder / "samples.txt").read_text() == "--- step 3 ---\nwhat 3 made\n--- no step 9 ---\n\n"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl", "samples.txt"]


def test_the_test_score_of_a_run_that_had_ended_is_dropped(folder: Path) -> None:
    assert history.restore(resumed(folder, 7), folder) == {3: {"loss": 0.75}, 6: {"loss": 1.5}}
    assert rows(folder) == [x for x in ROWS if x["split"] != "test"]
    assert (folder / "samples.txt").read_text().count("what") == 2


@pytest.mark.parametrize("n_bytes", range(1, 40, 6))
def test_a_line_cut_short_is_none(n_bytes: int, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-n_bytes])
    history.restore(resumed(folder, 7), folder)
    kept = [x for x in ROWS if x["split"] != "test"]
    assert rows(folder) == (kept if n_bytes == 1 else kept[:-1])  # of one byte less, only the end of the line is gone


def test_half_a_letter_is_read_over(folder: Path) -> None:
    with open(folder / "samples.txt", "ab") as file:
        file.write("--- step 7 ---\nü".encode()[:-1])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write('{"step": 8, "split": "ü'.encode()[:-1])
    history.restore(resumed(folder, 6), folder)
    assert rows(folder) == [x for x in ROWS[:8]]
    assert (folder / "samples.txt").read_text().endswith("what 6 made\n--- no step 9 ---\n\n")


def test_a_new_folder_gets_the_history_and_the_old_one_keeps_all(folder: Path, tmp_path: Path) -> None:
    before = (folder / "metrics.jsonl").read_text(), (folder / "samples.txt").read_text()
    (tmp_path / "new").mkdir()
    assert history.restore(resumed(folder, 4), tmp_path / "new") == {3: {"loss": 0.75}}
    assert rows(tmp_path / "new") == ROWS[:5]
    assert ((folder / "metrics.jsonl").read_text(), (folder / "samples.txt").read_text()) == before


def test_a_loss_that_was_no_number_is_none_again(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 3, "split": "validation", "loss": null}\n')
    assert math.isnan(history.restore(resumed(folder, 3), folder)[3]["loss"])


def test_there_is_no_history_of_a_base_or_of_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for start in (Start(), Start("base", folder / "checkpoints" / "5"), Start("resume", folder / "5.pt")):
        assert history.restore(start, tmp_path / "new") == {}
    assert list((tmp_path / "new").iterdir()) == []
