"""Settings of the tests: no silent broadcasting between ranks, warnings are errors, and quick compiles."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by JAX when it is imported, here and in the processes that tests start.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(autouse=True, scope="package")
def quick_compiles() -> Iterator[None]:
    """Compile with few optimizations, in this process and package only: tiny models take longer to compile than to run.

    Halves the time of these tests.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            **(env or {}),
        }
        return subprocess.Popen(command, cwd=cwd, env=variables, text=True, **options)

    return start


@pytest.fixture(scope="session")
def stored_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from jaxlm import formats, start_test

    folder = tmp_path_factory.mktemp("stored")
    start_test.write_run(folder / "jaxlm", formats.RUN)
    start_test.write_run(folder / "torchlm", formats.CHECKPOINT_1_2)
    return folder


@pytest.fixture
def run(stored_runs: Path, tmp_path: Path) -> Path:
    """A run of jaxlm with checkpoints of steps 3, 6 and 9, for this test alone."""
    return shutil.copytree(stored_runs / "jaxlm", tmp_path / "run")


@pytest.fixture
def torch_run(stored_runs: Path, tmp_path: Path) -> Path:
    """The same run by torchlm."""
    return shutil.copytree(stored_runs / "torchlm", tmp_path / "torch_run")
