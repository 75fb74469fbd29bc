"""How JAX compiles and computes: set once, before anything runs."""

import jax

from jaxlm.config import Config
from jaxlm.data import cache


def configure(config: Config) -> None:
    """Keep what is compiled in the cache of the settings, and have products as precise as they ask for."""
    folder = cache.user_cache_dir(config.data.cache_dir) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for entry in folder.glob("*-cache"):
        if not entry.stat().st_size:  # of a disk that was full: JAX would compile anew each time, and never mend it
            entry.unlink(missing_ok=True)
    # Short compiles, too: together they are most of the time to the first update of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if config.train.precision == "float32":
        # GPUs and TPUs round the inputs of float32 products otherwise.
        jax.config.update("jax_default_matmul_precision", "highest")
