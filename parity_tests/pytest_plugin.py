"""A fixture for tests of ports: `pytest -p parity_tests.pytest_plugin`, or in conftest.py `pytest_plugins = [...]`.

    def test_my_port(parity):
        with parity.torch(model, optimizer) as a:
            ...
        with parity.jax(port) as b:
            ...
        parity.assert_same(a, b)

`pytest --parity FOLDER` keeps the records and a page and a JSON file of each comparison, one folder a test.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from parity_tests import compare, record


@dataclasses.dataclass
class Parity:
    """Recorders and a comparison whose files are in one folder."""

    folder: Path
    n_records: int = 0

    def torch(self, model: Any, optimizer: Any = None, **options: Any) -> Any:
        """Return record.torch(...) whose record is in the folder of this test."""
        return record.torch(model, optimizer, path=self._next(), **options)

    def jax(self, model: Any = None, **options: Any) -> Any:
        """Return record.jax(...) whose record is in the folder of this test."""
        return record.jax(model, path=self._next(), **options)

    def assert_same(self, a: Any, b: Any, names: Any = "auto", rounding: Sequence[Any] = ()) -> compare.Verdict:
        """Write page and JSON file, and raise AssertionError unless both runs are the same but for rounding."""
        verdict = compare.runs(a, b, names, rounding)
        (self.folder / "parity.html").write_text(verdict.html(), encoding="utf-8")
        (self.folder / "parity.json").write_text(verdict.json(), encoding="utf-8")
        if not verdict.passes:
            pytest.fail(f"the runs differ\n{verdict.text()}", pytrace=False)
        return verdict

    def _next(self) -> Path:
        self.n_records += 1
        return self.folder / f"record-{self.n_records}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", type=Path, metavar="FOLDER", help="keep records and results of the parity fixture")


@pytest.fixture
def parity(request: pytest.FixtureRequest, tmp_path: Path) -> Parity:
    """Return recorders and the comparison of a test of a port."""
    kept = request.config.getoption("--parity")
    folder = kept / re.sub(r"[^\w.-]+", "-", request.node.nodeid) if kept else tmp_path / "parity"
    folder.mkdir(parents=True)
    return Parity(folder)
