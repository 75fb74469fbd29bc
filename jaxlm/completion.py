"""The command `jaxlm completion`: a shell script that completes commands, options and values."""

import argparse
import sys
import typing
from collections.abc import Iterable

import shtab

from jaxlm import __main__ as commands
from jaxlm import cache, convert, embed, evaluate, glue, plan, predict, report, runs, serve
from jaxlm import config as configs
from jaxlm.cli import Parser
from jaxlm.errors import reported
from jaxlm.reporting import plot_schedule
from jaxlm.terminal import command

SHELLS = {  # and where each one looks for the script
    "bash": "~/.local/share/bash-completion/completions/jaxlm",
    "zsh": "~/.zfunc/_jaxlm, with fpath+=~/.zfunc before compinit in ~/.zshrc",
    "fish": "~/.config/fish/completions/jaxlm.fish",
}
PATHS = ("FILE", "PATH", "RUN", "SOURCE", "TARGET")  # metavars of options that take files or folders
PATH_SETTINGS = ("resume", "init_from", "run.dir", "run.checkpoint_dir", "data.cache_dir", "distill.teacher")


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Print the script for the shell named on the command line; return the exit status. Bad input exits with 2."""
    shell = make_parser().parse_args(sys.argv[1:] if argv is None else argv).shell
    print(shtab.complete(all_commands(), shell))
    return 0


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("completion"),
        description="Prints a shell script that completes jaxlm's commands, options, settings and values.",
        epilog="Where to save it: " + "; ".join(f"{shell}: {path}" for shell, path in SHELLS.items()),
    )
    parser.add_argument("shell", choices=tuple(SHELLS), metavar="SHELL", help=", ".join(SHELLS))
    return parser


def all_commands() -> Parser:
    """Return the parser of all commands, with their options and settings."""
    modules = {"cache": cache, "schedule": plot_schedule, "convert": convert, "evaluate": evaluate, "plan": plan}
    modules |= {"embed": embed, "glue": glue, "predict": predict, "report": report, "runs": runs, "serve": serve}
    parsers = {name: module.make_parser() for name, module in modules.items()}
    parsers |= {"completion": make_parser(), "train": Parser(description=commands.COMMANDS["train"])}
    for name in ("train", "plan"):
        parsers[name].add_argument("--config", metavar="FILE", help="settings in TOML, or the name of a preset")
        _add_settings(parsers[name], configs.SETTINGS)
    _add_settings(parsers["evaluate"], [name for name in configs.SETTINGS if name.startswith(("data.", "tokenizer."))])
    parser = commands.make_parser(parsers)
    parser.prog = "jaxlm"
    for action in _actions(parser):
        if action.metavar in PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser


def _add_settings(parser: Parser, names: Iterable[str]) -> None:
    """Add an option for each setting that the parser lacks."""
    texts = configs.comments()
    for name in names:
        flag, hint = f"--{name.replace('_', '-')}", configs.SETTINGS[name]
        if flag in parser._option_string_actions:
            continue
        action = parser.add_argument(flag, help=texts[name].replace("%", "%%"))
        if name == "task":
            action.choices = list(configs.task_presets())
        elif hint is bool:
            action.choices = ("true", "false")
        elif typing.get_origin(hint) is typing.Literal:
            action.choices = typing.get_args(hint)
        elif name.endswith("path") or name in PATH_SETTINGS:
            action.metavar = "PATH"
        if hint is bool or name in configs.BARE:
            action.nargs = "?"


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _actions(subparser)


if __name__ == "__main__":
    sys.exit(main())
