"""Links of the README, as the release makes them absolute."""

import re

import absolute_links
from structure import ROOT


def test_links_name_files_of_the_repository_and_others_stay() -> None:
    text = "![a (b)](a/b.png) [c](d/e.md#f) [g](#h) [i](https://j/k.png) [l](m) [o](p@q.md)"
    assert absolute_links.absolute(text, "https://host/x/y", "v1") == (
        "![a (b)](https://host/x/y/raw/v1/a/b.png) [c](https://host/x/y/blob/v1/d/e.md#f) [g](#h) "
        "[i](https://j/k.png) [l](https://host/x/y/blob/v1/m) "
        "[o](https://host/x/y/blob/v1/p@q.md)"
    )


def test_every_link_of_the_readme_becomes_absolute_and_names_a_file() -> None:
    text = absolute_links.absolute((ROOT / "README.md").read_text(encoding="utf-8"), "https://host/x/y", "v1")
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 20
    for target in links:
        kind, _, path = target.removeprefix("https://host/x/y/").partition("/v1/")
        if target.startswith("#") or not target.startswith("https://host/x/y/"):
            continue
        file = ROOT / path.partition("#")[0]
        assert file.exists(), target
        assert kind == ("raw" if file.suffix == ".png" else "blob"), target
