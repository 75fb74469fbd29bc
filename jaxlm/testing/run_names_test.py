"""Runs named by their task or as `latest`: every command finds the newest one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxlm import convert, report, runs
from jaxlm.errors import UserError
from jaxlm.io import storage
from jaxlm.testing import tiny_runs
from jaxlm.training import resume
from jaxlm.weights import formats

OLD, NEW, OTHER = "mlm-20261130-2", "mlm-20261130-10", "mlm-20261201-1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write(tmp_path_factory.mktemp("trained") / "run", "mlm")


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with four runs; NEW is the newest of mlm, gpt-20261130-1 of all."""
    monkeypatch.chdir(tmp_path)
    for age_s, name in enumerate(("gpt-20261130-1", NEW, OTHER, OLD)):
        run = shutil.copytree(trained, tmp_path / "runs" / name)
        os.utime(run / "config.toml", (1_000_000 - age_s, 1_000_000 - age_s))
    (tmp_path / "runs" / "mlm-notes").mkdir()
    (tmp_path / "runs" / "mlm-20261202-1").mkdir()  # a start that failed: no config.toml
    return tmp_path


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("runs/mlm", f"runs/{NEW}"),
        ("runs/mlm/", f"runs/{NEW}"),
        ("runs/gpt", "runs/gpt-20261130-1"),
        ("latest", "runs/gpt-20261130-1"),
        ("runs/latest", "runs/gpt-20261130-1"),
        (f"runs/{OLD}", f"runs/{OLD}"),
        ("runs/ml", "runs/ml"),
        ("runs/m.*", "runs/m.*"),
        ("mlm", f"runs/{NEW}"),
        ("runs/sst2", "runs/sst2"),
    ],
)
def test_a_name_stands_for_the_newest_run(named: str, expected: str, here: Path) -> None:
    assert storage.run_path(named) == Path(expected)


def test_a_run_of_exactly_that_name_wins(here: Path) -> None:
    (here / "runs" / "mlm").mkdir()
    assert storage.run_path("runs/mlm") == Path("runs/mlm")


def test_latest_without_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="latest: there is no run in runs"):
        storage.run_path("latest")
    with pytest.raises(UserError, match="latest: there is no run in runs"):
        resume.to_use("latest")


@pytest.mark.parametrize(
    "command",
    [
        lambda: runs.main(["show", "runs/mlm"]),
        lambda: runs.main(["verify", "runs/mlm"]),
        lambda: runs.main(["compare", "runs/mlm", f"runs/{NEW}"]),
        lambda: report.main(["runs/mlm"]),
        lambda: convert.main(["--inspect", "runs/mlm"]),
    ],
    ids=["show", "verify", "compare", "report", "inspect"],
)
def test_commands_take_the_name(command: Callable[[], int], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command() == 0
    output = capsys.readouterr().out
    assert NEW in output and OLD not in output and OTHER not in output


@pytest.mark.parametrize("setting", ["--init-from", "--distill.teacher"])
def test_a_base_is_stored_by_its_own_path(setting: str, here: Path) -> None:
    teacher = ("--task", "mlm", "--model.n-layers", "1") if setting == "--distill.teacher" else ()
    config, _, found = resume.load([setting, "runs/mlm", *teacher], "", formats.RUN)
    assert found.run == Path("runs") / NEW
    assert {config.init_from, config.distill.teacher} == {"", f"runs/{NEW}"}
    _, _, found = resume.load(["--resume", "runs/mlm"], "", formats.RUN)
    assert found.run_dir == f"runs/{NEW}"
