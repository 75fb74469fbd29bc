"""Runs of several processes: how they join, exchange values, and end together. SHARDING.md has examples.

Process 0 owns the run folder and prints all output, also errors of the others. With one process, these functions do
nothing.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import config as configs
from jaxlm.config import Config, LogConfig
from jaxlm.errors import CLEANUPS, UserError, reported, slow
from jaxlm.io import storage
from jaxlm.runtime import rendezvous
from jaxlm.runtime.jax_private import SlurmCluster, global_state
from jaxlm.runtime.rendezvous import variable

FOREVER_MS = 7 * 24 * 3600 * 1000  # waits need no timeout: if another process fails, _Watch ends this one
HEARTBEAT_S, SILENT_S = 1.0, 30.0  # between heartbeats; a process without one for SILENT_S is lost
GRACE_S = 5.0  # how long an ending process waits for the others to notice
_calls = itertools.count()  # numbers the keys of exchanges: all processes make the same calls in the same order


@contextlib.contextmanager
def joined(config: Config, identity: Mapping[str, Any]) -> Iterator[Config]:
    """Join the other processes of the run, if there are any; yield the settings of this process.

    Processes other than 0 get a temporary run folder and print nothing. `identity` is compared as in check_same. If one
    process fails, process 0 prints why, and all end with the same exit status. Raises UserError if they cannot join.
    """
    if not _initialize(config):
        yield config
        return
    with contextlib.ExitStack() as stack:
        printed = io.StringIO()
        if is_first():
            is_first_here()  # called first by process 0, which then builds the caches and shows progress
        else:
            folder = tempfile.TemporaryDirectory()
            CLEANUPS.append(folder.cleanup)
            stack.callback(CLEANUPS.remove, folder.cleanup)
            own = configs.replace(config, "run.dir", stack.enter_context(folder))
            own = configs.replace(own, "run.checkpoint_dir", "")
            own = configs.replace(own, "log", LogConfig())
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(contextlib.redirect_stderr(printed))
        watch = _Watch()
        CLEANUPS.append(watch.interrupted)
        stack.callback(CLEANUPS.remove, watch.interrupted)
        try:
            with reported(config.debug):
                check_same(identity)
                yield config if is_first() else own
            watch.stop()
        except SystemExit as ending:  # a UserError, which `reported` has printed
            error = re.search(r"^(error: |Traceback).*", printed.getvalue(), re.M | re.S)  # skips notes and warnings
            watch.end(int(ending.code or 0), error[0] if error else "")
        except Exception as error:
            watch.wait_for_the_cause(error)
            traceback.print_exc()
            watch.end(1, printed.getvalue())
    jax.distributed.shutdown()


def is_first() -> bool:
    """Return whether this is process 0."""
    return global_state.process_id == 0


def is_first_here() -> bool:
    """Return whether this process was the first on its host to call this. It then builds the caches for that host."""
    if global_state.client is None:
        return True
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
        global_state.client.key_value_set(f"builder/{socket.gethostname()}", str(global_state.process_id))
    return global_state.client.key_value_try_get(f"builder/{socket.gethostname()}") == str(global_state.process_id)


def from_first(value: Any) -> Any:
    """Return the `value` of process 0, in every process. It must be JSON."""
    if global_state.client is None:
        return value
    key = f"first/{next(_calls)}"
    if is_first():
        global_state.client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(global_state.client.blocking_key_value_get(key, FOREVER_MS))


def mean(value: float) -> Any:
    """Return the mean of a number over all processes, without waiting for it. Every process must call this."""
    if jax.process_count() == 1:
        return value
    sharding, reduced = _reduced_mean()
    array = jax.make_array_from_callback((jax.device_count(),), sharding, lambda index: np.full(1, value, np.float32))
    return reduced(array)


@functools.cache
def _reduced_mean() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    return NamedSharding(mesh, PartitionSpec("devices")), jax.jit(
        jnp.mean, out_shardings=NamedSharding(mesh, PartitionSpec())
    )


@slow("waiting for the other processes")
def wait() -> None:
    """Wait until every process calls this."""
    if global_state.client is not None:
        global_state.client.wait_at_barrier(f"wait/{next(_calls)}", FOREVER_MS)


def check_same(values: Mapping[str, Any]) -> None:
    """Raise UserError if a value differs from that of process 0. Values are compared as JSON."""
    mine = json.loads(json.dumps(values))
    for name, first in from_first(mine).items():
        if mine.get(name) != first:
            raise UserError(
                f"{name} is {mine.get(name)!r} here, but {first!r} in process 0; give all processes the same value"
            )


def shared(folder: Path) -> Path:
    """Return the checkpoint folder of process 0. Raises UserError if this process does not see it."""
    if global_state.client is None:
        return folder
    folder = storage.path(from_first(str(storage.absolute(folder))))
    if storage.is_remote(folder):
        return folder
    mark = Path(from_first(str(folder / f".seen-by-all.{os.getpid()}")))
    with contextlib.ExitStack() as stack:
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
            unlink = functools.partial(mark.unlink, missing_ok=True)
            CLEANUPS.insert(0, unlink)  # runs before the cleanup that removes the run folder
            stack.callback(CLEANUPS.remove, unlink)
            stack.callback(unlink)
        wait()
        is_seen = mark.exists()
        wait()
    if not is_seen:
        raise UserError(
            f"{folder}: this process cannot see this folder of process 0; give a shared folder, or gs://, with "
            "--run.checkpoint-dir"
        )
    return folder


class _Watch:
    """Sends heartbeats, and ends this process when another one fails.

    JAX's own heartbeats (heartbeat_timeout_seconds) are not enough: when one process stops, JAX 0.10 aborts the others
    with a stack dump and status 134, without cleanups. They are still used to detect the loss of process 0.
    """

    def __init__(self) -> None:
        self.rank, self.size = global_state.process_id, global_state.num_processes
        self.client: Any = global_state.client
        self.stderr = sys.__stderr__
        self.is_ending = threading.Lock()
        self.stopped = threading.Event()
        self.heartbeats: dict[str, tuple[str, float]] = {}  # the last one of each process, and when it arrived
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop watching at the end of the run."""
        wait()
        self.stopped.set()
        self.thread.join()

    def interrupted(self) -> None:
        """Tell the other processes that a signal ends this one before training."""
        self._publish(143, "interrupted before training\n")
        self._announce_end()

    def end(self, status: int, text: str) -> None:
        """End this process and all others because of the error `text`. Does not return."""
        self._publish(status, text)
        if self.rank and not self._have_left("left/0", 1):  # process 0 should have printed the error
            print(text, end="", file=self.stderr, flush=True)
        self._leave(status)

    def wait_for_the_cause(self, error: Exception) -> None:
        """After a network error, wait for the watching thread to end this process; process 0 then names lost ones."""
        if not any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")):
            return
        if self.rank:
            time.sleep(2 * SILENT_S)
        time.sleep(4 * HEARTBEAT_S)
        for rank, (_, heard_s) in self.heartbeats.items():
            if time.monotonic() - heard_s > 3 * HEARTBEAT_S:
                self._lost(rank)

    def _run(self) -> None:
        for n in itertools.count():
            try:
                self.client.key_value_set(f"heartbeat/{self.rank}", str(n), allow_overwrite=True)
                if ended := self.client.key_value_dir_get("ended/"):
                    self._follow(json.loads(ended[0][1]))
                heartbeats = [] if self.rank else self.client.key_value_dir_get("heartbeat/")
            except jax.errors.JaxRuntimeError as error:
                if not self.stopped.is_set():
                    print(
                        f"error: process {self.rank}: process 0, on {global_state.coordinator_address}, is lost "
                        f"({str(error).splitlines()[0]}); resume with --resume auto",
                        file=self.stderr,
                        flush=True,
                    )
                    os._exit(1)
                return
            for key, heartbeat in heartbeats:
                rank = key.rpartition("/")[2]
                if heartbeat != self.heartbeats.get(rank, ("", 0.0))[0]:
                    self.heartbeats[rank] = (heartbeat, time.monotonic())
                elif time.monotonic() - self.heartbeats[rank][1] > SILENT_S:
                    self._lost(rank)
            if self.stopped.wait(HEARTBEAT_S):
                return

    def _lost(self, rank: str) -> None:
        text = f"error: process {rank} is lost: it sends no heartbeats; resume with --resume auto\n"
        print(text, end="", file=self.stderr, flush=True)
        self._publish(1, text)
        self._leave(1)

    def _publish(self, status: int, text: str) -> None:
        report = {"rank": self.rank, "host": socket.gethostname(), "status": status, "text": text}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process has ended the run before
            self.client.key_value_set("ended/0", json.dumps(report))

    def _follow(self, report: dict[str, Any]) -> None:
        """End this process because another has failed; process 0 prints why."""
        if report["rank"] == self.rank:
            return
        if self.rank == 0:
            time.sleep(2 * HEARTBEAT_S)  # process 0 may have the same error, and print it itself
            if self.is_ending.locked():
                return
            text = report["text"].strip("\n").removeprefix("error: ") or "it ended"
            print(f"error: process {report['rank']} ({report['host']}): {text}", file=self.stderr, flush=True)
        self._leave(report["status"])

    def _leave(self, status: int) -> None:
        """End this process without atexit handlers, which would wait for lost processes."""
        if not self.is_ending.acquire(blocking=False):
            time.sleep(FOREVER_MS / 1000)  # until another thread ends the process
        for clean in list(CLEANUPS):
            if clean != self.interrupted:
                clean()
        if sys.stdout.isatty():
            print("\033[?25h", end="")  # show the cursor, which a progress bar hides
        self._announce_end()
        sys.stdout.flush()
        os._exit(status)

    def _announce_end(self) -> None:
        """Tell the other processes that this one ends; process 0, which has the key-value store, waits for them."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is lost
            self.client.key_value_set(f"left/{self.rank}", "")
        if self.rank == 0:
            self._have_left("left/", self.size)

    def _have_left(self, prefix: str, n: int) -> bool:
        """Return whether, within GRACE_S, `n` processes announce their end by keys with this prefix."""
        until_s = time.monotonic() + GRACE_S
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while time.monotonic() < until_s:
                if sum(key.startswith(prefix) for key, _ in self.client.key_value_dir_get("left/")) >= n:
                    return True
                time.sleep(0.1)
        return False


@slow("joining the other processes")
def _initialize(config: Config) -> bool:
    """Join the other processes; return whether there are any."""
    arguments = _arguments(config)
    if arguments is None:
        return False
    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would replace ours
    if arguments:
        address, n_processes, process = (arguments[x] for x in ("coordinator_address", "num_processes", "process_id"))
        rendezvous.meet(address, n_processes, process, config.distributed.timeout_s)
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        if not arguments:  # a single TPU VM
            return False
        raise UserError(
            f"JAX cannot join the processes ({error}); check the variables JAX_* in the environment"
        ) from error
    except RuntimeError as error:
        where = arguments.get("coordinator_address", "process 0")
        raise UserError(
            f"{where}: the processes of the run cannot find each other ({str(error).splitlines()[0]}); "
            "start all of them with the address of process 0, and make sure that it is reachable"
        ) from error
    return global_state.num_processes > 1


def _arguments(config: Config) -> dict[str, Any] | None:
    """Return the arguments for jax.distributed.initialize; None if this process is the only one."""
    given = config.distributed
    if given.coordinator:
        return _explicit(given.coordinator, given.n_processes, given.process)
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return _explicit(address, variable("JAX_NUM_PROCESSES"), variable("JAX_PROCESS_ID"))
    if "MASTER_ADDR" in os.environ and (size := variable("WORLD_SIZE", 1)) > 1:
        # torchrun's agent listens at MASTER_PORT itself.
        port = variable("MASTER_PORT") + ("TORCHELASTIC_RUN_ID" in os.environ)
        arguments = _explicit(rendezvous.of_torchrun(port), size, variable("RANK"))
        if variable("LOCAL_WORLD_SIZE", 1) > 1:
            arguments["local_device_ids"] = variable("LOCAL_RANK")
        return arguments
    has_tpu = importlib.util.find_spec("libtpu") and (os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"))
    if has_tpu and os.environ.get("JAX_PLATFORMS", "tpu") != "cpu":
        return {}  # JAX detects everything itself
    if variable("SLURM_STEP_NUM_TASKS", 1) > 1 and SlurmCluster.is_env_present():
        address = SlurmCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
        arguments = _explicit(address, variable("SLURM_NTASKS"), variable("SLURM_PROCID"))
        if "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            arguments["local_device_ids"] = variable("SLURM_LOCALID")
        return arguments
    return None


def _explicit(address: str, n_processes: int, process: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"coordinator_address": address, "num_processes": n_processes, "process_id": process}
    return arguments | {"cluster_detection_method": "deactivate"}
