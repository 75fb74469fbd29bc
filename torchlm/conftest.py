"""What tests of several modules need: real processes of training."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen]:
    """Return a function that starts `python -m torchlm.train` as a process, with caches that all tests share."""
    cache = tmp_path_factory.mktemp("cache_home")

    def start(args: str, cwd: Path, n_processes: int = 1, **options: Any) -> subprocess.Popen:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
        command = [sys.executable, *(torchrun if n_processes > 1 else []), "-m", "torchlm.train", *shlex.split(args)]
        variables = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hub")}
        return subprocess.Popen(command, cwd=cwd, env=variables, text=True, **options)

    return start
