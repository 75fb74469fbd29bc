"""The command `python -m jaxlm.runs`: lists, shows, compares, verifies and cleans up runs. USING.md has examples.

Imports no framework for runs of jaxlm.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxlm import terminal
from jaxlm.cli import Parser, removes
from jaxlm.data import metrics
from jaxlm.errors import UserError, nearest, reported
from jaxlm.io import checksums, storage
from jaxlm.io.console import Console
from jaxlm.reporting import run_reader, verify


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return its exit status. Bad input exits with 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0] not in COMMANDS and not argv[0].startswith("-")):
        if argv and not Path(argv[0]).exists():
            raise UserError(f"{argv[0]}: neither a command nor a folder{nearest(argv[0], COMMANDS)}")
        argv = ["list", *argv]
    args = vars(make_parser().parse_args(argv))
    command, _ = COMMANDS[args.pop("command")]
    return command(**args)


def list_all(paths: Sequence[Path]) -> int:
    """Print a table of the runs in some folders, the last changed first.

    The age is the time since the last change.
    """
    runs = run_reader.find(paths)
    if not runs:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: there is no readable run; train one with {terminal.command('train')} --task mlm")
    table = Table("run", "task", "steps", "best score", "age", "size", "state")
    for run in runs:
        step, best = run.best_score_step(), ""
        if step is not None:
            name, value = next(iter(run.scores("validation").items()))
            best = f"{name} {metrics.number(name, value)} (step {step:,})"
        age, size = run_reader.ago(run.changed_s), run_reader.size(run.n_bytes())
        table.add_row(str(run.path), run.task, run.progress, best, age, size, run.state)
    Console().print(table)
    return 0


def show(paths: Sequence[Path]) -> int:
    """Print state, settings, scores and checkpoints of runs."""
    for i, run in enumerate([run_reader.read(path) for path in paths]):
        state = run.state + (f", by {run.owner}" if run.owner else "")
        lines = [""] if i else []
        lines.append(f"{run.path}: task {run.task}, {state}")
        lines.append(f"updates      {run.progress}")
        lines.append(f"changed      {run_reader.ago(run.changed_s)} ago")
        lines.append(f"size         {run_reader.size(run.n_bytes())}")
        if speed := run.speed():
            lines.append(f"speed        {speed:,.0f} tokens/s (median)")
        final = run.best_score_step("final_validation")
        steps = {"validation": run.best_score_step(), "final_validation": final, "test": run.tested_step()}
        for split, step in steps.items():
            if step is not None:
                scores = "  ".join(f"{name} {metrics.number(name, x)}" for name, x in run.scores(split).items())
                lines.append(f"{split.replace('_', ' '):<11}  {scores}  (step {step:,})")
        lines.append("settings that are not defaults:")
        lines += [f"  {name} = {value!r}" for name, value in run.changed_settings().items()]
        lines.append("checkpoints:")
        for checkpoint in run.checkpoints:
            notes = [] if checkpoint.loss is None else [f"validation loss {checkpoint.loss:.4f}"]
            notes += ["the best"] if checkpoint == run.best and notes else []
            notes += [] if checkpoint.is_whole else ["incomplete"]
            lines.append(f"  {checkpoint.path}  {run_reader.size(checkpoint.n_bytes)}  {', '.join(notes)}")
        Console().print("\n".join(lines))
    return 0


def compare(paths: Sequence[Path]) -> int:
    """Print the settings in which runs differ, and their scores."""
    runs = [run_reader.read(path) for path in paths]
    if len(runs) < 2:
        raise UserError(f"{paths[0]}: needs another run to compare with; name one")
    table = Table("", *(str(run.path) for run in runs))
    for name, values in run_reader.differences(runs).items():
        table.add_row(name, *values)
    table.add_section()
    for name, values in run_reader.results(runs).items():
        table.add_row(name, *values)
    Console().print(table)
    return 0


def verify_all(paths: Sequence[Path]) -> int:
    """Check format, settings, tokenizer and the checksum of each file of checkpoints.

    Exit status: 0 if all are complete, 1 if one cannot be used, 2 for bad input.
    """
    status = 0
    for path in [checkpoint for source in paths for checkpoint in verify.checkpoints(source)]:
        try:
            info = verify.check(path)
            version = f", jaxlm {info['version']}" if "version" in info else ""
            line = f"complete, step {info['step']}{version}"
        except UserError as error:
            line, status = str(error).removeprefix(f"{path}: "), 1
        print(f"{path}: {line}", flush=True)
    return status


def clean(paths: Sequence[Path], yes: bool) -> int:
    """Remove checkpoints that are not needed, after asking.

    The best one stays, and the last one of an unfinished run; both are checked before. Running runs are not touched.
    Exit status: 0 if it is done, 1 if the answer is no, 2 for bad input.
    """
    from jaxlm.training import run_dir

    with contextlib.ExitStack() as locks:
        spare: list[run_reader.CheckpointRecord] = []
        for run in run_reader.find(paths):
            if run.state == run_reader.RUNNING:
                print(f"{run.path}: {run.owner} uses it; not changed")
                continue
            locks.enter_context(run_dir.lock(run.path))  # keeps other processes from resuming it meanwhile
            of_run, why = verify.spare(run_reader.read(run.path))
            if why:
                print(f"{run.path}: {why}; not changed")
            spare += of_run
        if not spare:
            print("there is nothing to remove")
            return 0
        lines = (f"{x.path}: {run_reader.size(x.n_bytes)}{'' if x.is_whole else ', incomplete'}" for x in spare)
        size = run_reader.size(sum(checkpoint.n_bytes for checkpoint in spare))
        what = f"{len(spare)} checkpoint{'s' * (len(spare) != 1)}, {size}"
        if not removes(lines, what, yes):
            return 1
        for checkpoint in spare:
            checksums.remove(checkpoint.path)
        print(f"removed {what}")
    return 0


FOLDERS: dict[str, Any] = {"nargs": "*", "type": Path, "default": [Path("runs")], "help": "run, or folder (runs)"}
RUNS: dict[str, Any] = {"nargs": "+", "type": storage.run_path, "help": "run folder, of jaxlm or torchlm"}
CHECKPOINTS = RUNS | {"help": "run folder, or a checkpoint, of jaxlm or torchlm"}
COMMANDS: dict[str, tuple[Callable[..., int], dict[str, Any]]] = {
    "list": (list_all, FOLDERS),
    "show": (show, RUNS),
    "compare": (compare, RUNS),
    "verify": (verify_all, CHECKPOINTS),
    "clean": (clean, FOLDERS),
}


def make_parser() -> Parser:
    """Return the parser of the command line; the docstrings of the subcommands are its help."""
    parser = Parser(
        prog=terminal.command("runs"),
        description="Lists, shows, compares, verifies and cleans up runs. The default command is `list`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (command, paths) in COMMANDS.items():
        what, _, more = inspect.cleandoc(command.__doc__ or "").partition("\n\n")
        subparser = commands.add_parser(name, help=what[0].lower() + what[1:-1], description=what, epilog=more)
        subparser.add_argument("paths", metavar="PATH", **paths)
        if command is clean:
            subparser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


if __name__ == "__main__":
    sys.exit(main())
