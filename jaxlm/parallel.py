"""The mesh of devices and the shardings of arrays: a table from parameters to mesh axes, and batches.

XLA's partitioner derives all communication from the shardings of parameters and batches, and of the few activations
that the model passes to `constrain`. SHARDING.md has examples.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from jaxlm import config as configs
from jaxlm.config import AXES, Config, ModelConfig
from jaxlm.errors import UserError, slow

BATCH = ("data", "fsdp")  # axes that split a batch
_AUTO = (AxisType.Auto,) * len(AXES)  # XLA chooses shardings that `constrain` does not set
# A pattern of a parameter's path, and the axes that split its last dimensions; the first matching row applies.
# `tensor` splits heads, hidden units and vocabulary (Megatron-LM, arXiv 1909.08053, section 3). `fsdp` splits the other
# dimension of each matrix, which is gathered for each use (ZeRO, arXiv 1910.02054, stage 3).
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embedding/token/embedding", ("tensor", "fsdp")),
    ("embedding/(position|segment)", (None, "fsdp")),
    ("(query|key|value|fc1|up)/kernel", ("fsdp", "tensor")),
    ("(query|key|value|fc1|up)/bias", ("tensor",)),
    ("(attention/output|fc2)/kernel", ("tensor", "fsdp")),
    # Adapters are split like their kernels, but not along the rank.
    ("(query|key|value|fc1|up)/lora_a", ("fsdp", None)),
    ("(query|key|value|fc1|up)/lora_b", (None, "tensor")),
    ("(attention/output|fc2)/lora_a", ("tensor", None)),
    ("(attention/output|fc2)/lora_b", (None, "fsdp")),
    ("LanguageModel/head/linear/kernel", ("fsdp", "tensor")),
    ("LanguageModel/head/(linear/)?bias", ("tensor",)),
    ("", ()),  # all others are replicated: norms, other biases, the output layer of a classifier
)


@slow("finding the devices")
def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of the settings, of all devices or of `devices`. Raises UserError as mesh_sizes does."""
    sizes = configs.mesh_sizes(config, len(devices) if devices is not None else jax.device_count())
    # Except on v5e, jax.make_mesh refuses to split a side of the torus between axes, such as 8 of 16 chips.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=_AUTO)


def abstract_mesh(sizes: Iterable[int]) -> AbstractMesh:
    """Return a mesh without devices; `sizes` are those of data, fsdp and tensor."""
    return AbstractMesh(tuple(sizes), AXES, axis_types=_AUTO)


def device_kind(mesh: Mesh) -> str:
    """Return JAX's name for the kind of devices in a mesh."""
    return mesh.devices.flat[0].device_kind


def rule(path: str) -> tuple[str, tuple[str | None, ...]]:
    """Return the row of RULES for a parameter path such as LanguageModel/base/blocks/feed_forward/fc1/kernel."""
    return next(row for row in RULES if re.search(row[0], path))


