"""The page: complete, in one file, honest about what fails; and the page of any two runs."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import UserError
from parity_tests import packages, report
from parity_tests.compare import command
from parity_tests.compare.rows import Row
from parity_tests.drift import Drift
from parity_tests.report import Pair

FAULTS = [
    {"name": "no scale", "description": "not divided", "package": "jaxlm", "caught_by": "batch 0", "quantity": "loss"},
    {"name": "no scale", "description": "not divided", "package": "torchlm", "caught_by": "", "quantity": ""},
]


EXACT = {"jaxlm": np.array([1.0, 2.0]), "torchlm": np.array([1.0, 2.0])}
ROUNDED = {"jaxlm": np.array([[1.1, 2.5]]), "torchlm": np.array([[0.9, 2.1]])}
DRIFT = Drift({name: x[None] for name, x in EXACT.items()}, ROUNDED, {"jaxlm": 0.01, "torchlm": 0.02})


class Page(HTMLParser):
    """The tags with their attributes, and the cells of tables row by row."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.is_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.is_cell = tag in ("td", "th") or self.is_cell

    def handle_endtag(self, tag: str) -> None:
        self.is_cell = self.is_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.is_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[Pair, Pair]]:
    """Short runs of one package against itself, with changed losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "PACKAGES", (packages.Torchlm, packages.Torchlm))
        single, double = (report.pair("gpt", precision, 6) for precision in ("float32", "float64"))
    assert all(row.passes and row.difference == 0 for row in [*single.rows, *double.rows])
    losses = single.jaxlm.losses * (1 + np.array([0, 1e-7, 0, 3e-7, 2e-7, 0]))
    changed = dataclasses.replace(single.jaxlm, losses=losses)
    return {"gpt": (Pair(changed, single.torchlm, single.rows), double)}


def external(text: str) -> list[str]:
    """Return what a page would load from elsewhere."""
    tags = Page(text).tags
    links = [value for _, attrs in tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    return [link for link in links if link and not link.startswith("#")] + re.findall(
        r"@import|url\((?!#)[^)]*\)", text
    )


def test_the_page_has_all_parts_and_needs_nothing_else(pairs: dict, tmp_path: Path) -> None:
    (tmp_path / "faults.json").write_text(json.dumps(FAULTS))
    replayed = [
        Row("cola", "torchlm", "losses", 1e-7, 5e-6, "update 3"),
        Row("mlm", "torchlm", "losses", 2e-7, 5e-6, "u"),
    ]
    single, double = pairs["gpt"]
    rows = [
        row._replace(difference=0.5) if row.quantity == "gradients of batch 0" and "fc1.weight" in row.where else row
        for row in single.rows
    ]
    short = dataclasses.replace(single, rows=rows)
    text = report.both_packages(pairs, short, {"gpt": DRIFT}, replayed, tmp_path / "faults.json")
    found = Page(text)
    assert not external(text)
    assert not [tag for tag, _ in found.tags if tag in ("script", "link", "img", "iframe")]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert sum(tag == "figure" for tag, _ in found.tags) == 3
    assert (
        "prefers-color-scheme: dark" in text and "var(--c1)" in text and report.FIRST not in text.split("</style>")[1]
    )
    assert ["losses", "pass", "2.0e-07", "5.0e-06", "mlm u", "torchlm"] in found.rows
    gradient = next(row for row in found.rows if row[0] == "base.blocks.0.feed_forward.fc1.weight")
    assert gradient[1] == "5.0e-01 FAIL" and gradient[2] == "0"
    assert ["no scale", "not divided", "batch 0: loss", "MISSED"] in found.rows
    assert "caught 1 of 1 in jaxlm and 0 of 1 in torchlm" in text
    assert ["gpt", "drift of losses", "3.0e-01", "1.0e-01", "3.00", "FAIL"] in found.rows
    assert ["gpt", "drift of weights", "1.0e-02", "2.0e-02", "0.50", "pass"] in found.rows
    n_rows = 1 + len(single.rows) + len(double.rows) + 2 + 2  # of the long run in float32, only the losses
    assert f"<b>{n_rows - 3}</b>of {n_rows} numbers" in text
    assert "torch 2." in text and "flax 0." in text


@pytest.mark.slow
def test_a_quick_page_says_what_it_computes_and_that_it_is_quick(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert report.main(["--quick", "--out", str(tmp_path / "page.html")]) == 0
    output, errors = capfd.readouterr()
    lines = [re.fullmatch(r"(\d+) of (\d+), after (\d+) s: (.*)", line) for line in errors.splitlines()]
    steps = [(int(line[1]), int(line[2])) for line in lines if line]
    assert output == f"{tmp_path}/page.html\n" and steps == [(i + 1, 7) for i in range(7)]
    assert all(task in errors for task in ("mlm in float32", "gpt in float64", "sst2 in", "recorded case cola"))
    text = (tmp_path / "page.html").read_text()
    (passed, n) = re.search(r"<b>(\d+)</b>of (\d+) numbers", text).groups()  # type: ignore[union-attr]
    assert passed == n and int(n) > 100
    assert "Quick: a page made without --quick has 200 updates of mlm, gpt, sst2, cola, bfloat16," in text
    assert "in 15 updates, float32" in text and "bfloat16</h2>" not in text


def test_log_scales_are_labelled_and_what_they_leave_out_is_said(pairs: dict) -> None:
    text = report.both_packages(pairs, pairs["gpt"][0], {"gpt": DRIFT}, [], None)
    assert "<b>gpt: difference of losses, relative</b> <small>(log scale)</small>" in text
    assert "values are zero, negative or not finite, and left out." in text
    assert "Quick" not in text and "bfloat16</h2>" in text


def test_a_name_from_a_file_is_text(tmp_path: Path, pairs: dict) -> None:
    (tmp_path / "faults.json").write_text(json.dumps([FAULTS[0] | {"name": "<script>"}]))
    assert "<script>" not in report.both_packages(pairs, pairs["gpt"][0], {}, [], tmp_path / "faults.json")


def test_the_difference_is_drawn_where_it_is_not_zero(pairs: dict) -> None:
    title, curves, bounds = report.differences("gpt", *pairs["gpt"])
    text = report.svg(title, curves[:1], bounds, is_log=True)
    (dots,) = re.findall('class="dots" d="([^"]*)"', text)
    assert dots.count("M") == 3
    np.testing.assert_allclose(curves[0].values, [0, 1e-7, 0, 3e-7, 2e-7, 0], rtol=1e-6, atol=1e-16)
    assert [bound.values[0] for bound in bounds] == [report.FLOAT32.losses, report.FLOAT64.losses]


def test_the_drift_is_drawn_as_its_mean_so_far() -> None:
    _, (jaxlm, torchlm), (bound,) = report.drift_curves("gpt", DRIFT)
    np.testing.assert_allclose(jaxlm.values, [0.1, 0.3])
    np.testing.assert_allclose(torchlm.values, [0.1, 0.1])
    np.testing.assert_allclose(bound.values, [0.125, 0.125])


def test_the_picture_is_a_png(pairs: dict, tmp_path: Path) -> None:
    report.picture(tmp_path / "parity.png", pairs)
    content = (tmp_path / "parity.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


def test_a_file_without_faults_is_told(tmp_path: Path) -> None:
    (tmp_path / "faults.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="no table of python -m parity_tests.faults"):
        report.faults(tmp_path / "faults.json")


def test_the_page_of_any_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loss, weights = np.linspace(2, 1, 5, dtype=np.float32), np.ones((2, 3), np.float32)
    np.savez(tmp_path / "a.npz", loss=loss * np.float32(1 + 1e-3), **{"weights/w": weights})
    np.savez(tmp_path / "b.npz", loss=loss, **{"weights/w": weights})
    file = tmp_path / "page.html"
    assert command.main([*(str(tmp_path / x) for x in ("a.npz", "b.npz")), "--html", str(file)]) == 1
    found = Page(file.read_text())
    assert not external(file.read_text())
    assert sum(tag == "figure" for tag, _ in found.tags) == 2
    (row,) = {tuple(row[:4]) for row in found.rows if row[0] == "loss"}
    assert row[1] == "FAIL" and row[2].startswith("1.0e-03")
