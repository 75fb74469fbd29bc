"""The processes of a run as one: how they find each other, what they tell each other, and how they end together.

The first process has the run folder, prints and writes; the others work beside it, and what goes wrong in them is told
by the first. With one process, every function here does nothing. SHARDING.md has examples.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src.clusters import SlurmCluster
from jax._src.distributed import global_state  # its key-value store has no public name

from jaxlm import config as configs
from jaxlm.config import Config, LogConfig
from jaxlm.errors import CLEANUPS, UserError, reported, slow
from jaxlm.io import storage
from jaxlm.runtime import rendezvous
from jaxlm.runtime.rendezvous import variable

FOREVER_MS = 7 * 24 * 3600 * 1000  # who waits longer for another is ended by what ends the other
PULSE_S, SILENT_S = 1.0, 30.0  # between the signs of life of a process, and how long one may be without
GRACE_S = 5.0  # for others to hear of the end
_calls = itertools.count()  # all processes make the same calls in the same order


@contextlib.contextmanager
def joined(config: Config, identity: Mapping[str, Any]) -> Iterator[Config]:
    """Join the other processes of the run, if there are any, and part at the end; `identity` is as in check_same.

    The first has the run folder; the others get settings with a folder that vanishes, and print nothing. If one fails,
    all end, with its exit status, after the first has told why. Raises UserError if they cannot find each other.
    """
    if not _initialize(config):
        yield config
        return
    with contextlib.ExitStack() as stack:
        printed = io.StringIO()
        if is_first():
            is_first_here()  # so that the one that shows its progress builds the caches
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
        except SystemExit as ending:  # a UserError
            error = re.search(r"^(error: |Traceback).*", printed.getvalue(), re.M | re.S)  # behind notes and warnings
            watch.end(int(ending.code or 0), error[0] if error else "")
        except Exception as error:
            watch.wait_for_the_cause(error)
            traceback.print_exc()
            watch.end(1, printed.getvalue())
    jax.distributed.shutdown()


def is_first() -> bool:
    """Return whether this process has the run folder."""
    return global_state.process_id == 0


def is_first_here() -> bool:
    """Return whether this process is to build caches before the others of its machine; the first to ask is."""
    if global_state.client is None:
        return True
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # it has been set
        global_state.client.key_value_set(f"builder/{socket.gethostname()}", str(global_state.process_id))
    return global_state.client.key_value_try_get(f"builder/{socket.gethostname()}") == str(global_state.process_id)


def from_first(value: Any) -> Any:
    """Return the first process's value, which JSON can have."""
    if global_state.client is None:
        return value
    key = f"first/{next(_calls)}"
    if is_first():
        global_state.client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(global_state.client.blocking_key_value_get(key, FOREVER_MS))


@slow("waiting for the other processes")
def wait() -> None:
    """Wait until every process is here."""
    if global_state.client is not None:
        global_state.client.wait_at_barrier(f"wait/{next(_calls)}", FOREVER_MS)


def check_same(values: Mapping[str, Any]) -> None:
    """Raise UserError if a value, which JSON can have, is another than in the first process."""
    mine = json.loads(json.dumps(values))
    for name, wanted in from_first(mine).items():
        if mine.get(name) != wanted:
            raise UserError(
                f"{name} is {mine.get(name)!r} here, but {wanted!r} in process 0; give all processes the same"
            )


def shared(folder: Path) -> Path:
    """Return the first process's folder for checkpoints. Raises UserError if this one does not see it."""
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
            CLEANUPS.insert(0, unlink)  # before the one that removes the folder of a run that did not start
            stack.callback(CLEANUPS.remove, unlink)
            stack.callback(unlink)
        wait()
        is_seen = mark.exists()
        wait()
    if not is_seen:
        raise UserError(
            f"{folder}: this folder of process 0 is not to be seen here; give one that all processes share, or gs://, "
            "with --run.checkpoint-dir"
        )
    return folder