def shardings(mesh: Mesh, tree: Any, model: str, config: ModelConfig) -> Any:
    """Return a NamedSharding for each array of a tree of parameters or moments; `model` is the name of the model class.

    Raises UserError if the mesh does not divide a dimension.
    """

    def place(path: tuple[Any, ...], x: Any) -> NamedSharding:
        name = _name(model, path)
        axes = rule(name)[1]
        spec = [*[None] * (x.ndim - len(axes)), *axes]
        for size, axis in zip(x.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                sizes = {config.vocab_size: "model.vocab_size", config.d_ff: "model.d_ff"}
                setting = sizes.get(size, "model.d_model")
                raise UserError(
                    f"mesh.{axis}={mesh.shape[axis]}: {name} has the shape {list(x.shape)}, and {size} is not "
                    f"divisible by it; use another mesh.{axis}, or {setting}={_next(config, setting, mesh, axis)}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def rows_of_table(mesh: Mesh, params: Any, model: str) -> list[tuple[str, str, int, int]]:
    """Return rows (path pattern, axes, number of parameters, number per device); axes "": replicated."""
    counts: dict[str, tuple[int, int]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        pattern, axes = rule(_name(model, path))
        total, per_device = counts.get(pattern, (0, 0))
        n_shards = math.prod(mesh.shape[axis] for axis in axes if axis is not None)
        counts[pattern] = (total + x.size, per_device + x.size // n_shards)
    return [
        (pattern or "all else", " x ".join(axis for axis in axes if axis and mesh.shape[axis] > 1), *counts[pattern])
        for pattern, axes in RULES
        if pattern in counts
    ]


def table(mesh: Mesh, params: Any, model: str) -> Table:
    """Return a printable table of how the parameters are split."""
    result = Table("parameters", "split over", "in all", "on a device", title="", title_style="")
    rows = rows_of_table(mesh, params, model)
    for path, axes, total, per_device in rows:
        result.add_row(path, axes or "(replicated)", f"{total:,}", f"{per_device:,}")
    result.add_row("together", "", f"{sum(row[2] for row in rows):,}", f"{sum(row[3] for row in rows):,}")
    return result


def constrain(x: Array, *axes: Any) -> Array:
    """Return `x` with its dimensions split over the given mesh axes; None: not split. Without a mesh, return `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def is_one_device() -> bool:
    """Return whether the current compilation is for one device; it is without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def platform() -> str:
    """Return the platform of the current compilation: cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "cpu" if device.device_kind == "cpu" else "tpu" if device.device_kind.startswith("TPU") else "gpu"


def is_one_cpu() -> bool:
    """Return whether the current compilation is for one CPU device."""
    return is_one_device() and platform() == "cpu"


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device has in full."""
    return NamedSharding(mesh, PartitionSpec())


def local_samples(mesh: Mesh, n: int) -> np.ndarray:
    """Return the indices of the samples, in a batch of `n`, that the devices of this process need."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    ranges = {index[0].indices(n) for index in sharding.addressable_devices_indices_map((n,)).values() if index}
    return np.concatenate([np.arange(*each) for each in sorted(ranges)])


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, Any]:
    """Return the batch on the devices, with `axis` (the samples) split over them; it has only the local samples."""
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    n_shards = math.prod(mesh.shape[name] for name in BATCH)
    n = next(iter(batch.values())).shape[axis] // len(local_samples(mesh, n_shards)) * n_shards
    local = local_samples(mesh, n)

    def put(x: np.ndarray) -> Array:
        def shard(index: Any) -> np.ndarray:
            return x.take(np.searchsorted(local, np.arange(n)[index[axis]]), axis)

        return jax.make_array_from_callback((*x.shape[:axis], n, *x.shape[axis + 1 :]), sharding, shard)

    return {name: put(x) for name, x in batch.items()}


def any_process(mesh: Mesh, function: Callable[..., int]) -> Callable[..., int]:
    """Return a function that returns the largest value of `function` in any process; all have to call it.

    With several processes, it returns the value of the previous call (0 at first), so that no device waits.
    """
    if jax.process_count() == 1:
        return function
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    largest = jax.jit(jnp.max, out_shardings=replicated(mesh))
    pending: dict[Any, Array] = {}

    def ask(*args: Any) -> int:
        value = np.full(1, function(*args), np.int32)
        previous = pending.get(args)
        pending[args] = largest(jax.make_array_from_callback((mesh.size,), sharding, lambda index: value))
        return 0 if previous is None else int(previous)

    return ask


def _name(model: str, path: tuple[Any, ...]) -> str:
    return "/".join([model, *(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))])


def _next(config: ModelConfig, setting: str, mesh: Mesh, axis: str) -> int:
    """Return the next larger value of a setting with which the mesh axis divides all of its dimensions."""
    size = getattr(config, setting.removeprefix("model."))
    multiple = mesh.shape[axis] * (config.n_heads if setting == "model.d_model" else 1)
    return -(-size // multiple) * multiple
