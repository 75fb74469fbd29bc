"""The command `python -m jaxlm.cache`: lists, verifies and cleans up token caches. data/README.md has their format."""

import sys
import time
from pathlib import Path

from rich.table import Table

from jaxlm.cli import Parser, removes
from jaxlm.data import cache
from jaxlm.errors import UserError, reported
from jaxlm.io import storage, temporary
from jaxlm.io.console import Console
from jaxlm.reporting.run_reader import ago, size
from jaxlm.terminal import command

DAY_S = 86400


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status. Bad input exits with 2."""
    args = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    folder = temporary.user_cache_dir(args.dir)
    if args.dir and not folder.is_dir():
        raise UserError(f"--data.cache-dir {folder}: there is no such folder; leave it out for {_default()}")
    records = cache.records(folder)
    if not records:
        print(f"{folder}: there is no token cache")
        return 0
    if args.command == "verify":
        return _verify(records)
    return _clean(records, args.days, args.yes) if args.command == "clean" else _list(records)


def _default() -> Path:
    return temporary.user_cache_dir("")


def _list(records: list[cache.Record]) -> int:
    table = Table("token cache", "size", "last used", "state", "source")
    for record in records:
        table.add_row(record.path.name, size(record.n_bytes), f"{ago(record.used_s)} ago", record.state, record.source)
    Console().print(table)
    print(f"{records[0].path.parent}: {size(sum(record.n_bytes for record in records))} in all")
    return 0


def _verify(records: list[cache.Record]) -> int:
    status = 0
    for record in records:
        line = record.state
        if record.state == cache.WHOLE and (why := cache.damage(record.path)):
            line, status = f"damaged: {why}; the next training on its source builds it again", 1
        print(f"{record.path}: {line}", flush=True)
    return status


def _clean(records: list[cache.Record], days: float, yes: bool) -> int:
    spare = [x for x in records if x.state != cache.AT_WORK]
    spare = [
        x for x in spare if x.state != cache.WHOLE or time.time() - x.used_s >= days * DAY_S or cache.damage(x.path)
    ]
    if not spare:
        print("there is nothing to remove")
        return 0
    lines = (f"{x.path}: {size(x.n_bytes)}, {x.state}, used {ago(x.used_s)} ago, {x.source}" for x in spare)
    what = f"{len(spare)} token cache{'s' * (len(spare) != 1)}, {size(sum(record.n_bytes for record in spare))}"
    if not removes(lines, what, yes):
        return 1
    for record in spare:
        storage.remove(record.path)
    print(f"removed {what}")
    return 0


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("cache"),
        description="Lists, verifies or cleans up token caches, which trainings build from their text once.",
        epilog="list: each cache, its size and its source. verify: compare all bytes with their checksums. clean: "
        "verify, and after asking remove caches that are damaged, begun and never finished, or unused for --days. "
        "Exit status: 0; 1 if a cache is damaged, or the answer is no; 2 for bad input.",
    )
    parser.add_argument("command", nargs="?", choices=("list", "verify", "clean"), default="list", help="what to do")
    parser.add_argument("--data.cache-dir", dest="dir", default="", metavar="PATH", help=f"folder ({_default()})")
    parser.add_argument("--days", type=float, default=30, metavar="N", help="clean: those unused for so long (30)")
    parser.add_argument("--yes", action="store_true", help="clean: do not ask")
    return parser


if __name__ == "__main__":
    sys.exit(main())
