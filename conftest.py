"""Settings of all tests and of the processes that they start: strict, one thread for PyTorch, and quick compiles.

Tiny models take longer to compile than to run. `parity_tests.replay`, which a slow test runs on all cases, has all
optimizations.
"""

import gc
import importlib.metadata
import os

import pytest

# Read by JAX and PyTorch when they are imported.
XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Half of the time to compile goes into emitters of fused operations. The XLA of jaxlib 0.11.2 and later ends the
    # process, because it does not know this flag.
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ |= {
    "JAX_NUMPY_RANK_PROMOTION": "raise",  # no silent broadcasting
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # for where there is a GPU
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": XLA_FLAGS,
    "OMP_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # or commands start anew (jaxlm/runtime/huge_pages.py)
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")
    # Of the oldest transformers and datasets that pyproject.toml allows.
    config.addinivalue_line("filterwarnings", "ignore:numpy.core is deprecated:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:Deprecated in 0.9.0:DeprecationWarning")


def pytest_collection_finish() -> None:
    # What is imported by now stays. To look at it again and again for garbage is a tenth of the time that JAX traces.
    gc.freeze()
