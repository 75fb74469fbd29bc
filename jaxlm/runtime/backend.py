"""JAX's configuration, set once before anything is compiled."""

import os

import jax

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.io import temporary

# Flags that libtpu's compiler reads when it is loaded. First: its threads overflow their stacks when they compile
# dropout on large attention. Second: if fsdp splits the contracted axis of a matmul, it would send shards around and
# add each product in memory instead of gathering the matrix: for gpt_1b on 32 chips of v5e, 3.8 times the memory
# traffic and 1.7 times the bytes sent (compiled, not run).
LIBTPU_FLAGS = "--fibers_default_thread_stack_size=67108864 --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"

# Values of JAX's settings with which no step can be compiled or run. All others are the user's choice.
GUARDS = ("", "_host_to_device", "_device_to_device", "_device_to_host")
UNUSABLE = {
    "jax_disable_jit": (True,),
    "jax_numpy_dtype_promotion": ("strict",),
    **{f"jax_transfer_guard{name}": ("disallow", "disallow_explicit") for name in GUARDS},
}


def configure(config: Config) -> None:
    """Set the compilation cache and the precision of matmuls. Raises UserError for JAX settings that cannot work."""
    for name, values in UNUSABLE.items():
        value = getattr(jax.config, name)
        if getattr(value, "value", value) in values:  # some are enums
            raise UserError(
                f"{name.upper()}={os.environ.get(name.upper(), value)} in the environment: no step can run with it; "
                "unset it"
            )
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    if LIBTPU_FLAGS not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{LIBTPU_FLAGS} {given}"  # the last value of a flag applies
    folder = (temporary.user_cache_dir(config.data.cache_dir) / "xla").absolute()
    if not configs.is_unicode(str(folder)):
        raise UserError(
            f"{str(folder)!r}: has bytes that are not UTF-8, so JAX cannot use it as a cache; give another "
            "folder with --data.cache-dir"
        )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for entry in folder.glob("*-cache"):
        if not entry.stat().st_size:  # an empty file from a full disk: JAX would recompile each time
            entry.unlink(missing_ok=True)
    # Cache short compilations, too: together they dominate the time to the first update of a small model.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if config.train.precision == "float32":
        # By default, GPUs and TPUs round the inputs of float32 matmuls.
        jax.config.update("jax_default_matmul_precision", "highest")
