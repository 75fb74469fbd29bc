"""The command `python -m jaxlm.runs`: what can be asked of runs, and to clean up. Imports no framework for jaxlm's.

folder.py reads them; USING.md has examples. `verify` looks at every byte of checkpoints: CHECKPOINTS.md says of what.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxlm.cli import Parser
from jaxlm.config import TokenizerConfig
from jaxlm.data import metrics, tokenization
from jaxlm.errors import UserError, nearest, reported
from jaxlm.io import checksums, storage
from jaxlm.io.console import Console
from jaxlm.params import layout
from jaxlm.reporting import run_reader
from jaxlm.weights import formats, snapshots

COMMANDS = ("list", "show", "compare", "verify", "clean")


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status. Bad input exits with 2."""
    with reported(debug=False):
        args = _parse(sys.argv[1:] if argv is None else argv)
        if args.command == "verify":
            return verify(args.paths)
        if args.command == "clean":
            return clean(args.paths, args.yes)
        {"list": list_all, "show": show, "compare": compare}[args.command](args.paths)
        return 0
    raise AssertionError("reported() exits on the errors it does not pass on")


def list_all(paths: Sequence[Path]) -> None:
    """Print a table of the runs in some folders, the last changed first; their age is since then."""
    runs = run_reader.find(paths)
    if not runs:
        raise UserError(
            f"{', '.join(map(str, paths))}: there is no run that can be read; "
            "train one with python -m jaxlm.train --task mlm"
        )
    table = Table("run", "task", "steps", "best score", "age", "size", "state")
    for run in runs:
        step, best = run.best_score_step(), ""
        if step is not None:
            name, value = next(iter(run.scores("validation").items()))
            best = f"{name} {metrics.number(name, value)} (step {step:,})"
        steps = f"{run.last_step:,} of {run.settings['train.max_steps']:,}"
        n_bytes = run_reader.size(run.n_bytes())
        table.add_row(str(run.path), run.task, steps, best, run_reader.ago(run.changed_s), n_bytes, run.state)
    Console().print(table)


def show(paths: Sequence[Path]) -> None:
    """Print what single runs tell of themselves."""
    console = Console()
    for i, run in enumerate([run_reader.read(path) for path in paths]):
        state = run.state + (f", by {run.owner}" if run.owner else "")
        console.print(f"{'' if i == 0 else chr(10)}{run.path}: task {run.task}, {state}")
        console.print(f"updates      {run.last_step:,} of {run.settings['train.max_steps']:,}")
        console.print(f"changed      {run_reader.ago(run.changed_s)} ago")
        console.print(f"size         {run_reader.size(run.n_bytes())}")
        if speed := run.speed():
            console.print(f"speed        {speed:,.0f} tokens/s, the median")
        for split, step in (("validation", run.best_score_step()), ("test", run.tested_step())):
            if step is not None:
                told = "  ".join(f"{name} {metrics.number(name, x)}" for name, x in run.scores(split).items())
                console.print(f"{split:<11}  {told}  (step {step:,})")
        console.print("settings that are no defaults:")
        for name, value in run.changed_settings().items():
            console.print(f"  {name} = {value!r}")
        console.print("checkpoints:")
        for found in run.checkpoints:
            notes = [] if found.loss is None else [f"validation loss {found.loss:.4f}"]
            notes += ["the best"] if found == run.best and found.loss is not None else []
            notes += [] if found.is_whole else ["not whole"]
            console.print(f"  {found.path}  {run_reader.size(found.n_bytes)}  {', '.join(notes)}")


def compare(paths: Sequence[Path]) -> None:
    """Print where some runs differ: settings, and scores."""
    runs = [run_reader.read(path) for path in paths]
    if len(runs) < 2:
        raise UserError(f"{paths[0]}: there is nothing to compare it with; name another run")
    table = Table("", *(str(run.path) for run in runs))
    for name, values in run_reader.differences(runs).items():
        table.add_row(name, *("-" if value is None else str(value) for value in values))
    table.add_section()
    for name, values in run_reader.results(runs).items():
        table.add_row(name, *values)
    Console().print(table)


def clean(paths: Sequence[Path], is_sure: bool) -> int:
    """Remove checkpoints that nothing needs, after asking; return 1 if the answer is no, else 0.

    The best one of each run stays, and the last of one that can go on. Runs at work are left alone.
    """
    from jaxlm.training import run_dir

    with contextlib.ExitStack() as stack:
        spare: list[run_reader.CheckpointRecord] = []
        for run in run_reader.find(paths):
            if run.state == run_reader.RUNNING:
                print(f"{run.path}: {run.owner} works in it; left alone")
                continue
            stack.enter_context(run_dir.lock(run.path))  # against a process that starts meanwhile
            found, why = _spare(run_reader.read(run.path))
            if why:
                print(f"{run.path}: {why}; left alone")
            spare += found
        if not spare:
            print("there is nothing to remove")
            return 0
        for checkpoint in spare:
            kind = "" if checkpoint.is_whole else ", not whole"
            print(f"{checkpoint.path}: {run_reader.size(checkpoint.n_bytes)}{kind}")
        total = run_reader.size(sum(checkpoint.n_bytes for checkpoint in spare))
        question = f"Remove {len(spare)} checkpoint{'s' * (len(spare) != 1)}, {total}?"
        if not is_sure and not _agrees(question):
            print("nothing is removed")
            return 1
        for checkpoint in spare:
            checksums.remove(checkpoint.path)
        print(f"removed {len(spare)} checkpoint{'s' * (len(spare) != 1)}, {total}")
    return 0


