"""HTML pages as single files, in light and dark mode: text, tables, screenshots.

They load nothing and have no scripts. page.css is the style; line_chart.py has the charts.
"""

import html
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxlm import terminal
from jaxlm.errors import UserError, os_errors

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
LONG = 24  # characters of a table heading that stay on one line
MARKED = {"pass": "pass", "FAIL": "fail", "MISSED": "fail"}  # CSS class of a cell, by its text
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # besides Playwright's own


def page(title: str, parts: Sequence[str]) -> str:
    """Return a page with control characters escaped; `parts` are HTML."""
    return terminal.shown(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>\n{STYLE}</style></head><body><main>\n"
        f"<h1>{text(title)}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def text(plain: str) -> str:
    """Return text escaped for HTML."""
    return html.escape(plain)


def note(plain: str) -> str:
    """Return a paragraph of small text."""
    return f'<p class="soft">{text(plain)}</p>'


def totals(figures: Iterable[tuple[str, str]]) -> str:
    """Return (name, value) pairs with values in large type."""
    shown = "".join(f"<div><b>{text(x)}</b>{text(name)}</div>" for name, x in figures)
    return f'<div class="totals">{shown}</div>'


def table(head: Sequence[str], lines: Iterable[Sequence[str]], label: str) -> str:
    """Return a table; cells that begin with a digit and have no spaces are aligned as numbers."""

    def cell(content: str) -> str:
        is_number = re.match(r"-?\d", content) and " " not in content
        kind = "number" if is_number else MARKED.get(content, "")
        return f'<td class="{kind}">{text(content)}</td>' if kind else f"<td>{text(content)}</td>"

    long = {True: ' class="long"', False: ""}
    heads = "".join(f'<th scope="col"{long[len(x) > LONG]}>{text(x)}</th>' for x in head)
    body = "\n".join(f"<tr>{''.join(map(cell, line))}</tr>" for line in lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def folded(summary: str, content: str, is_open: bool = False) -> str:
    """Return collapsible content; a click on its summary opens it."""
    return f"<details{' open' if is_open else ''}><summary>{text(summary)}</summary>{content}</details>"


def picture(page: Path, png: Path, width: int = 1200) -> None:
    """Write a screenshot of a whole page, `width` CSS pixels wide. Raises UserError if there is no browser."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise UserError(f"--png {png}: playwright is not installed; pip install 'jaxlm[report]'") from error
    with sync_playwright() as playwright:
        try:
            chromium = browser(playwright)
            tab = chromium.new_page(viewport={"width": width, "height": 800}, device_scale_factor=1.5)
            tab.goto(page.absolute().as_uri())
            with os_errors(f"--png {png}: cannot be written"):
                tab.screenshot(path=png, full_page=True)
            chromium.close()
        except Error as error:
            raise UserError(f"--png {png}: {str(error).strip().splitlines()[0]}") from error


def browser(playwright: Any) -> Any:
    """Start Chromium: Playwright's, or else the system's. Raises UserError if there is none."""
    from playwright.sync_api import Error

    try:
        return playwright.chromium.launch()
    except Error:
        if path := next(filter(None, map(shutil.which, BROWSERS)), None):
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        raise UserError("--png: there is no Chromium; install it, or run: playwright install chromium") from None
