"""Compiles the training step ahead of time, for devices that may be absent, and measures it.

search.py runs this module in a separate process for each step: a failing TPU compiler ends its process, and JAX's
configuration is global.
"""

import dataclasses
import importlib.util
import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlm import config as configs
from jaxlm import loop, optim, parallel
from jaxlm.config import Config
from jaxlm.cost import hlo, roofline
from jaxlm.cost.roofline import LOCAL, Sent, Step
from jaxlm.data import packing
from jaxlm.data.cache import Split
from jaxlm.errors import UserError, outside
from jaxlm.params import frozen
from jaxlm.runtime import backend
from jaxlm.runtime.chips import GIB, Chip, chip
from jaxlm.runtime.jax_private import dce_jaxpr
from jaxlm.tasks import TASKS, Task

SPECIAL_TOKENS = ("pad", "mask", "start", "end", "article")  # that samples may contain
PRIME = 7919  # a batch size, since no other dimension of an array is a multiple of it


def measure(config: Config, topology: str) -> Step:
    """Compile the step for a topology such as v5e:16x16, or LOCAL. Raises UserError for settings that cannot work."""
    backend.configure(config)
    if topology != LOCAL and importlib.util.find_spec("libtpu") is None:
        absent, n_devices = roofline.named(topology)
        sizes = configs.mesh_sizes(config, n_devices)
        missing = "memory, traffic and collectives, which XLA reports: pip install 'jaxlm[tpu]' to compile for TPUs"
        return analytic(config, parallel.abstract_mesh(sizes.values()), absent.name, missing)
    devices = _devices(topology)
    mesh = parallel.make_mesh(config, devices)
    step = analytic(config, mesh, devices[0].device_kind)
    known, least = chip(step.device), 2 * step.weights + step.moments  # gradients are as large as weights
    if known and least > known.hbm_bytes:
        reason = f"weights, gradients and moments alone take {least / GIB:.1f} of {known.hbm_bytes / GIB:.0f} GiB"
        return dataclasses.replace(step, too_large=reason)
    update, arguments = abstract_update(config, mesh)
    started_s = time.monotonic()
    try:
        compiled = update.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(step, too_large=_too_large(str(error)))
    memory, program = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    temporary = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    if devices[0].platform == "tpu":  # its temporary arrays reuse the memory of arguments
        temporary = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    return dataclasses.replace(
        step,
        batches=memory.argument_size_in_bytes - step.weights - step.moments,
        temporary=temporary,
        code=memory.generated_code_size_in_bytes,
        traffic=hlo.traffic(program),
        sent=_sent(mesh, program, known),
        compile_s=time.monotonic() - started_s,
    )