def _spare(run: run_reader.RunRecord) -> tuple[list[run_reader.CheckpointRecord], str]:
    """Return the checkpoints of a run that nothing needs, and why it is better left alone ("": it is not)."""
    if run.best is None:
        return [], "" if not run.checkpoints else "none of its checkpoints is whole"
    kept = [run.best]
    if run.last_step < run.settings["train.max_steps"]:
        kept.append(max((found for found in run.checkpoints if found.is_whole), key=lambda found: found.step))
    for found in kept:
        try:
            examined(found.path)
        except UserError as error:
            return [], str(error).removeprefix(f"{run.path}/")
    return [found for found in run.checkpoints if found not in kept], ""


def _agrees(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask in; add --yes to remove these")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def verify(paths: Sequence[Path]) -> int:
    """Print a line on each checkpoint of some runs, or on single ones; return 1 if one cannot be used, else 0.

    Raises UserError, before any line, if there is none.
    """
    statuses = [0]
    for path in [checkpoint for source in paths for checkpoint in _checkpoints(source)]:
        try:
            info = examined(path)
        except UserError as error:
            print(f"{path}: {str(error).removeprefix(f'{path}: ')}", flush=True)
            statuses.append(1)
        else:
            version = f", jaxlm {info['version']}" if "version" in info else ""
            print(f"{path}: whole, step {info['step']}{version}", flush=True)
    return max(statuses)


def examined(path: Path) -> dict[str, Any]:
    """Return what a checkpoint tells of itself. Raises UserError if it is not as it was written, or cannot be used."""
    if path.is_dir():
        layout.check_run(path)
        info = layout.info_of_run(path)
    else:
        info = snapshots.load(path).info
    if missing := [key for key in ("step", "task", "rate", "config", "tokenizer") if key not in info]:
        raise UserError(f"{path}: it does not tell its {', '.join(missing)}")
    snapshots.config_of(info["config"], path)
    own = path.parent.parent / "tokenizer.json"  # a run that was converted has none
    if info["tokenizer"] and path.parent.name == "checkpoints" and own.is_file():
        if tokenization.fingerprint(tokenization.read(TokenizerConfig(path=str(own)))) != info["tokenizer"]:
            raise UserError(f"{path}: {own} is another tokenizer than that of the checkpoint")
    return info


def _checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run, of a folder of checkpoints, or the one that `path` is."""
    if not path.exists():
        raise UserError(f"{path}: there is no such run or checkpoint")
    if path.is_file() or (path / "info").is_dir():
        found = [path]
    else:
        found = [found for place in (storage.checkpoints(path), path) for _, found in checksums.checkpoints_in(place)]
    if not found:
        raise UserError(f"{path}: there is no checkpoint of a run")
    if any(file.is_file() for file in found):
        formats.need_torch(path)
    return found


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m jaxlm.runs",
        description="Says what is known of runs that are there, and cleans up. Without a command, it is `list`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    default, run_help = [Path("runs")], "run folder, of jaxlm or torchlm"
    for name, what, options in (
        ("list", "print a table of all runs in a folder", {"nargs": "*", "default": default, "help": "folder (runs)"}),
        ("show", "print all that a run tells", {"nargs": "+", "type": storage.run_path, "help": run_help}),
        (
            "compare",
            "print where settings and scores of runs differ",
            {"nargs": "+", "type": storage.run_path, "help": run_help},
        ),
    ):
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.add_argument("paths", metavar="PATH", **{"type": Path} | options)
    parts = "format, settings, tokenizer and the checksum of each file"
    command = commands.add_parser(
        "verify",
        help=f"check checkpoints: {parts}",
        description=f"Checks checkpoints: {parts}. One line each.",
        epilog="exit status: 0 if all are whole, 1 if one cannot be used, 2 for bad input",
    )
    command.add_argument(
        "paths",
        nargs="+",
        type=storage.run_path,
        metavar="PATH",
        help="run folder, or a checkpoint, of jaxlm or torchlm",
    )
    command = commands.add_parser(
        "clean",
        help="remove checkpoints that nothing needs, after asking",
        description="Removes checkpoints, after asking: all but the best, and but the last of a run that can go on. "
        "What is kept is checked before. Runs at work are left alone.",
        epilog="exit status: 0 if it is done, 1 if the answer is no, 2 for bad input",
    )
    command.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", default=default, help="run, or folder of runs (runs)"
    )
    command.add_argument("--yes", action="store_true", help="do not ask")
    if not argv or (argv[0] not in COMMANDS and not argv[0].startswith("-")):
        if argv and not Path(argv[0]).exists():
            raise UserError(f"{argv[0]}: neither a command nor a folder{nearest(argv[0], COMMANDS)}")
        argv = ["list", *argv]
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
