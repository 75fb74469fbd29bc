"""Planted faults are caught, by checks that pass without them; and what is planted is gone afterwards."""

import contextlib
import json
from pathlib import Path

import pytest

from parity_tests import faults
from parity_tests.faults import CHECKS, FAULTS, Fault
from parity_tests.faults.__main__ import main
from parity_tests.faults.optimizer import adamw_step
from parity_tests.faults.planting import instead
from parity_tests.faults.targets import pytorch_adamw_step
from parity_tests.packages import PACKAGES

THIRDS = ["first third", "second third", "last third"]  # each a third of every subject's
SAMPLE = [
    ("mask on queries", "jaxlm"),
    ("mean over all positions", "jaxlm"),
    ("epsilon inside the root", "jaxlm"),
    ("future off by one", "torchlm"),
    ("gradients kept", "torchlm"),
    ("re-warmup from zero", "torchlm"),
    ("head of Xavier", "torchlm"),
    ("masks shared between layers", "torchlm"),
]


def of_sample() -> list[Fault]:
    return [fault for fault in FAULTS if (fault.name, fault.package) in SAMPLE]


def test_a_sample_of_faults_is_caught() -> None:
    found = of_sample()
    assert len(found) == len(SAMPLE)
    assert {fault.name: faults.catch(fault).caught_by for fault in found} == {f.name: f.check for f in found}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_checks_of_the_sample_pass_without_a_fault(package: faults.Package) -> None:
    assert not faults.sound(package, sorted({fault.check for fault in of_sample() if fault.package == package.name}))


def test_a_check_passes_again_with_what_is_remembered_of_the_first_time() -> None:
    for _ in range(2):
        assert not faults.sound(PACKAGES[0], ["dropout with the same masks"])


def test_there_are_forty_faults_in_each_package() -> None:
    names = [(fault.name, fault.package) for fault in FAULTS]
    assert len(set(names)) == len(names)
    for package in PACKAGES:
        assert sum(name == package.name for _, name in names) >= 40


def test_every_fault_fits_the_code_as_it_is_now() -> None:
    for fault in FAULTS:
        with fault.plant():
            pass


def test_the_optimizer_that_carries_faults_has_none_of_its_own() -> None:
    own = Fault("own step", "", "torchlm", "", instead(pytorch_adamw_step, adamw_step()))
    with own.plant():
        assert not faults.sound(PACKAGES[1], ["AdamW of NumPy and PyTorch", "replay of cola"])


def test_a_fault_that_changes_nothing_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Fault("harmless", "nothing", "torchlm", "batch 0 of gpt", contextlib.nullcontext)
    caught = next(fault for fault in FAULTS if fault.name == "no scale" and fault.package == "torchlm")
    monkeypatch.setattr(faults, "FAULTS", [harmless, caught])
    monkeypatch.setattr(faults, "CHECKS", {name: CHECKS[name] for name in ("batch 0 of gpt", "batch 0 of mlm")})
    file = tmp_path / "faults.json"
    assert main(["--json", str(file)]) == 1
    assert [row["caught_by"] for row in json.loads(file.read_text())] == ["", "batch 0 of mlm"]
    assert main(["--only", "scale"]) == 0


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("third", THIRDS)
def test_every_fault_is_caught(third: str) -> None:
    planted = FAULTS[THIRDS.index(third) :: 3]
    with faults.operation_by_operation():
        results = [faults.catch(fault) for fault in planted]
    # By the check that is about it, and by a number: what crashes would be noticed without any check.
    assert [result.caught_by for result in results] == [fault.check for fault in planted]
    assert not [result for result in results if result.quantity.startswith("raises")]


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("package", PACKAGES)
def test_every_check_passes_without_a_fault(package: faults.Package) -> None:
    with faults.operation_by_operation():
        assert not faults.sound(package, list(CHECKS))
