"""`scripts/load_server.py` on small runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.testing import tiny_runs

pytest.importorskip("fastapi")
SCRIPT = Path(__file__).parent / "load_server.py"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mlm", "gpt"])
def test_no_answer_is_lost_or_wrong(task: str, tmp_path: Path) -> None:
    run = tiny_runs.write(tmp_path / task, task, **{"model.seq_len": 128})
    options = ["--requests", "400", "--clients", "32", "--max-requests", "24"]
    process = subprocess.run([sys.executable, SCRIPT, run, *options], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    first, second, third, *_ = process.stdout.splitlines()
    assert first.startswith("400 requests by 32 clients in ")
    assert second.startswith("400 answered; 0 wrong or lost; ")
    assert not third.startswith("0 times told to come again")
