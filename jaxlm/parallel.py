"""The mesh of devices, and where arrays lie on it: parameters on every device, batches split over them.

The model has no sharding code; XLA's partitioner derives all else from the placement of the inputs.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.errors import UserError


def make_mesh(batch_size: int) -> Mesh:
    """Return a mesh of all devices with one axis, `data`. Raises UserError if they cannot share a batch evenly."""
    n_devices = jax.device_count()
    if batch_size % n_devices:
        lower = batch_size // n_devices * n_devices
        fits = " or ".join(str(n) for n in (lower, lower + n_devices) if n)
        raise UserError(f"train.batch_size={batch_size} is not divisible by the {n_devices} devices; use {fits}")
    return jax.make_mesh((n_devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, Any]:
    """Return the batch on the devices, its `axis` of samples split over them."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
    return jax.device_put(batch, sharding)
