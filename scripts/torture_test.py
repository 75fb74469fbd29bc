"""Runs outlive what torture.py does to them, in its quick form."""

import os
import subprocess
import sys

import pytest
import torture


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("trial", torture.TRIALS)
def test_a_trial_ends_as_it_should(trial: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(torture.ROOT)}
    command = [sys.executable, str(torture.ROOT / "scripts" / "torture.py"), trial, "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it should be") + done.stdout.count(torture.NO_MOUNT) > 0
