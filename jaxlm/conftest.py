"""Settings of the tests: no silent broadcasting between ranks, warnings are errors, and quick compiles."""

import os
from collections.abc import Iterator

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
