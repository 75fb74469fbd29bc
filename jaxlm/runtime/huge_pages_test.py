"""Commands that start anew with huge pages: once, in the same process, with the same arguments and input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.runtime import huge_pages

PROGRAM = """
import os, pathlib, sys
from jaxlm.runtime import huge_pages
huge_pages.ENABLED = pathlib.Path(sys.argv[1])
huge_pages.ask()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], sys.stdin.read())
"""


@pytest.mark.parametrize(
    ("enabled", "given", "then"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "None"),
        ("always madvise [never]", None, "None"),
        (None, None, "None"),
    ],
)
def test_a_process_asks_once_where_that_changes_anything(
    tmp_path: Path, enabled: str | None, given: str | None, then: str
) -> None:
    path, program = tmp_path / "enabled", tmp_path / "program.py"
    program.write_text(PROGRAM)
    if enabled:
        path.write_text(enabled)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": str(Path(huge_pages.__file__).parents[2])} | (
        {"GLIBC_TUNABLES": given} if given else {}
    )
    process = subprocess.Popen(
        [sys.executable, str(program), str(path), "a b", "--c"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate("typed")
    assert out == f"{process.pid} {then} ['a b', '--c'] typed\n"
