"""A handshake at the port of process 0, before the framework joins the processes. Imports no framework.

A wrong address, port or process number ends every process with one line, within a timeout. The frameworks alone would
wait for minutes or end with a stack dump.
"""

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from jaxlm.errors import UserError

PROGRAM = "jaxlm processes"  # identifies messages of this protocol
ANNOUNCE_S, RETRY_S, ANSWER_S = 2.0, 0.3, 5.0  # until a wait is announced; between attempts; for one answer
MOST_BYTES = 4096  # of a message
SETTING = "--distributed.coordinator"  # the setting of the address in jaxlm


def parse(address: str, setting: str = SETTING) -> tuple[str, int]:
    """Return host and port of an address, HOST:PORT or [IPv6]:PORT. Raises UserError, which names `setting`."""
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
    """Return an environment variable as a number. Raises UserError."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={text!r} in the environment is not a whole number from 0; set it to one")
    return int(text)


def of_torchrun(port: int | str) -> str:
    """Return the address of MASTER_ADDR and a port; torchrun writes IPv6 hosts without brackets."""
    host = os.environ.get("MASTER_ADDR", "")
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


@dataclass
class _Meeting:
    """The state of the handshake in one process."""

    address: str
    host: str
    port: int
    process: int
    n_processes: int
    timeout_s: float
    setting: str  # of the address
    reason: str = "no answer"  # why process 0 was not reached
    began_s: float = field(default_factory=time.monotonic)
    is_announced: bool = False

    def is_over(self) -> bool:
        return time.monotonic() - self.began_s > self.timeout_s

    def announce(self, what: str) -> None:
        """Print once what this process waits for, after ANNOUNCE_S."""
        if not self.is_announced and time.monotonic() - self.began_s > ANNOUNCE_S:
            self.is_announced = True
            line = f"waiting for {what}; {self.timeout_s:g} s at most (distributed.timeout_s)"
            print(line, file=sys.stderr, flush=True)


def meet(address: str, n_processes: int, process: int, timeout_s: float, setting: str = SETTING) -> None:
    """Return when all processes have reached process 0 at `address`. Raises UserError after `timeout_s`."""
    host, port = parse(address, setting)
    if not 0 <= process < n_processes:
        raise UserError(f"process {process} of {n_processes}: they are numbered from 0; see jaxlm/runtime/SHARDING.md")
    meeting = _Meeting(address, host, port, process, n_processes, timeout_s, setting)
    if process:
        _visit(meeting)
        return
    with _listen(meeting) as server:
        threading.Thread(target=_visit_itself, args=[meeting], daemon=True).start()
        _gather(meeting, server)


def _listen(meeting: _Meeting) -> socket.socket:
    """Listen at the port on all addresses of this host, as the frameworks will."""
    dual: dict[str, Any] = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        return socket.create_server(("", meeting.port), backlog=1024, **dual)
    except OSError as error:
        raise UserError(
            f"{meeting.address}: process 0 cannot listen at port {meeting.port} ({error.strerror}); give another with "
            f"{meeting.setting}, or end the program that uses it"
        ) from error


def _gather(meeting: _Meeting, server: socket.socket) -> None:
    """Wait in process 0 for all processes, including itself, and send them the result."""
    address, n = meeting.address, meeting.n_processes
    came: dict[int, socket.socket] = {}
    connections: list[socket.socket] = []
    error = ""
    server.settimeout(RETRY_S)
    while not error:
        came = {number: connection for number, connection in came.items() if not _has_gone(connection)}
        missing = [number for number in range(n) if number not in came]
        if not missing:
            break
        names = f"{'process' if len(missing) == 1 else 'processes'} {', '.join(map(str, missing[:9]))} of {n}"
        if meeting.is_over():
            error = f"{address}: {names} did not come within {meeting.timeout_s:g} s (distributed.timeout_s); "
            error += "start all, or give all a lower number of processes"
            if 0 in missing:
                error = f"{address}: process 0 does not reach itself there ({meeting.reason}); "
                error += f"give an address of its host with {meeting.setting}"
            break
        meeting.announce(f"{names} at {address}")
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
        _send(connection, {"wait_s": meeting.timeout_s})
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


def _visit(meeting: _Meeting) -> None:
    """Connect to process 0, and wait until all processes have."""
    address, process = meeting.address, meeting.process
    while True:
        try:
            with socket.create_connection((meeting.host, meeting.port), timeout=ANSWER_S) as connection:
                _send(connection, {"process": process, "n_processes": meeting.n_processes})
                hello = _receive(connection)
                if "wait_s" in hello:
                    connection.settimeout(hello["wait_s"] + 2 * ANSWER_S)
                    error = _receive(connection).get("error", f"{address}: process 0 has ended; start it again")
                    if error:
                        raise UserError(error)
                    return
            meeting.reason = "another program answers there"
        except (OSError, ValueError) as problem:  # ValueError: a name that no host can have
            meeting.reason = getattr(problem, "strerror", None) or str(problem)
        if meeting.is_over():
            raise UserError(
                f"{address}: process {process} did not reach process 0 within {meeting.timeout_s:g} s "
                f"({meeting.reason}); start process 0, and give its address, as all hosts reach it, with "
                f"{meeting.setting}"
            )
        if process:
            meeting.announce(f"process 0 at {address} ({meeting.reason})")
        time.sleep(RETRY_S)


def _visit_itself(meeting: _Meeting) -> None:
    with contextlib.suppress(UserError):  # the main thread of process 0 raises the error, with this reason
        _visit(meeting)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the other side has closed the connection
        connection.sendall(json.dumps({"program": PROGRAM, **message}).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Return one message; {} if none arrives in time, or one of another program."""
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
    """Return whether the other side has closed the connection; while it waits, it sends nothing."""
    return bool(select.select([connection], [], [], 0)[0])
