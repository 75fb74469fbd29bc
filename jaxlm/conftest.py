"""What tests of several modules need: real processes of training, and runs to read."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen]:
    """Return a function that starts `python -m jaxlm.train` as a process, with caches that all tests share."""
    cache = tmp_path_factory.mktemp("cache_home")

    def start(args: str, cwd: Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxlm.train", *shlex.split(args)]
        variables = {
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "HF_HOME": str(cache / "hub"),
            **(env or {}),
        }
        return subprocess.Popen(command, cwd=cwd, env=variables, text=True, **options)

    return start


@pytest.fixture(scope="session")
def stored_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from jaxlm.training import resume_test
    from jaxlm.weights import formats

    folder = tmp_path_factory.mktemp("stored")
    resume_test.write_run(folder / "jaxlm", formats.RUN)
    resume_test.write_run(folder / "torchlm", formats.CHECKPOINT_1_2)
    return folder


@pytest.fixture
def run(stored_runs: Path, tmp_path: Path) -> Path:
    """A run of jaxlm with checkpoints of steps 3, 6 and 9, for this test alone."""
    return shutil.copytree(stored_runs / "jaxlm", tmp_path / "run")


@pytest.fixture
def torch_run(stored_runs: Path, tmp_path: Path) -> Path:
    """The same run by torchlm."""
    return shutil.copytree(stored_runs / "torchlm", tmp_path / "torch_run")
