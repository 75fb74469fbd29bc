"""Strict settings for the tests: no silent broadcasting, warnings are errors; quick compiles, and one thread."""

import os
from collections.abc import Iterator

import pytest

# Read by JAX when it is imported, here and in the processes that tests start.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(autouse=True, scope="package")
def quick_settings() -> Iterator[None]:
    """Compile with few optimizations and run in one thread: tiny models take longer to compile than to run.

    The command `parity_tests.replay`, which a slow test runs on all cases, has all optimizations.
    """
    import jax
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    torch.set_num_threads(threads)
