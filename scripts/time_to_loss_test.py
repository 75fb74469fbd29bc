"""The comparison runs, tiny, continues where it stopped, and computes its shares right."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import time_to_loss

from jaxlm.data import grammar


def run(*args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("time_to_loss.py")), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def record(name: str, *losses: float, pace_s: float = 1.0) -> dict[str, Any]:
    points = [
        {"update": 10 * i, "loss": loss, "seconds": pace_s * i, "cpu_s": 2 * pace_s * i, "evaluations_s": 0.5 * i}
        for i, loss in enumerate(losses, start=1)
    ]
    return {"system": name, "rate": 0.001, "points": points, "first_update_s": 0.5}


def test_shares_are_of_the_time_to_the_final_loss_of_the_peer() -> None:
    peer, ours = record("theirs", 3.0, 2.0, pace_s=10), record("ours", 2.5, 2.0, 1.0, pace_s=2)
    text = time_to_loss.summary([peer, ours, record("slow", 4.0)], {"theirs"})
    assert "| ours | 20 | 4 | 0.20 | 0.20 |" in text
    assert "| theirs | 20 | 20 | 1.00 | 1.00 |" in text
    assert "| slow | never |" in text
    assert "| theirs | 0.001 | 2.000 | 20 | 19 | 40 | 0.5 |" in text


def test_a_missing_text_is_told(tmp_path: Path) -> None:
    done = run("--work", "mlm", "--text", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--text" in done.stderr


@pytest.mark.slow
def test_two_systems_train_and_the_same_command_goes_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(text for text, _ in grammar.sentences("sst2")["train"][:2000]))
    command = ["--work", "shakespeare", "--text", text, "--out", tmp_path / "out", "--quick", "--rates", 1]
    command += ["--updates", 20, "--only", "jaxlm", "--only", "jaxlm, modern, Muon", "--plot", tmp_path / "plot.png"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "out" / "jaxlm-0.001-20.json").read_text())
    assert [x["update"] for x in stored["points"]] == list(range(1, 21)) and stored["first_update_s"] > 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    again = run(*command)
    assert again.returncode == 0 and again.stdout in done.stdout and "..." not in again.stdout
