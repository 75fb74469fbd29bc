"""Trains every task with its preset on the embedded data, as a user would, and prints the README's table of results.

    python scripts/run_presets.py [TASK ...]

Times are of the whole command: until its first line, until the first update is done, and until it ends.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxlm.training import history

TASKS = ("mlm", "gpt", "sst2", "cola", "pairs")
SHOWN = {"mlm": "accuracy", "gpt": "bits_per_byte", "sst2": "accuracy", "cola": "matthews", "pairs": "accuracy"}


def measure(task: str, run_dir: Path) -> str:
    """Train one task and return its row."""
    started_s = time.monotonic()
    command = [sys.executable, "-u", "-m", "jaxlm.train", "--task", task, "--run.dir", str(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first_line_s = first_update_s = 0.0
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        now_s = time.monotonic() - started_s
        first_line_s = first_line_s or now_s
        if line.startswith("first update done"):
            first_update_s = now_s
        lines.append(line)
        print(line, end="", file=sys.stderr)
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    total_s = time.monotonic() - started_s

    rows = history.rows(run_dir / "metrics.jsonl")
    best = min((row for row in rows if row["split"] == "validation"), key=lambda row: row["loss"])
    test = next(row for row in rows if row["split"] == "test")
    table = {  # score: validation, its baseline, test, its baseline
        match[1]: [float(number.replace(",", "")) for number in re.findall(r"[\d.,]+", match[2])]
        for line in lines
        if (match := re.match(r"\W*(\w+) \((?:lower|higher) is better\)\W+(.*)", line))
    }
    score = SHOWN[task]
    return (
        f"| `{task}` | {best['step']} | {best['loss']:.2f} ({table['loss'][1]:.2f}) | {test['loss']:.2f} "
        f"({table['loss'][3]:.2f}) | {score.replace('_', ' ')} {test[score]:.3f} ({table[score][3]:.3f}) | "
        f"{first_line_s:.1f} s, {first_update_s:.1f} s, {total_s / 60:.1f} min |"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(task, Path(folder) / task) for task in sys.argv[1:] or TASKS]
    print("| task | best step | validation loss (baseline) | test loss (baseline) | test score (baseline) | times |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
