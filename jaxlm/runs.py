"""The command `python -m jaxlm.runs`: what can be asked of runs. Imports no framework for those of jaxlm.

`verify` looks at every byte of checkpoints: CHECKPOINTS.md says of what.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm import checksums, convert, formats, storage
from jaxlm.config import TokenizerConfig
from jaxlm.convert import Parser
from jaxlm.data import tokenizer as tokenizers
from jaxlm.errors import UserError, reported


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status. Bad input exits with 2."""
    with reported(debug=False):
        args = _parse(sys.argv[1:] if argv is None else argv)
        return verify(args.paths)
    raise AssertionError("reported() exits on the errors it does not pass on")


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
        checksums.check(path)
        info = formats.info_of_run(path)
    else:
        info = convert.load(path).info
    if missing := [key for key in ("step", "task", "rate", "config", "tokenizer") if key not in info]:
        raise UserError(f"{path}: it does not tell its {', '.join(missing)}")
    convert.config_of(info["config"], path)
    own = path.parent.parent / "tokenizer.json"  # a run that was converted has none
    if info["tokenizer"] and path.parent.name == "checkpoints" and own.is_file():
        if tokenizers.fingerprint(tokenizers.read(TokenizerConfig(path=str(own)))) != info["tokenizer"]:
            raise UserError(f"{path}: {own} is another tokenizer than that of the checkpoint")
    return info


def _checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of a run, of a folder of checkpoints, or the one that `path` is."""
    if not path.exists():
        raise UserError(f"{path}: there is no such run or checkpoint")
    if path.is_file() or (path / "info").is_dir():
        found = [path]
    else:
        found = [found for folder in (storage.checkpoints(path), path) for _, found in checksums.checkpoints_in(folder)]
    if not found:
        raise UserError(f"{path}: there is no checkpoint of a run")
    if any(file.is_file() for file in found):
        formats.need_torch(path)
    return found


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m jaxlm.runs", description="Says what is known of runs that are there.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    parts = "format, settings, tokenizer and the checksum of each file"
    command = commands.add_parser(
        "verify",
        help=f"check checkpoints: {parts}",
        description=f"Checks checkpoints: {parts}. One line each.",
        epilog="exit status: 0 if all are whole, 1 if one cannot be used, 2 for bad input",
    )
    command.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="run folder, or a checkpoint, of jaxlm or torchlm"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
