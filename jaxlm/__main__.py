"""The command `jaxlm`: the commands of the package by name. `jaxlm train` does what `python -m jaxlm.train` does."""

import importlib.metadata
import platform
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

from jaxlm.cli import Parser
from jaxlm.errors import UserError, nearest, reported

COMMANDS = {
    "train": "train a language model or a classifier",
    "predict": "fill masks, continue, classify or answer texts with a trained model",
    "embed": "write the embeddings of texts",
    "evaluate": "score a trained model, with intervals",
    "serve": "serve a page and a JSON interface to a trained model",
    "report": "write a page about one run or several",
    "runs": "list, show, compare, verify and clean up runs",
    "cache": "list, verify and clean up token caches",
    "glue": "fine-tune a model on tasks of GLUE, and make one table",
    "plan": "estimate memory, time and cost of a training in advance",
    "convert": "convert checkpoints between formats",
    "schedule": "plot the learning rate of a training in advance",
    "completion": "print a shell script that completes these commands",
}


def main() -> int:
    """Run the command named on the command line; return the exit status."""
    name, *rest = sys.argv[1:] or [""]
    if name not in COMMANDS:
        return _without_command()
    sys.argv[1:] = rest
    module = "reporting.plot_schedule" if name == "schedule" else name  # schedule.py imports JAX
    runpy.run_module(f"jaxlm.{module}", run_name="__main__")  # imports nothing of the other commands
    return 0


@reported(debug=False)
def _without_command() -> int:
    argv, parser = sys.argv[1:], make_parser()
    if argv and not argv[0].startswith("-"):
        raise UserError(f"{argv[0]}: no such command{nearest(argv[0], COMMANDS)} (--help lists them)")
    if parser.parse_args(argv).version:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
        print(f"jaxlm {importlib.metadata.version('jaxlm')} (Python {platform.python_version()}, {versions})")
    else:
        parser.print_help()
    return 0


def make_parser(parsers: Mapping[str, Parser] | None = None) -> Parser:
    """Return the parser of all commands; with `parsers`, each has the options of its own parser."""
    program = "jaxlm" if Path(sys.argv[0]).stem == "jaxlm" else "python -m jaxlm"
    parser = Parser(program, description="Trains small language models, and uses them.")
    parser.add_argument("-V", "--version", action="store_true", help="print the versions of jaxlm, Python and JAX")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", description=f"{program} COMMAND --help: more")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, parents=[parsers[name]] if parsers else [], add_help=not parsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
