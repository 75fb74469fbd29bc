"""Data parallelism under torchrun: each process has all parameters and a slice of each batch.

Without torchrun there is one process, and the functions here change nothing.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed.nn  # imported later, as DDP does, it would keep the group as a default of its functions
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from jaxlm import config as configs
from jaxlm.config import Config, LogConfig
from jaxlm.data.metrics import LISTED
from jaxlm.errors import CLEANUPS, UserError, slow
from jaxlm.runtime import rendezvous
from jaxlm.runtime.rendezvous import variable


@dataclass(frozen=True)
class Mesh:
    """The place of this process among all of them."""

    rank: int
    size: int
    device: torch.device


@slow("finding the devices and the other processes")
def make_mesh(config: Config) -> Mesh:
    """Join the processes that torchrun started. Raises UserError if they cannot share a batch evenly."""
    size, batch_size = max(variable("WORLD_SIZE", 1), 1), config.train.batch_size
    if config.distributed.coordinator:
        raise UserError(
            f"distributed.coordinator={config.distributed.coordinator}: processes of torchlm find each other by the "
            "variables that torchrun sets; leave it, and start them with torchrun"
        )
    for name, asked in (("fsdp", config.mesh.fsdp), ("tensor", config.mesh.tensor)):
        if asked > 1:
            raise UserError(
                f"mesh.{name}={asked}: torchlm splits only batches, one slice per process; leave it, or use jaxlm"
            )
    if config.mesh.data not in (-1, size):
        raise UserError(f"mesh.data={config.mesh.data}: there are {size} processes; leave it, or start as many")
    if batch_size % size:
        lower = batch_size // size * size
        fits = " or ".join(str(n) for n in (lower, lower + size) if n)
        raise UserError(f"train.batch_size={batch_size} is not divisible by the {size} processes; use {fits}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, n_devices = variable("LOCAL_RANK", 0), torch.cuda.device_count()
        if local >= n_devices:
            raise UserError(f"LOCAL_RANK={local}: this host has {n_devices} GPUs; start as many processes here at most")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    rank = variable("RANK") if size > 1 else 0
    if size > 1 and not dist.is_initialized():
        address = rendezvous.of_torchrun(os.environ.get("MASTER_PORT", ""))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun itself does not listen there
            rendezvous.meet(address, size, rank, config.distributed.timeout_s, "MASTER_ADDR and MASTER_PORT")
        try:
            # Flags of the host go over gloo also where gradients go over NCCL: no wait for the device.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{address}: the processes of the run cannot find each other ({str(error).splitlines()[0]}); "
                "see that MASTER_ADDR and MASTER_PORT are those of process 0, which all hosts have to reach"
            ) from error
    return Mesh(rank, size, device)


def device_kind(mesh: Mesh) -> str:
    """Return the name of the kind of devices that the processes have."""
    return torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else mesh.device.type


def replicated(mesh: Mesh, model: nn.Module) -> nn.Module:
    """Return the model on the device, with the parameters of process 0; gradients are averaged over processes."""
    model = model.to(mesh.device)
    return DistributedDataParallel(model) if mesh.size > 1 else model


def local_samples(mesh: Mesh, n: int) -> np.ndarray:
    """Return the indices of the samples of this process in a batch of `n`."""
    return np.split(np.arange(n), mesh.size)[mesh.rank]


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the batch, which has only the local samples, on the device."""
    tensors = {name: torch.as_tensor(x) for name, x in batch.items()}
    return {name: (x if x.is_floating_point() else x.long()).to(mesh.device) for name, x in tensors.items()}


def any_process(mesh: Mesh, function: Callable[..., int]) -> Callable[..., int]:
    """Return a function that returns the largest value of `function` in any process; all have to call it."""
    if mesh.size == 1:
        return function

    def ask(*args: Any) -> int:
        flag = torch.tensor(int(function(*args)))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    return ask


def mean_of_processes(mesh: Mesh, value: float) -> float:
    """Return the mean of a number over all processes; all have to call it."""
    if mesh.size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / mesh.size


def n_processes() -> int:
    """Return how many processes share a batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def single(model: nn.Module) -> nn.Module:
    """Return the model inside a replicated one."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradients_exchanged(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Return a context for one accumulated batch; gradients are exchanged only with the last one."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        return model.no_sync()
    return contextlib.nullcontext()


def sum_over_processes(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each of the totals, summed over the processes, but a row for each sample where there are such."""
    if not dist.is_initialized():
        return totals
    for name, total in totals.items():
        if name in LISTED:
            rows = [torch.empty_like(total) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, total.contiguous())
            totals[name] = torch.cat(rows)
        else:
            dist.all_reduce(total)
    return totals


def from_first(value: Any) -> Any:
    """Return the value of process 0."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def copy_from_first(mesh: Mesh, model: nn.Module) -> None:
    """Copy all parameters from process 0."""
    if mesh.size > 1:
        for x in model.parameters():
            dist.broadcast(x.data, src=0)


@slow("waiting for the other processes")
def wait(mesh: Mesh) -> None:
    """Wait until every process calls this. Ends this process if process 0, which prints the reason, has ended."""
    try:
        from_first(None)
    except RuntimeError:
        sys.exit(2)


@contextlib.contextmanager
def joined(mesh: Mesh, config: Config) -> Iterator[Config]:
    """Yield the settings for this process; destroy the process group at the end.

    Process 0 has the run folder. The others get a temporary folder and print nothing. Delete replicated models before
    the end: DDP keeps threads of the group, which abort the process if Python exits first.
    """
    with contextlib.ExitStack() as stack:
        if mesh.size > 1:
            stack.callback(dist.destroy_process_group)
        if mesh.rank:
            folder = tempfile.TemporaryDirectory()
            CLEANUPS.append(folder.cleanup)
            stack.callback(CLEANUPS.remove, folder.cleanup)
            config = configs.replace(config, "run.dir", stack.enter_context(folder))
            config = configs.replace(config, "run.checkpoint_dir", "")
            config = configs.replace(config, "log", LogConfig())
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield config
