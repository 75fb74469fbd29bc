"""Make the links of a page absolute, for where it is shown outside of its repository, as by a package index.

python scripts/absolute_links.py README.md https://github.com/OWNER/NAME v0.1.0
"""

import re
import sys
from pathlib import Path

PICTURES = (".gif", ".jpg", ".png", ".svg")


def absolute(text: str, repository: str, ref: str) -> str:
    """Return Markdown with absolute links to files of a repository, at a tag, branch or commit."""

    def link(match: re.Match) -> str:
        kind = "raw" if match[1].partition("#")[0].endswith(PICTURES) else "blob"
        return f"]({repository}/{kind}/{ref}/{match[1]})"

    return re.sub(r"\]\((?!#|[a-z]+:)([^)\s]+)\)", link, text)


if __name__ == "__main__":
    page, repository, ref = sys.argv[1:]
    Path(page).write_text(absolute(Path(page).read_text(encoding="utf-8"), repository, ref), encoding="utf-8")
