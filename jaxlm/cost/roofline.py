"""Memory, time and cost of a training step on given chips, by the roofline model. Imports no framework.

The roofline (Williams, Waterman, Patterson 2009): an update takes at least as long as its matmuls at the peak rate,
its memory traffic, or its communication, whichever is the longest. All else, such as random numbers and data, comes
on top.
"""

import dataclasses
import math
import re
from dataclasses import dataclass

from jaxlm.config import Config
from jaxlm.data.position import Position
from jaxlm.errors import UserError
from jaxlm.runtime.chips import Chip, chip
from jaxlm.tasks import flops

LOCAL = "local"  # the topology that is the devices of this machine
PASSES = 6  # bfloat16 matmuls of a TPU for one in float32, at the precision of runtime/backend.py


@dataclass(frozen=True)
class Sent:
    """What each device sends in an update over some axes of the mesh, and how many links its group can use."""

    kind: str
    axes: str
    n_bytes: int
    n_links: int


@dataclass(frozen=True)
class Step:
    """An update on each device; bytes and flops are those of one device. None: it was not compiled, see `missing`."""

    device: str  # JAX's name of it
    n_devices: int
    mesh: dict[str, int]
    n_parameters: int
    weights: int
    moments: int
    activations: int  # that JAX keeps of one batch for its gradients
    flops: int  # of all matmuls, with those that remat recomputes
    missing: str = ""  # of the plan, and why
    too_large: str = ""  # what XLA reports where the step does not fit
    batches: int | None = None
    temporary: int | None = None  # XLA's, activations and gradients among it
    code: int | None = None
    traffic: int | None = None  # to and from memory
    sent: tuple[Sent, ...] | None = None
    compile_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step on chips, up to the end of its schedule; what --json prints. None: not known."""

    step: Step
    task: str
    topology: str
    chip: str
    n_chips: int
    batch_size: int
    accumulate: int
    remat: str
    tokens: int  # of an update
    model_flops: int  # of an update, over all devices
    n_bytes: int  # of a device: all that the step holds; where it was not compiled, what it cannot do without
    limit: int | None = None  # of a device
    fits: bool | None = None
    compute_s: float | None = None
    memory_s: float | None = None
    interconnect_s: float | None = None
    update_s: float | None = None  # the longest of the three
    bound: str = ""  # which of them that is
    utilization: float | None = None  # model flops against the peak, over that time
    n_updates: int
    hours: float | None = None  # to the end of the schedule
    chip_hours: float | None = None
    money: float | None = None  # in the currency of the price


def plan(config: Config, topology: str, step: Step, price: float | None = None) -> Plan:
    """Return the plan of a step; the price is that of one chip for an hour."""
    train, known = config.train, chip(step.device)
    if step.temporary is None:  # gradients are as large as the weights
        n_bytes = step.weights * 2 + step.moments + step.activations
    else:
        n_bytes = step.weights + step.moments + (step.batches or 0) + step.temporary + (step.code or 0)
    found = Plan(
        step=step,
        task=config.task,
        topology=topology,
        chip=step.device,
        n_chips=step.n_devices,
        batch_size=train.batch_size,
        accumulate=train.accumulate,
        remat=config.model.remat,
        tokens=train.batch_size * train.accumulate * config.model.seq_len,
        model_flops=flops.flops_per_update(config),
        n_bytes=n_bytes,
        fits=False if step.too_large else None,
        n_updates=train.max_steps,
    )
    if known is None:
        return found
    passes = PASSES if train.precision == "float32" and known.name.startswith("TPU") else 1
    times = {"compute": passes * step.flops / known.flops}
    if step.traffic is not None and step.sent is not None:
        times["memory"] = step.traffic / known.hbm_bytes_per_s
        times["interconnect"] = sum(x.n_bytes / (x.n_links * known.link_bytes_per_s) for x in step.sent if x.n_links)
    bound = max(times, key=lambda name: times[name])
    # Updates of the original's cycle take one or two batches.
    n_batches = Position().first(train.max_steps, train) / train.batch_size / train.accumulate
    hours, n_chips = times[bound] * n_batches / 3600, step.n_devices // known.devices_per_chip
    return dataclasses.replace(
        found,
        chip=known.name,
        n_chips=n_chips,
        limit=int(known.hbm_bytes),
        fits=not step.too_large and n_bytes <= known.hbm_bytes,
        compute_s=times["compute"],
        memory_s=times.get("memory"),
        interconnect_s=times.get("interconnect"),
        update_s=times[bound],
        bound=bound,
        utilization=found.model_flops / (step.n_devices * known.flops * times[bound]),
        hours=hours,
        chip_hours=hours * n_chips,
        money=None if price is None else hours * n_chips * price,
    )


def of_json(found: dict) -> Step:
    """Return the step that dataclasses.asdict has turned into JSON."""
    sent = found["sent"]
    return dataclasses.replace(Step(**found), sent=None if sent is None else tuple(Sent(**x) for x in sent))


def named(topology: str) -> tuple[Chip, int]:
    """Return the chip of a topology, and how many devices it has."""
    version, colon, shape = topology.partition(":")
    found = chip(f"TPU {version}") or chip(version)
    if not colon or found is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise UserError(
            f"--topology {topology}: it has to be a kind of TPU and its shape, such as v5e:2x4, v6e:16x16 or "
            f"v5p:4x4x4, or {LOCAL}"
        )
    return found, found.devices_per_chip * math.prod(map(int, shape.split("x")))
