"""The parser of command lines."""

import argparse
import shutil
import sys
from collections.abc import Iterable
from typing import NoReturn

from jaxlm import terminal
from jaxlm.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError for a bad command line."""

    color = False  # Python 3.14 prints colours, which terminal.Shown would escape

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows how to call it)")

    def format_help(self) -> str:
        """Return the help, wrapped to the width of the terminal."""
        return terminal.wrapped(super().format_help(), shutil.get_terminal_size().columns)


def removes(lines: Iterable[str], what: str, is_sure: bool) -> bool:
    """Print what would be removed, and ask unless the user `is_sure`; return whether to remove it."""
    for line in lines:
        print(line)
    if is_sure or agrees(f"Remove {what}?"):
        return True
    print("nothing is removed")
    return False


def agrees(question: str) -> bool:
    """Return whether the user says yes. Raises UserError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask for confirmation; add --yes to remove these")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False
