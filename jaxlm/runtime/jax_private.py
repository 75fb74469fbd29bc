"""Private parts of JAX that the package uses: Slurm's address, the key-value store of processes, dead code removal.

A new JAX release may change them; jax_private_test.py tests each one and names the version of JAX that breaks it.
"""

from jax._src.clusters import SlurmCluster
from jax._src.distributed import global_state
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = ["SlurmCluster", "dce_jaxpr", "global_state"]
