"""Plant realistic porting mistakes one at a time, and show which check catches each.

planting.py      how a mistake gets into a function of jaxlm or torchlm, in memory
targets.py       the functions, which planting replaces or edits; where one moves, only its import changes
checks.py        the checks, with their own tolerances
model.py modern.py heads.py loss.py optimizer.py muon.py schedule.py tuning.py randomness.py data.py tags.py
embeddings.py packed.py mixture.py checkpoint.py reading.py
                 FAULTS, by subject: lists of what goes wrong in ports
diagnosis.py     `python -m parity_tests.faults.diagnosis`: what parity_tests.compare says of each
expected.py      what it should say: the cause and the module of each
__main__.py      `python -m parity_tests.faults [--only TEXT] [--package NAME] [--sample N] [--shard I/N] [--json FILE]`
"""

import argparse
import random
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import jax
import torch

from parity_tests.compare.rows import Row, badness
from parity_tests.faults import (
    checkpoint,
    data,
    embeddings,
    heads,
    loss,
    mixture,
    model,
    modern,
    muon,
    optimizer,
    packed,
    randomness,
    reading,
    schedule,
    tags,
    tuning,
)
from parity_tests.faults.checks import CHECKS, once
from parity_tests.faults.planting import Fault
from parity_tests.packages import PACKAGES, Package

SUBJECTS = (
    model,
    modern,
    heads,
    data,
    tags,
    embeddings,
    packed,
    mixture,
    checkpoint,
    reading,
    loss,
    tuning,
    optimizer,
    muon,
    schedule,
    randomness,
)
FAULTS: list[Fault] = [fault for subject in SUBJECTS for fault in subject.FAULTS]


@dataclass(frozen=True)
class Result:
    """Which check caught a fault ("" if none), and by what."""

    name: str
    description: str
    package: str
    caught_by: str
    quantity: str
    difference: float
    tolerance: float
    seconds: float


def check(package: type[Package], name: str) -> Row | None:
    """Return the row of a check that is farthest beyond its tolerance, or None if all pass; an exception fails, too."""
    try:
        rows = CHECKS[name](package)
    except Exception as error:
        return Row(name, package.name, f"raises {type(error).__name__}", float("inf"), 0.0)
    failed = [row for row in rows if not row.passes]
    return max(failed, key=badness) if failed else None


_REMEMBERED: set[tuple[type[Package], str]] = set()  # checks that have been made without a fault


def catch(fault: Fault) -> Result:
    """Plant a fault, and run checks until one notices it."""
    started_s = time.monotonic()
    (package,) = (x for x in PACKAGES if x.name == fault.package)
    rest = [name for name in CHECKS if name != fault.check]
    caught, row = "", None
    with once(package):
        # A fault in code that both packages share would be in both: `once` remembers the other's runs from here.
        if (package, fault.check) not in _REMEMBERED:
            check(package, fault.check)
            _REMEMBERED.add((package, fault.check))
        with fault.plant():
            for name in (fault.check, *rest):
                row = check(package, name)
                if row:
                    caught = name
                    break
    numbers = (row.quantity, float(row.difference), float(row.tolerance)) if row else ("", 0.0, 0.0)
    seconds = time.monotonic() - started_s
    return Result(fault.name, fault.description, fault.package, caught, *numbers, seconds)


def sound(package: type[Package], names: Sequence[str]) -> list[str]:
    """Return those of the checks that fail although no fault is planted."""
    with once(package):
        return [name for name in names if check(package, name)]


def operation_by_operation() -> AbstractContextManager[None]:
    """Let JAX run each operation on its own: its compiled operations outlive a fault, and nothing else is compiled."""
    return jax.disable_jit()


def command(program: str, description: str, argv: list[str]) -> tuple[list[Fault], Path | None]:
    """Return the faults that a command line selects, and the file for its table; set both frameworks up for them."""
    parser = argparse.ArgumentParser(program, description=description)
    parser.add_argument("--only", help="only faults with this in their name")
    parser.add_argument("--package", choices=[x.name for x in PACKAGES], help="only faults in this package")
    parser.add_argument("--sample", type=int, help="so many of them, drawn with a fixed seed")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts of them")
    parser.add_argument("--json", type=Path, help="file to keep the table in")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)  # tiny models take longer to compile than to run
    return part(chosen(args.only, args.sample, args.package), *args.shard), args.json


def part(found: list[Fault], i: int, n: int) -> list[Fault]:
    """Return the i-th of n stretches: neighbours share what they are compared with, which is computed once."""
    return found[len(found) * (i - 1) // n : len(found) * i // n]


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is no part of a whole; give 2/8 for the second of eight")
    return int(match[1]), int(match[2])


def chosen(only: str | None, n: int | None, package: str | None = None) -> list[Fault]:
    """Return the faults of a package whose name contains `only`, or a sample of n of these: n + 1 adds one to it."""
    found = [x for x in FAULTS if (only is None or only in x.name) and package in (None, x.package)]
    return found if n is None else random.Random(0).sample(found, len(found))[:n]
