"""Processes that meet, late and in any order, and each way in which they cannot: one line in all of them, in time."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxlm.errors import UserError
from jaxlm.runtime import rendezvous

TIMEOUT_S = 1.5
Outcome = str  # "" for those that have met, else the error


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "ANNOUNCE_S", 0.2)
    monkeypatch.setattr(rendezvous, "RETRY_S", 0.05)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.5)


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [int(server.getsockname()[1]) for server in servers]


def free_port() -> int:
    return free_ports(1)[0]


def met(*asked: tuple[Any, ...], timeout_s: float = TIMEOUT_S) -> list[Outcome]:
    """Return how it goes for processes of (address, number of processes, number, seconds after which it starts)."""
    outcomes = ["still waiting"] * len(asked)

    def one(i: int, address: str, n: int, process: int, late_s: float = 0.0) -> None:
        time.sleep(late_s)
        try:
            rendezvous.meet(address, n, process, timeout_s)
            outcomes[i] = ""
        except UserError as error:
            outcomes[i] = str(error)

    threads = [threading.Thread(target=one, args=(i, *each), daemon=True) for i, each in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", socket.gethostname()])
def test_processes_meet_and_leave_the_port_free(host: str) -> None:
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    address = f"{host}:{free_port()}"
    for _ in range(2):
        assert met((address, 3, 2), (address, 3, 0), (address, 3, 1), timeout_s=30) == ["", "", ""]
    assert met((address, 1, 0), timeout_s=30) == [""]


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_process_is_waited_for_with_a_line(late: int, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert met(*((address, 2, i, 0.5 if i == late else 0.0) for i in range(2)), timeout_s=30) == ["", ""]
    who = "process 1 of 2" if late else "process 0"
    assert f"waiting for {who} at {address}" in capsys.readouterr().err


def test_a_process_that_is_started_again_takes_its_own_place() -> None:
    address = f"127.0.0.1:{free_port()}"
    host, port = rendezvous.parse(address)

    server = threading.Thread(target=lambda: met((address, 3, 0), timeout_s=30), daemon=True)
    server.start()
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            with socket.create_connection((host, port), timeout=5) as connection:
                rendezvous._send(connection, {"process": 1, "n_processes": 3})
                assert "wait_s" in rendezvous._receive(connection)
            break
    assert met((address, 3, 1), (address, 3, 2), timeout_s=30) == ["", ""]
    server.join(30)
    assert not server.is_alive()


@contextlib.contextmanager
def other_program(answer: bytes | None) -> Iterator[int]:
    """A program that listens at a port, and answers something, closes at once (b""), or is silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    if answer is not None:
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        for connection in kept:
            connection.close()


def pairs(addresses: list[str]) -> Iterator[tuple[str, Outcome, Outcome]]:
    """Yield each address with how it goes for two processes there; all wait at the same time."""
    outcomes = met(*((address, 2, process) for address in addresses for process in range(2)))
    return zip(addresses, outcomes[::2], outcomes[1::2], strict=True)


def test_a_port_that_another_program_has_is_named_by_all() -> None:
    answers = [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"\0\0\x12\4",
        b"[" * 5000,
        b'{"program": 1}\n',
    ]
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(other_program(answer)) for answer in (None, *answers)]
        for address, first, second in pairs([f"127.0.0.1:{port}" for port in ports]):
            assert first.startswith(
                f"{address}: process 0 cannot listen at port {address[10:]} (Address already in use"
            )
            assert second.startswith(f"{address}: process 1 did not reach process 0 within 1.5 s (")


def test_strangers_do_not_disturb_those_that_wait() -> None:
    address = f"127.0.0.1:{free_port()}"
    host, port = rendezvous.parse(address)
    stopped = threading.Event()

    def knock() -> None:
        while not stopped.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            stopped.wait(0.02)

    thread = threading.Thread(target=knock)
    thread.start()
    assert met((address, 2, 0), (address, 2, 1, 0.5), timeout_s=30) == ["", ""]
    stopped.set()
    thread.join()