def abstract_update(config: Config, mesh: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """Return the jitted function of an update, and its arguments as shapes with their shardings."""
    task = TASKS[config.task](config)
    fresh, compiled = loop.build(config, task, mesh)
    state = jax.tree.map(_shape, jax.eval_shape(fresh), compiled.shardings)
    sharding = NamedSharding(mesh, PartitionSpec(None, parallel.BATCH))
    sizes = (config.train.accumulate, config.train.batch_size)
    batches = {name: _shape(x, sharding) for name, x in batch(task, sizes).items()}
    key = _shape(jax.eval_shape(lambda: jax.random.key(0)), parallel.replicated(mesh))
    return compiled.update, (state, batches, key)


def batch(task: Task, sizes: Sequence[int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a task's batch with the given leading sizes."""
    two = Split(np.zeros(2, np.int32), np.arange(3), np.zeros(2, np.int32), np.ones(2, np.int64))  # which may be a pair
    specials = {role: i for i, role in enumerate(SPECIAL_TOKENS)}
    samples = packing.samples_of(task.samples, two, task.config, specials, task.config.model.vocab_size)
    found = samples.batch(np.zeros(1, int), np.zeros(1, int))
    return {name: jax.ShapeDtypeStruct((*sizes, *x.shape[1:]), x.dtype) for name, x in found.items()}


def analytic(config: Config, mesh: Mesh | AbstractMesh, device: str, missing: str = "") -> Step:
    """Return what is known about a step without compiling it."""
    update, (state, batches, key) = abstract_update(config, mesh)
    first, second, _ = optim.moments(state.opt_state)
    weights, moments = _n_bytes(state.params), _n_bytes(first) + _n_bytes(second)
    return Step(
        device=device,
        n_devices=mesh.size,
        mesh=dict(mesh.shape),
        n_parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        weights=weights,
        moments=moments,
        activations=activations(config, mesh.shape),
        flops=product_flops(needed(update.trace(state, batches, key).jaxpr.jaxpr)) // mesh.size,
        missing=missing,
    )


def activations(config: Config, mesh: Mapping[str, int]) -> int:
    """Return the bytes per device of the activations of a batch that JAX keeps for gradients.

    Arrays with heads, hidden units or the vocabulary are split over tensor. XLA may keep less, because it fuses.
    """
    task = TASKS[config.task](config)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: task.build_model(nnx.Rngs(0))), nnx.Param)
    shapes, key = batch(task, (PRIME,)), jax.eval_shape(lambda: jax.random.key(0))

    def kept(params: Any, batch: Any, key: Any) -> Any:
        def loss(trained: Any) -> Any:
            return task.loss(nnx.merge(graphdef, frozen.with_trained(params, trained)), batch, key)["loss"]

        return jax.tree.leaves(jax.vjp(loss, frozen.trained(config.model, params))[1])

    jaxpr = jax.make_jaxpr(kept)(nnx.to_pure_dict(params), shapes, key).jaxpr
    split = {config.model.n_heads, config.model.kv_heads, config.model.n_hidden, config.model.vocab_size}
    total = 0
    for x in {id(x): x for x in jaxpr.outvars if x not in jaxpr.invars}.values():
        others = [size for size in x.aval.shape if size % PRIME]
        if len(others) < len(x.aval.shape):
            n_bytes = x.aval.size // PRIME * x.aval.dtype.itemsize
            total += n_bytes // (mesh["tensor"] if split.intersection(others) else 1)
    return total * config.train.batch_size // (mesh["data"] * mesh["fsdp"])


def needed(jaxpr: Jaxpr) -> Jaxpr:
    """Return a jaxpr without dead code, such as the gradients of frozen weights."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def product_flops(jaxpr: Any) -> int:
    """Return the flops of all matmuls in a jaxpr; those in loops count for each iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * result.size * math.prod(left.shape[i] for i in contracted)
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        for x in inner:
            if isinstance(x, Jaxpr | ClosedJaxpr):
                total += _times(equation) * product_flops(x.jaxpr if isinstance(x, ClosedJaxpr) else x)
    return total


def _times(equation: Any) -> int:
    """Return how often an equation, such as a loop or a Pallas kernel, runs the jaxpr in it."""
    params = equation.params
    if equation.primitive.name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params["mesh"].size if equation.primitive.name == "shard_map" else params.get("length", 1)


def _devices(topology: str) -> Sequence[Any]:
    if topology == LOCAL:
        return jax.devices()
    roofline.named(topology)
    # JAX treats the two cores of a v4 as one device, as on real hardware.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except Exception as error:  # of several classes
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topology {topology}: {reason}; use one such as v5e:2x4, v6e:16x16 or v5p:4x4x4") from error


def _shape(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _n_bytes(tree: Any) -> int:
    """Return the bytes per device of a tree of arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _sent(mesh: Mesh, program: hlo.Program, known: Chip | None) -> tuple[Sent, ...]:
    sums: dict[tuple[str, str, int], int] = defaultdict(int)
    for x in hlo.collectives(program):
        links = n_links(mesh, x.group, known) if known else 1
        sums[x.kind, " x ".join(hlo.axes(x.group, mesh.shape)), links] += x.n_bytes
    return tuple(Sent(kind, axes, n, links) for (kind, axes, links), n in sums.items())


def n_links(mesh: Mesh, group: Sequence[int], known: Chip) -> int:
    """Return the number of links over which a device can send to its group; 0: the group is on one chip.

    A device has two links along each dimension of the TPU's torus that its group extends over, one in each direction.
    It has one if the dimension does not wrap around or the group does not fill it. Slices of v5e and v6e wrap around in
    dimensions of 16 chips; three-dimensional slices do if all dimensions are multiples of 4.
    """
    devices = mesh.devices.ravel()
    if not hasattr(devices[0], "coords"):
        return known.n_links
    coords = np.array([device.coords for device in devices])
    shape, along = coords.max(axis=0) + 1, [len(set(column)) for column in coords[list(group)].T.tolist()]
    is_torus = all(size % 4 == 0 for size in shape)
    goes_around = [size == 16 if known.n_links == 4 else is_torus for size in shape]
    return sum(
        2 if around and n == size else 1 for n, size, around in zip(along, shape, goes_around, strict=True) if n > 1
    )


def _too_large(error: str) -> str:
    """Return XLA's report on a step that does not fit: total size, and the largest arrays."""
    line = next((line for line in error.splitlines() if "RESOURCE_EXHAUSTED" in line), error)
    sizes = re.findall(r"Size: ([\d.]+[KMG]).*?(?:op_name=\"([^\"]*)\".*?)?Shape: (\S+)", error, re.DOTALL)
    largest = [f"{shape} ({size}{f', {name}' if name else ''})" for size, name, shape in sizes[:3]]
    return line.partition("RESOURCE_EXHAUSTED: ")[2] + (f" Largest: {'; '.join(largest)}" if largest else "")


def main() -> None:
    """Read {"settings", "topology"} from standard input, and write the Step, or an "error", as JSON."""
    asked = json.load(sys.stdin)
    try:
        result = dataclasses.asdict(measure(configs.build(asked["settings"]), asked["topology"]))
    except Exception as error:
        result = {"error": str(error) if isinstance(error, UserError) else outside(error)}
        if not result["error"]:
            raise
    print(json.dumps(result))


if __name__ == "__main__":
    main()
