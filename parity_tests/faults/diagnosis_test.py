"""The tool names the cause of planted faults, and the module in which they are."""

import pytest

from parity_tests import faults
from parity_tests.faults import FAULTS, diagnosis, expected

SAMPLE = ["no scale", "future off by one", "tanh GELU", "mean over all positions", "no soft cap", "wide window"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_the_cause_of_a_fault_is_named(name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name and fault.package == "torchlm")
    with faults.operation_by_operation():
        result = diagnosis.judged(fault)
    assert result.is_cause_right and result.is_module_right is not False, result
    assert result.stage == "loss" or result.is_module_right


def test_causes_are_declared_for_faults_that_there_are() -> None:
    names = [name for declared in expected.CAUSES.values() for name in declared]
    assert len(set(names)) == len(names) and set(names) <= {fault.name for fault in FAULTS}
    assert expected.is_in("attention", "base.blocks.0.attention.output")
    assert not expected.is_in("base", "base.blocks.0") and not expected.is_in("", "base")
