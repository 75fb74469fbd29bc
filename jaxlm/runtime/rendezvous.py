"""Processes of a run meet at the port of process 0 before their framework joins them. Knows no framework.

What can be wrong with addresses, ports and numbers shows here, in every process, as one line within a stated time. The
frameworks wait for minutes, or end with a stack dump.
"""

import contextlib
import errno
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from jaxlm.errors import UserError

PROGRAM = "jaxlm processes"  # by which both sides know each other
ANNOUNCE_S, RETRY_S, ANSWER_S = 2.0, 0.3, 5.0  # until a wait is announced; between tries; for one answer
MOST_BYTES = 4096  # of a message
SETTING = "--distributed.coordinator"  # which gives the address in jaxlm


def parse(address: str, setting: str = SETTING) -> tuple[str, int]:
    """Return host and port of an address, HOST:PORT or [IPv6]:PORT, which `setting` gives. Raises UserError."""
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    if is_bracketed:
        host = host[1:-1]
    if not host or not port.isascii() or not port.isdecimal() or (":" in host) != is_bracketed:
        raise UserError(f"{address}: the address of process 0 is HOST:PORT, or [IPv6]:PORT; give it with {setting}")
    if not 1 <= int(port) < 2**16:
        raise UserError(f"{address}: a port is 1 to 65535, not {port}; give another")
    return host, int(port)


def variable(name: str, default: int | None = None) -> int:
    """Return a number of the environment. Raises UserError."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={text!r} in the environment is no number from 0; set it to a number")
    return int(text)


def of_torchrun(port: int | str) -> str:
    """Return the address that MASTER_ADDR has with a port; an IPv6 host stands there without brackets."""
    host = os.environ.get("MASTER_ADDR", "")
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def meet(address: str, n_processes: int, process: int, timeout_s: float, setting: str = SETTING) -> None:
    """Return when all processes have reached process 0 at its address, which `setting` gives.

    Raises UserError after `timeout_s`.
    """
    host, port = parse(address, setting)
    if not 0 <= process < n_processes:
        raise UserError(f"process {process} of {n_processes}: they are numbered from 0; see jaxlm/runtime/SHARDING.md")
    reasons: list[str] = []
    asked = (address, host, port, process, n_processes, timeout_s, setting, reasons)
    if process:
        _visit(*asked)
        return
    with _listening(address, port, setting) as server:
        threading.Thread(target=_visit_itself, args=asked, daemon=True).start()
        _gather(address, server, n_processes, timeout_s, setting, reasons)


@contextlib.contextmanager
def _listening(address: str, port: int, setting: str) -> Iterator[socket.socket]:
    """Listen at a port of all addresses of this host, as the frameworks will."""
    try:
        try:
            server = socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES):
                raise
            server = socket.create_server(("", port), backlog=1024)  # a host without IPv6
    except OSError as error:
        raise UserError(
            f"{address}: process 0 cannot listen at port {port} ({error.strerror}); give another with "
            f"{setting}, or end the program that has it"
        ) from error
    with server:
        yield server


def _gather(address: str, server: socket.socket, n: int, timeout_s: float, setting: str, reasons: list[str]) -> None:
    """Wait in process 0 for all processes, itself included, and tell them how it went."""
    came: dict[int, socket.socket] = {}
    connections: list[socket.socket] = []
    error, wait = "", _Wait(timeout_s)
    server.settimeout(RETRY_S)
    while not error:
        came = {number: connection for number, connection in came.items() if not _has_gone(connection)}
        if len(came) == n:
            break
        missing = [i for i in range(n) if i not in came]
        names = f"{'process' if len(missing) == 1 else 'processes'} {', '.join(map(str, missing[:9]))} of {n}"
        if wait.is_over():
            error = (
                f"{address}: {names} did not come within {timeout_s:g} s (distributed.timeout_s); start "
                "all, or give all a lower number of processes"
            )
            if 0 in missing:
                error = (
                    f"{address}: process 0 does not reach itself there ({reasons[-1] if reasons else 'no answer'}); "
                    f"give an address of its host with {setting}"
                )
            break
        wait.announce(f"{names} at {address}")
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        connection.settimeout(ANSWER_S)
        asked = _receive(connection)
        number, of = asked.get("process"), asked.get("n_processes")
        if not isinstance(number, int) or not isinstance(of, int):  # a program that is not ours, or that has gone
            connection.close()
            continue
        connections.append(connection)
        _send(connection, {"wait_s": timeout_s})
        if of != n:
            error = f"{address}: process {number} is one of {of}, but process 0 one of {n}; give all the same number"
        elif number in came and not _has_gone(came[number]):
            error = f"{address}: two processes have the number {number}; give each its own, from 0 to {n - 1}"
        came[number] = connection
    for connection in connections:
        _send(connection, {"error": error})
        connection.close()
    if error:
        raise UserError(error)


def _visit(
    address: str, host: str, port: int, process: int, n: int, timeout_s: float, setting: str, reasons: list[str]
) -> None:
    """Reach process 0, and wait until all are there; `reasons` get why a try failed."""
    wait = _Wait(timeout_s)
    while True:
        try:
            with socket.create_connection((host, port), timeout=ANSWER_S) as connection:
                _send(connection, {"process": process, "n_processes": n})
                hello = _receive(connection)
                if "wait_s" in hello:
                    connection.settimeout(hello["wait_s"] + 2 * ANSWER_S)
                    error = _receive(connection).get("error", f"{address}: process 0 has ended; start it again")
                    if error:
                        raise UserError(error)
                    return
            reasons.append("another program answers there")
        except (OSError, ValueError) as problem:  # ValueError: a name that no host can have
            reasons.append(getattr(problem, "strerror", None) or str(problem))
        if wait.is_over():
            raise UserError(
                f"{address}: process {process} did not reach process 0 within {timeout_s:g} s ({reasons[-1]}); start "
                f"process 0, and give its address, as all hosts reach it, with {setting}"
            )
        if process:
            wait.announce(f"process 0 at {address} ({reasons[-1]})")
        time.sleep(RETRY_S)


def _visit_itself(*asked: Any) -> None:
    try:
        _visit(*asked)
    except UserError as error:  # process 0 raises its own, with this as the reason
        asked[-1].append(str(error))


class _Wait:
    """A wait with an end, which is announced if it is not over soon."""

    def __init__(self, timeout_s: float):
        self.timeout_s, self.began_s, self.is_announced = timeout_s, time.monotonic(), False

    def is_over(self) -> bool:
        return time.monotonic() - self.began_s > self.timeout_s

    def announce(self, what: str) -> None:
        if not self.is_announced and time.monotonic() - self.began_s > ANNOUNCE_S:
            self.is_announced = True
            print(
                f"waiting for {what}; {self.timeout_s:g} s at most (distributed.timeout_s)", file=sys.stderr, flush=True
            )


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it has gone
        connection.sendall(json.dumps({"program": PROGRAM, **message}).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Return one message; {} if what comes is no message of ours, or nothing comes in time."""
    line = bytearray()
    try:
        while not line.endswith(b"\n") and len(line) < MOST_BYTES:
            byte = connection.recv(1)  # one at a time: another message may follow
            if not byte:
                return {}
            line += byte
        message = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) and message.get("program") == PROGRAM else {}


def _has_gone(connection: socket.socket) -> bool:
    """Return whether the other side, which has nothing to say while it waits, has closed the connection."""
    return bool(select.select([connection], [], [], 0)[0])
