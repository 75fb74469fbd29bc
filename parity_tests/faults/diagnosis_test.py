"""The tool names the cause of planted faults, and the module in which they are."""

import pytest

from parity_tests import faults
from parity_tests.faults import FAULTS, diagnosis

SAMPLE = {
    "no scale": ("attention scale", "base.blocks.0.attention.output"),
    "future off by one": ("attention mask", "base.blocks.0.attention.output"),
    "tanh GELU": ("gelu", "base.blocks.0.feed_forward.fc2"),
    "mean over all positions": ("sum against mean", "loss"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_the_cause_of_a_fault_is_named(name: str) -> None:
    kind, place = SAMPLE[name]
    fault = next(fault for fault in FAULTS if fault.name == name and fault.package == "torchlm")
    with faults.operation_by_operation():
        verdict = diagnosis.diagnose(fault)
    assert verdict.first and verdict.first.name == place, verdict.text()
    assert kind in [cause.kind for cause in verdict.causes[:3]], verdict.text()
