"""Huge pages for arrays on a CPU. glibc uses them if an environment variable is set when the process starts."""

import os
import sys
from pathlib import Path

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def ask() -> None:
    """Restart this process with huge pages, if Linux grants them on request.

    XLA allocates and frees its memory in each update. With pages of 4 kB, zeroing them takes a third of an update of a
    small model (scripts/SPEED.md). Does nothing if GLIBC_TUNABLES is set already.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if TUNABLE in given or not sys.executable or not ENABLED.exists() or "[madvise]" not in ENABLED.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [given, f"{TUNABLE}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
