"""`python -m parity_tests.compare A B`: are two training runs the same? For any model, in any framework.

A and B are two files of numpy.savez, as arrays.py describes them. Prints a row for each kind of number. Exit status
1 if any is farther apart than it may be, 2 if a file cannot be read. `--html FILE` writes a page.
"""

import argparse
from pathlib import Path

from jaxlm.errors import reported
from parity_tests.compare import page
from parity_tests.compare.arrays import compare, read, read_names, renamed
from parity_tests.compare.rows import table, worst


def main(argv: list[str]) -> int:
    """Compare the runs of a command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m parity_tests.compare", description="Compare two training runs.")
    parser.add_argument("a", type=Path, help="file of numpy.savez")
    parser.add_argument("b", type=Path, help="another one, the reference")
    parser.add_argument("--names", type=Path, help="JSON: regular expressions of names in A, and their names in B")
    parser.add_argument("--html", type=Path, help="file to write a page to")
    with reported(debug=False):
        args = parser.parse_args(argv)
        a, b = read(args.a), read(args.b)
        names = read_names(args.names) if args.names else {}
        rows = compare(a, b, names)
        if args.html:
            args.html.write_text(
                page.page_of_two(args.a.name, args.b.name, renamed(a, names), b, rows), encoding="utf-8"
            )
        print(table(worst(rows)))
        failed = sum(not row.passes for row in rows)
        print(f"\n{failed} of {len(rows)} numbers FAIL" if failed else f"\nall {len(rows)} numbers pass")
        return 1 if failed else 0
    raise AssertionError("reported() exits on the errors it does not pass on")
