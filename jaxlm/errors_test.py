"""Steps that take long say what they do."""

import re
import time
from pathlib import Path

import pytest

from jaxlm import errors

ROOT = Path(errors.__file__).parents[1]


@pytest.mark.parametrize("as_decorator", [True, False])
def test_a_slow_step_says_what_it_does_and_how_long_and_a_fast_one_nothing(as_decorator, monkeypatch, capsys):
    monkeypatch.setattr(errors, "SLOW_S", 0.05)
    monkeypatch.setattr(errors, "AGAIN_S", 0.05)
    said = ""

    def work(is_slow: bool) -> None:
        nonlocal said
        while is_slow and said.count("\n") < 3:
            said += capsys.readouterr().err
            time.sleep(0.01)

    if as_decorator:
        errors.slow("counting sheep")(work)(True)
    else:
        with errors.slow("counting sheep"):
            work(True)
    assert said.startswith("counting sheep ...\ncounting sheep ... 0 s\n")
    monkeypatch.setattr(errors, "SLOW_S", 60.0)
    with errors.slow("counting sheep"):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("package", ["jaxlm", "torchlm"])
def test_each_step_to_the_first_update_is_one_that_speaks(package):
    steps = {
        "jaxlm/training/resume.py": ["find"],
        "jaxlm/data/prepare.py": ["_source"],
        "jaxlm/training/run.py": ["teacher", "baselines"],
        "jaxlm/weights/snapshots.py": ["load", "write"],
        "jaxlm/runtime/processes.py": ["_initialize", "wait"],
        f"{package}/parallel.py": ["make_mesh"] + ["wait"] * (package == "torchlm"),
        f"{package}/loop.py": ["begin"],
    }
    for path, names in steps.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for name in names:
            assert re.search(rf'@slow\("[^"]+"\)\n\s*def {name}\(', text), f"{path}: {name}"


def test_an_error_that_quotes_a_whole_text_is_cut_and_keeps_its_mend(capsys):
    with pytest.raises(SystemExit), errors.reported(debug=False):
        raise errors.UserError(f"a.csv, line 2: label {'0' * 100_000!r} is no class; leave the row out")
    line = capsys.readouterr().err
    assert line.startswith("error: a.csv, line 2: label '000") and line.endswith("is no class; leave the row out\n")
    assert len(line) < errors.LONGEST + 20
