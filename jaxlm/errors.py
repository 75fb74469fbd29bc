"""User errors: one line on stderr, exit status 2, no traceback. Also notes, warnings and signals."""

import contextlib
import difflib
import io
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxlm import terminal

CLEANUPS: list[Callable[[], None]] = []  # called after an interrupt, to remove incomplete files
ENDINGS = (signal.SIGINT, signal.SIGTERM)  # the exit status of an interrupted run is 128 plus their number


# Parts of the messages of JAX, PyTorch and the loader when memory runs out.
OUT_OF_MEMORY = (
    *("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "not enough memory", "can't allocate memory"),
    *("Cannot allocate memory", "failed to map segment"),
)
LONGEST = 6000  # characters of an error; a path has up to 4096
SLOW_S = 5.0  # a step that takes longer prints a line
AGAIN_S = 30.0  # between further lines of the same step


class UserError(Exception):
    """Bad input. The message is one line: setting or file, value, broken rule, and how to fix it."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return "; did you mean X?" for the choice most like `name`, or "" if none is similar.

    A setting without its section (`--d-model`) is matched by its last word.
    """
    choices = list(choices)
    last = {choice.rpartition(".")[2]: choice for choice in reversed(choices)}
    match = difflib.get_close_matches(name, choices, n=1) or [
        last[word] for word in difflib.get_close_matches(name.rpartition(".")[2], last, n=1)
    ]
    return f"; did you mean {match[0]}?" if match else ""


@contextlib.contextmanager
def os_errors(what: str, mend: str = "") -> Iterator[None]:
    """Turn an OSError of the `with` block into a UserError: "WHAT (REASON); MEND"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} ({error.strerror or reason(error)})" + (f"; {mend}" if mend else "")) from error


def note(text: str) -> None:
    """Print a note on stderr."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def slow(step: str) -> Iterator[None]:
    """If the `with` block takes more than SLOW_S, print its name on stderr, and every AGAIN_S how long it has taken."""
    is_over, began_s = threading.Event(), time.monotonic()

    def report() -> None:
        wait_s, text = SLOW_S, f"{step} ..."
        while not is_over.wait(wait_s):
            print(text, file=sys.stderr, flush=True)
            wait_s, text = AGAIN_S, f"{step} ... {time.monotonic() - began_s + AGAIN_S:.0f} s"

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn a UserError, or an error that `outside` explains, into one line on stderr and exit status 2.

    With `debug`, the traceback is printed first. KeyboardInterrupt and a closed pipe end the process silently, with
    status 130 and 141. Output of the block is safe for a terminal.
    """
    with terminal.safe_streams():
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes its buffer there
            sys.exit(128 + signal.SIGPIPE)
        except Exception as error:
            line = str(error) if isinstance(error, UserError) else outside(error)
            if not line:
                raise
            if debug:
                print(traceback.format_exc(), end="", file=sys.stderr)  # has no colours, which would be escaped
            line = " ".join(line.split())
            if len(line) > LONGEST:  # a long value; the fix is at the end
                line = f"{line[: LONGEST - 1000]} ... {line[-1000:]}"
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)


def outside(error: Exception) -> str:
    """Return an explanation of an error outside the program and its input: memory, threads, devices; "" if unknown."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(mark in text for mark in OUT_OF_MEMORY):
        return (
            f"too little memory ({text[:200] or type(error).__name__}); free some, or for training lower "
            "train.batch_size (with train.accumulate, an update has the same samples), model.seq_len or the size of "
            f"the model, or set model.remat=full; {terminal.command('plan')} estimates what a run needs"
        )
    if "can't start new thread" in text:
        return f"the system cannot start threads ({text[:200]}); end other programs, or raise the limit (ulimit -u)"
    if match := re.search(r"(?:JAX flag|environment) '?(jax_\w+)'?", text, re.IGNORECASE):
        name = match[1].upper()
        return f"{name}={os.environ.get(name)} in the environment: JAX does not accept this value; unset it"
    if isinstance(error, RuntimeError | AssertionError) and (why := _no_device(error)) is not None:
        given = [name for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS") if name in os.environ]
        if "initialize backend 'cpu'" in why and given:
            why = why.partition(" (")[0]
            return f"JAX has no CPU to compute on: {why}; unset {' and '.join(given)} in the environment"
        for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
            if value := os.environ.get(name):
                why = f" ({why})" if why else ", or its plugin is not installed"
                return (
                    f"{name}={value} in the environment: there is no such device here{why}; unset it, or set {name}=cpu"
                )
        return f"JAX finds no device: {why}; set JAX_PLATFORMS=cpu in the environment to compute without an accelerator"
    return ""


def _no_device(error: Exception) -> str | None:
    """Return why JAX has no device, possibly ""; None if `error` has another reason."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames and frames[-1].filename.endswith("xla_bridge.py"):
        return " ".join(str(error).split())
    try:  # JAX removes its own frames from many tracebacks
        if jax := sys.modules.get("jax"):
            jax.devices()
    except Exception as again:
        return " ".join(str(again).split())
    return None


class _Lossy(io.FileIO):
    """A standard stream that drops text if it cannot be written, for example on a full disk."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            raise
        except OSError:
            return len(data)


def outlive_full_disks() -> None:
    """Let the process continue when stdout or stderr cannot be written, for example on a full disk."""
    terminal.open_closed()
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            buffer = io.BufferedWriter(_Lossy(number, "w", closefd=False))
            options: Any = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, stream.errors, **options))


@contextlib.contextmanager
def signals(notify: Callable[[int], None], handle: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """For each SIGINT (Ctrl-C) and SIGTERM, call `notify` with its number in a thread, and `handle` in the main thread.

    A thread, because Python's own handlers wait while a step is compiled or a tokenizer trained. Nothing is raised: an
    exception at an arbitrary point can get lost (in JAX's callback for garbage collection), turn into another error, or
    crash an extension module that is being loaded. Outside the main thread, as in some notebooks, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        with receiver:
            while number := receiver.recv(1):
                if number[0] in ENDINGS:
                    notify(number[0])

    threading.Thread(target=watch, daemon=True).start()
    handlers = {number: signal.signal(number, lambda number, frame: handle(number)) for number in ENDINGS}
    receiver_before = signal.set_wakeup_fd(sender.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(receiver_before)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not installed by Python
        sender.close()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGINT and SIGTERM call CLEANUPS and end the process, with one line on stderr and status 130 or 143."""
    has_begun = threading.Lock()

    def end(number: int) -> None:
        if not has_begun.acquire(blocking=False):
            return
        try:
            for clean in list(CLEANUPS):
                clean()
            print("interrupted before training; nothing was saved", file=sys.stderr, flush=True)
        finally:
            os._exit(128 + number)

    def end_soon(number: int) -> None:
        time.sleep(0.5)  # let the main thread do it if it can: it may use the files that are removed
        end(number)

    with signals(end_soon, end):
        yield


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
