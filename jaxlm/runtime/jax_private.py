"""All that the package imports of JAX without a promise that the next release has it: address in Slurm, state of the
processes with their key-value store, and removal of unused operations.

`jax_private_test.py` uses each as the package does, and says which version of JAX has broken it.
"""

from jax._src.clusters import SlurmCluster
from jax._src.distributed import global_state
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = ["SlurmCluster", "dce_jaxpr", "global_state"]
