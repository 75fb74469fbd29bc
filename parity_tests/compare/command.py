"""`python -m parity_tests.compare A B`: are two training runs the same? For any model, in any framework.

A and B are two records of parity_tests.record, or two files of numpy.savez as arrays.py describes them; A's is the
reference. Prints a row for each kind of number, where the runs part first, and the likeliest causes. Exit status 1 if
any number is farther apart than it may be, 2 if a file cannot be read.

`--names FILE` gives a map of names, `--write-names FILE` keeps the one that was found (pairing.py describes it),
`--rounding RECORD` names further records of A's program, which differ in rounding alone, `--html FILE` and `--json
FILE` write the result.
"""

import argparse
from pathlib import Path

from jaxlm.errors import UserError, reported
from parity_tests.compare import page, verdict
from parity_tests.compare.arrays import compare, read, read_names, renamed
from parity_tests.compare.rows import table, worst


def main(argv: list[str]) -> int:
    """Compare the runs of a command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m parity_tests.compare", description="Compare two training runs.")
    parser.add_argument("a", type=Path, help="record, or file of numpy.savez: the reference")
    parser.add_argument("b", type=Path, help="another one")
    parser.add_argument("--names", type=Path, help="JSON: what parameters of A are called in B")
    parser.add_argument("--write-names", type=Path, help="file to write the map of names to (records)")
    parser.add_argument("--rounding", type=Path, action="append", help="record of A that differs in rounding alone")
    parser.add_argument("--html", type=Path, help="file to write a page to")
    parser.add_argument("--json", type=Path, help="file to write the result to (records)")
    with reported(debug=False):
        args = parser.parse_args(argv)
        if args.a.is_dir() != args.b.is_dir():
            raise UserError(f"{args.a} and {args.b}: one is a record and one a file; give two records, or two files")
        return of_records(args) if args.a.is_dir() else of_arrays(args)
    raise AssertionError("reported() exits on the errors it does not pass on")


def of_records(args: argparse.Namespace) -> int:
    """Compare two records; return the exit status."""
    result = verdict.runs(args.a, args.b, args.names or "auto", args.rounding or ())
    files = ((args.write_names, result.names.json), (args.html, result.html), (args.json, result.json))
    for path, write in files:
        if path:
            path.write_text(write(), encoding="utf-8")
    print(result.text())
    return 0 if result.passes else 1


def of_arrays(args: argparse.Namespace) -> int:
    """Compare two files of arrays; return the exit status."""
    if args.rounding or args.json or args.write_names:
        raise UserError("--rounding, --json and --write-names are for records; leave them out for files of arrays")
    a, b = read(args.a), read(args.b)
    names = read_names(args.names) if args.names else {}
    rows = compare(a, b, names)
    if args.html:
        args.html.write_text(page.page_of_two(args.a.name, args.b.name, renamed(a, names), b, rows), encoding="utf-8")
    print(table(worst(rows)))
    failed = sum(not row.passes for row in rows)
    print(f"\n{failed} of {len(rows)} numbers FAIL" if failed else f"\nall {len(rows)} numbers pass")
    return 1 if failed else 0