class _Watch:
    """Tells the others that this process lives, and ends it when one of them fails."""

    def __init__(self) -> None:
        self.rank, self.size = global_state.process_id, global_state.num_processes
        self.client: Any = global_state.client
        self.stderr = sys.__stderr__
        self.is_ending = threading.Lock()
        self.stopped = threading.Event()
        self.pulses: dict[str, tuple[str, float]] = {}  # by process: the last one, and when it came
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Look no longer: the run is over."""
        wait()
        self.stopped.set()
        self.thread.join()

    def interrupted(self) -> None:
        """Tell the others that a signal ends this process before training."""
        self._publish(143, "interrupted before training\n")
        self._part()

    def end(self, status: int, text: str) -> None:
        """End this process, and all others; `text` is what went wrong here. Does not return."""
        self._publish(status, text)
        if self.rank and not self._have_left("left/0", 1):
            print(text, end="", file=self.stderr, flush=True)  # which the first was to tell
        self._leave(status)

    def wait_for_the_cause(self, error: Exception) -> None:
        """After an error of the network, wait for what is behind it: that of another process, or that one has gone."""
        if not any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")):
            return
        if self.rank:
            time.sleep(2 * SILENT_S)
        time.sleep(4 * PULSE_S)
        for rank, (_, heard_s) in self.pulses.items():
            if time.monotonic() - heard_s > 3 * PULSE_S:
                self._lost(rank)

    def _run(self) -> None:
        for n in itertools.count():
            try:
                self.client.key_value_set(f"pulse/{self.rank}", str(n), allow_overwrite=True)
                if ended := self.client.key_value_dir_get("ended/"):
                    self._follow(json.loads(ended[0][1]))
                pulses = dict(self.client.key_value_dir_get("pulse/")) if self.rank == 0 else {}
            except jax.errors.JaxRuntimeError as error:
                if not self.stopped.is_set():
                    print(
                        f"error: process {self.rank}: process 0, on {global_state.coordinator_address}, has gone "
                        f"({str(error).splitlines()[0]}); go on with --resume auto",
                        file=self.stderr,
                        flush=True,
                    )
                    os._exit(1)
                return
            for key, pulse in pulses.items():
                rank = key.rpartition("/")[2]
                if pulse != self.pulses.get(rank, ("", 0.0))[0]:
                    self.pulses[rank] = (pulse, time.monotonic())
                elif time.monotonic() - self.pulses[rank][1] > SILENT_S:
                    self._lost(rank)
            if self.stopped.wait(PULSE_S):
                return

    def _lost(self, rank: str) -> None:
        text = f"error: process {rank} has gone without a word; go on with --resume auto\n"
        print(text, end="", file=self.stderr, flush=True)
        self._publish(1, text)
        self._leave(1)

    def _publish(self, status: int, text: str) -> None:
        told = {"rank": self.rank, "host": socket.gethostname(), "status": status, "text": text}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another has ended the run before
            self.client.key_value_set("ended/0", json.dumps(told))

    def _follow(self, told: dict[str, Any]) -> None:
        """End this process because another has failed; the first tells why."""
        if told["rank"] == self.rank:
            return
        if self.rank == 0:
            time.sleep(2 * PULSE_S)  # it may have failed in the same way, and tell of that itself
            if self.is_ending.locked():
                return
            lines = told["text"].splitlines() or ["it ended"]
            name = f"process {told['rank']} ({told['host']}): "
            lines[0] = f"error: {name}{lines[0].removeprefix('error: ')}"
            print("\n".join(lines), file=self.stderr, flush=True)
        self._leave(told["status"])

    def _leave(self, status: int) -> None:
        """End this process without its atexit calls, which would wait for processes that are gone."""
        if not self.is_ending.acquire(blocking=False):
            time.sleep(FOREVER_MS)  # another thread is about to
        for clean in list(CLEANUPS):
            if clean != self.interrupted:
                clean()
        if sys.stdout.isatty():
            print("\033[?25h", end="")  # the cursor, which a progress bar hides
        self._part()
        sys.stdout.flush()
        os._exit(status)

    def _part(self) -> None:
        """Say that this process leaves; the first waits for the others, since what it has told goes with it."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first has gone
            self.client.key_value_set(f"left/{self.rank}", "")
        if self.rank == 0:
            self._have_left("left/", self.size)

    def _have_left(self, prefix: str, n: int) -> bool:
        """Return whether so many processes leave within a while."""
        began_s = time.monotonic()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            while time.monotonic() - began_s < GRACE_S:
                if sum(key.startswith(prefix) for key, _ in self.client.key_value_dir_get("left/")) >= n:
                    return True
                time.sleep(0.1)
        return False


@slow("joining the other processes")
def _initialize(config: Config) -> bool:
    """Join the other processes, and return whether there are any."""
    place = _place(config)
    if place is None:
        return False
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    if place:
        address, n_processes, process = (place[x] for x in ("coordinator_address", "num_processes", "process_id"))
        rendezvous.meet(address, n_processes, process, config.distributed.timeout_s)
    try:
        jax.distributed.initialize(**place)
    except ValueError as error:
        if not place:  # a TPU VM that is no cluster
            return False
        raise UserError(
            f"JAX cannot join the processes ({error}); see the variables JAX_* in the environment"
        ) from error
    except RuntimeError as error:
        where = place.get("coordinator_address", "process 0")
        raise UserError(
            f"{where}: the processes of the run cannot find each other ({str(error).splitlines()[0]}); "
            "see that all are started, with the address of process 0, which has to be reachable"
        ) from error
    return global_state.num_processes > 1


def _place(config: Config) -> dict[str, Any] | None:
    """Return the arguments for jax.distributed.initialize; None if this process is the only one."""
    given = config.distributed
    if given.coordinator:
        return _explicit(given.coordinator, given.n_processes, given.process)
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return _explicit(address, variable("JAX_NUM_PROCESSES"), variable("JAX_PROCESS_ID"))
    if "MASTER_ADDR" in os.environ and (size := variable("WORLD_SIZE", 1)) > 1:
        # torchrun's own agent listens at its port.
        port = variable("MASTER_PORT") + ("TORCHELASTIC_RUN_ID" in os.environ)
        place = _explicit(rendezvous.of_torchrun(port), size, variable("RANK"))
        if variable("LOCAL_WORLD_SIZE", 1) > 1:
            place["local_device_ids"] = variable("LOCAL_RANK")
        return place
    has_tpu = importlib.util.find_spec("libtpu") and (os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"))
    if has_tpu and os.environ.get("JAX_PLATFORMS", "tpu") != "cpu":
        return {}  # JAX finds the rest itself
    if variable("SLURM_STEP_NUM_TASKS", 1) > 1 and SlurmCluster.is_env_present():
        address = SlurmCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
        place = _explicit(address, variable("SLURM_NTASKS"), variable("SLURM_PROCID"))
        if "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            place["local_device_ids"] = variable("SLURM_LOCALID")
        return place
    return None


def _explicit(address: str, n_processes: int, process: int) -> dict[str, Any]:
    place: dict[str, Any] = {"coordinator_address": address, "num_processes": n_processes, "process_id": process}
    return place | {"cluster_detection_method": "deactivate"}
