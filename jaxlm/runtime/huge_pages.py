"""Huge pages for arrays of a CPU: glibc asks the system for them if the environment says so when a process starts."""

import os
import sys
from pathlib import Path

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def ask() -> None:
    """Start this process anew with huge pages, where Linux gives them to those who ask.

    XLA takes its memory anew for each update, and gives it back. In pages of 4 kB, to fill them with zeros is a third
    of an update of a small model (scripts/SPEED.md). Nothing is done if GLIBC_TUNABLES already has a say on it.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in given or not sys.executable or not ENABLED.exists() or "[madvise]" not in ENABLED.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [given, f"{TUNABLE}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