def test_what_cannot_meet_ends_in_time_with_the_same_line() -> None:
    cases = [
        ([(2, 1)], "process 1 did not reach process 0 within 1.5 s (Connection refused); start process 0"),
        ([(2, 0)], "process 1 of 2 did not come within 1.5 s (distributed.timeout_s); start all, or give all"),
        ([(4, 0), (4, 2)], "processes 1, 3 of 4 did not come within 1.5 s"),
        ([(3, 0), (3, 1), (3, 1)], "two processes have the number 1; give each its own, from 0 to 2"),
        ([(3, 0), (2, 1)], "process 1 is one of 2, but process 0 one of 3; give all the same number"),
        ([(2, 0), (3, 1), (3, 2)], "is one of 3, but process 0 one of 2"),
    ]
    ports = free_ports(len(cases))
    all_outcomes = iter(
        met(*((f"127.0.0.1:{port}", *each) for port, case in zip(ports, cases, strict=True) for each in case[0]))
    )
    for port, (processes, why) in zip(ports, cases, strict=True):
        outcomes = [next(all_outcomes) for _ in processes]
        assert any(why in outcome for outcome in outcomes), outcomes
        assert all(outcome.startswith(f"127.0.0.1:{port}: ") and "\n" not in outcome for outcome in outcomes), outcomes


def test_a_host_that_cannot_be_reached_is_named_by_all() -> None:
    hosts = ["no-such-host.invalid", "a..b", "x" * 70, "192.0.2.1"]
    addresses = [f"{host}:{port}" for host, port in zip(hosts, free_ports(len(hosts)), strict=True)]
    for address, first, second in pairs(addresses):
        assert first.startswith(f"{address}: process 0 does not reach itself there (")
        assert second.startswith(f"{address}: process 1 did not reach process 0 within 1.5 s (")


def test_the_setting_that_gives_the_address_is_named() -> None:
    setting = "MASTER_ADDR and MASTER_PORT"
    with pytest.raises(UserError, match=f"give it with {setting}"):
        rendezvous.meet("host:", 2, 1, TIMEOUT_S, setting)
    with pytest.raises(UserError, match=f"as all hosts reach it, with {setting}"):
        rendezvous.meet(f"127.0.0.1:{free_port()}", 2, 1, 0.01, setting)
    with other_program(b"") as port, pytest.raises(UserError, match=f"give another with {setting}"):
        rendezvous.meet(f"127.0.0.1:{port}", 2, 0, TIMEOUT_S, setting)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        *(
            (x, "is HOST:PORT")
            for x in ("host", "host:", ":1234", "host:x", "host:-1", "::1:1234", "[::1]", "host:1 2", "")
        ),
        ("host:²", "is HOST:PORT"),
        ("[]:1", "is HOST:PORT"),
        ("host:0", "a port is 1 to 65535, not 0"),
        ("host:65536", "a port is 1 to 65535, not 65536"),
    ],
)
def test_a_malformed_address_is_refused(address: str, why: str) -> None:
    with pytest.raises(UserError, match=why.replace("[", r"\[")) as error:
        rendezvous.meet(address, 2, 1, TIMEOUT_S)
    assert str(error.value).startswith(f"{address}: ")


@pytest.mark.parametrize(("n", "process"), [(4, 4), (2, 7), (0, 0)])
def test_processes_are_numbered_from_0(n: int, process: int) -> None:
    with pytest.raises(UserError, match=f"process {process} of {n}: they are numbered from 0"):
        rendezvous.meet("host:1", n, process, TIMEOUT_S)


def commands(package: str, address: str, n: int, process: int) -> tuple[list[str], dict[str, str]]:
    host, _, port = address.rpartition(":")
    command = [sys.executable, "-m", f"{package}.train", "--distributed.timeout-s", "4"]
    if package == "jaxlm":
        place = f"--distributed.coordinator {address} --distributed.n-processes {n} --distributed.process {process}"
        return [*command, *place.split()], {}
    return command, {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(n), "RANK": str(process)}


@pytest.mark.slow
@pytest.mark.parametrize("package", ["jaxlm", "torchlm"])
def test_real_processes_end_with_one_line_and_status_2(package: str, tmp_path: Path) -> None:
    with other_program(b"") as port:
        started = []
        for process in range(2):
            command, env = commands(package, f"127.0.0.1:{port}", 2, process)
            started.append(
                subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    env=os.environ | env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        errors = [process.communicate(timeout=90)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], errors
    assert "cannot listen at port" in errors[0] and "did not reach process 0" in errors[1]
    for error in errors:
        assert [
            line[:6] for line in error.splitlines() if not line.startswith("waiting for") and not line.endswith("...")
        ] == ["error:"]
    assert not list(tmp_path.iterdir())
