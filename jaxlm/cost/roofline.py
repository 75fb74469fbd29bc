"""Memory, time and cost of a training step on given chips, by the roofline model. Imports no framework.

The roofline (Williams, Waterman, Patterson 2009): an update takes at least as long as its matmuls at the peak rate,
its memory traffic, or its communication, whichever is longest. Other work, such as random numbers, is not included.
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

LOCAL = "local"  # topology: the devices of this machine
PASSES = 6  # bfloat16 matmuls of a TPU for one in float32, at the precision of runtime/backend.py


@dataclass(frozen=True)
class Sent:
    """Bytes that each device sends in an update over some axes of the mesh, and the number of links it can use."""

    kind: str
    axes: str
    n_bytes: int
    n_links: int


@dataclass(frozen=True)
class Step:
    """An update; bytes and flops are per device. None: unknown without compilation, see `missing`."""

    device: str  # JAX's name of it
    n_devices: int
    mesh: dict[str, int]
    n_parameters: int
    weights: int
    moments: int
    activations: int  # of one batch, kept for gradients
    flops: int  # of all matmuls, including those that remat recomputes
    missing: str = ""  # unknown quantities, and why
    too_large: str = ""  # XLA's report if the step does not fit
    batches: int | None = None
    temporary: int | None = None  # XLA's, including activations and gradients
    code: int | None = None
    traffic: int | None = None  # to and from memory
    sent: tuple[Sent, ...] | None = None
    compile_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step on given chips, and the whole training; printed by --json. None: unknown."""

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
    n_bytes: int  # per device: total of the step; a lower bound if it was not compiled
    limit: int | None = None  # memory of a device
    fits: bool | None = None
    compute_s: float | None = None
    memory_s: float | None = None
    interconnect_s: float | None = None
    update_s: float | None = None  # the longest of the three
    bound: str = ""  # its name
    utilization: float | None = None  # model flops divided by peak flops in that time
    n_updates: int
    hours: float | None = None  # of the whole training
    chip_hours: float | None = None
    money: float | None = None  # in the currency of the price


def plan(config: Config, topology: str, step: Step, price: float | None = None) -> Plan:
    """Return the plan of a step; the price is per chip and hour."""
    train, known = config.train, chip(step.device)
    if step.temporary is None:  # gradients are as large as the weights
        n_bytes = step.weights * 2 + step.moments + step.activations
    else:
        n_bytes = step.weights + step.moments + (step.batches or 0) + step.temporary + (step.code or 0)
    result = Plan(
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
        return result
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
        result,
        chip=known.name,
        n_chips=n_chips,
        limit=int(known.hbm_bytes),
        fits=not step.too_large and n_bytes <= known.hbm_bytes,
        compute_s=times["compute"],
        memory_s=times.get("memory"),
        interconnect_s=times.get("interconnect"),
        update_s=times[bound],
        bound=bound,
        utilization=result.model_flops / (step.n_devices * known.flops * times[bound]),
        hours=hours,
        chip_hours=hours * n_chips,
        money=None if price is None else hours * n_chips * price,
    )


def of_json(fields: dict) -> Step:
    """Return a step from the JSON of dataclasses.asdict."""
    sent = fields["sent"]
    return dataclasses.replace(Step(**fields), sent=None if sent is None else tuple(Sent(**x) for x in sent))


def named(topology: str) -> tuple[Chip, int]:
    """Return the chip of a topology, and its number of devices. Raises UserError."""
    version, colon, shape = topology.partition(":")
    known = chip(f"TPU {version}") or chip(version)
    if not colon or known is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise UserError(
            f"--topology {topology}: must be a kind of TPU and its shape, such as v5e:2x4, v6e:16x16 or v5p:4x4x4, or "
            f"{LOCAL}"
        )
    return known, known.devices_per_chip * math.prod(map(int, shape.split("x")))
