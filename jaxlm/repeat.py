"""Runs that are made several times, each in a process and a folder of its own: `jaxlm.train --seeds N --folds K`.

The same command again skips runs that have ended, and resumes those that were stopped. All runs share the compiled
step, by the compilation cache.
"""

import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm import config as configs
from jaxlm.cli import Parser
from jaxlm.errors import UserError, signals
from jaxlm.io import temporary
from jaxlm.reporting import run_reader
from jaxlm.runtime.rendezvous import variable

FLAGS = ("--seeds", "--folds")
TABLE = "scores.md"
Scores = dict[str, dict[str, float]]  # by split and name


def is_asked(argv: Sequence[str]) -> bool:
    """Return whether a command line asks for several runs."""
    return any(arg.partition("=")[0] in FLAGS for arg in argv)


def main(argv: Sequence[str], module: str) -> int:
    """Train as the command line of `module` says, and write a table; return the status of the first run that fails."""
    parser = Parser(prog=f"python -m {module}")
    for flag in FLAGS:
        parser.add_argument(flag, type=int, default=1, metavar="N")
    parser.add_argument("--run.dir", dest="out")
    args, settings = parser.parse_known_args(argv)
    if not args.out or args.seeds < 1 or args.folds < 1:
        mend = "give numbers of 1 or more, and by --run.dir the folder that all runs go to"
        raise UserError(f"--seeds {args.seeds} --folds {args.folds} --run.dir {args.out or ''}: {mend}")
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "JAX_NUM_PROCESSES"):
        if variable(name, 1) > 1:
            mend = "one process makes all runs; start it alone, or each run with --train.seed by the launcher"
            raise UserError(f"--seeds {args.seeds} --folds {args.folds} in several processes ({name}): {mend}")
    runs = {}
    for seed in range(args.seeds):
        for fold in range(args.folds):
            own = ["--data.folds", str(args.folds), "--data.fold", str(fold)] if args.folds > 1 else []
            name = "-".join([f"seed-{seed}", *([f"fold-{fold}-of-{args.folds}"] if own else [])])
            runs[Path(args.out) / name] = [*settings, "--train.seed", str(seed), *own]
    if status := run_all(runs, module):
        return status
    lines = [f"# Scores of {len(runs)} runs, {args.seeds} seeds x {args.folds} folds", ""]
    lines += ["Mean and standard deviation, of the checkpoint with the lowest validation loss of each run.", ""]
    lines += ["| score | validation | test |", "| --- | --- | --- |"]
    found = [scores(folder) for folder in runs]
    for name in found[0]["validation"]:
        lines.append(f"| {name} | {' | '.join(cell(found, split, name) for split in ('validation', 'test'))} |")
    text = "\n".join(lines) + "\n"
    temporary.replace_text(Path(args.out) / TABLE, text)
    print(text, end="")
    return 0


def run_all(runs: Mapping[Path, Sequence[str]], module: str = "jaxlm.train") -> int:
    """Make the runs, command lines by folder, that have not ended; return the status of the first that fails.

    Raises UserError if a run has ended with other settings of model or training.
    """
    for folder, argv in runs.items():
        if has_ended(folder):
            _check_settings(folder, argv)
            continue
        print(folder, flush=True)
        if status := _run([sys.executable, "-m", module, *argv, "--run.dir", str(folder), "--resume", "auto"]):
            return status
    return 0


def _run(command: Sequence[str]) -> int:
    """Run a command, and return its exit status. At a signal, wait until the command has saved and ended."""
    child = subprocess.Popen(command)
    # A terminal sends SIGINT to the child, too, and a second signal would end it at once.
    with signals(lambda number: child.send_signal(number) if number == signal.SIGTERM else None):
        status = child.wait()
    return status if status >= 0 else 128 - status


def _check_settings(folder: Path, argv: Sequence[str]) -> None:
    stored = run_reader.read(folder).settings
    for name, value in configs.given(list(argv)).items():
        is_compared = name.startswith(("model.", "train.")) and name != "train.class_weights"  # it is stored resolved
        if is_compared and stored.get(name) != value:
            what = f"has ended with {name}={stored.get(name)}, not {value}"
            raise UserError(f"{folder}: {what}; remove it, or give another folder for all runs")


def has_ended(folder: Path) -> bool:
    """Return whether a run has made all its updates, and scored what it scores at its end."""
    if not (folder / "config.toml").is_file():
        return False
    run = run_reader.read(folder)
    last = max((row["step"] for row in _rows(run, "validation")), default=0)
    return run.is_over and last == run.last_step and ("test" not in run.baseline or bool(_rows(run, "test")))


def scores(folder: Path) -> Scores:
    """Return the scores of a run by split: those of its best checkpoint by validation loss, and of the test part."""
    run = run_reader.read(folder)
    best = min(_rows(run, "validation"), key=lambda row: row["loss"])
    found = {"validation": best} | ({"test": rows[-1]} if (rows := _rows(run, "test")) else {})
    names = run.baseline.get("validation", best)
    return {split: {name: row[name] for name in names} for split, row in found.items()}


def _rows(run: run_reader.RunRecord, split: str) -> list[dict[str, Any]]:
    return [row for row in run.rows if row["split"] == split]


def cell(runs: Sequence[Scores], split: str, name: str, factor: float = 1, digits: int = 4) -> str:
    """Return mean and standard deviation of a score over the runs that have it, times a factor."""
    values = [factor * run[split][name] for run in runs if split in run]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
