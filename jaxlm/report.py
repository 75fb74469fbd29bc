"""The command `python -m jaxlm.report`: an HTML page about one run, or comparing several. USING.md shows it.

The page is a single file. It reads run folders of jaxlm and torchlm.
"""

import sys
import webbrowser
from pathlib import Path

from jaxlm.cli import Parser
from jaxlm.errors import os_errors, reported
from jaxlm.io import storage
from jaxlm.reporting import html_page, run_page, run_reader
from jaxlm.terminal import command


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Write the page; return the exit status. Bad input exits with 2."""
    args = make_parser().parse_args(argv)
    runs = [run_reader.read(path) for path in args.runs]
    out = args.out or (runs[0].path / "report.html" if len(runs) == 1 else Path("report.html"))
    page = run_page.page(runs)
    with os_errors(f"{out}: cannot be written"):
        out.write_text(page, encoding="utf-8", errors="backslashreplace")  # paths can contain any bytes
    print(out)
    if args.png:
        html_page.picture(out, args.png)
        print(args.png)
    if args.open:
        webbrowser.open(out.absolute().as_uri())
    return 0


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("report"),
        description="Writes an HTML page, a single file, about one run, or comparing several.",
    )
    parser.add_argument("runs", nargs="+", type=storage.run_path, metavar="RUN", help="run folder, of jaxlm or torchlm")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (report.html in the run, or here for several)"
    )
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--png", type=Path, metavar="FILE", help="picture of the page to write, by Chromium")
    return parser


if __name__ == "__main__":
    sys.exit(main())
