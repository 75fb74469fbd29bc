"""Asks a server of a run many things by many clients at once, wrong ones among them, and checks each answer.

    python scripts/load_server.py RUN [--requests 10000] [--clients 64] [--max-requests 256]

Starts `python -m jaxlm.serve`, and prints a table of latencies. Every answer is compared with that of the same model
in this process; the exit status is 1 if one is lost or wrong.
"""

import argparse
import contextlib
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm import predict
from jaxlm.inference import predictors

N_TEXTS = 400  # that differ
WRONG = 0.1  # of all requests
GONE = 0.02  # clients that leave before they have an answer
LIMIT = 65_536  # bytes
Asked = tuple[str, bytes, int, Any]  # path, body, expected status, expected answer


def questions(predictor: predictors.Predictor) -> list[Asked]:
    """Return right requests, with their answers by the model of this process."""
    rng = random.Random(0)
    words = "the a of function class value name is not in object returns called list with text as all".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 8))) for _ in range(N_TEXTS)]
    if isinstance(predictor, predictors.Continue):
        options = [{"max_new_tokens": rng.randint(1, 24), "temperature": 0.0, "seed": i} for i in range(N_TEXTS)]
        name = "prompt"
    else:
        options, name = [{}] * N_TEXTS, "text"
    if isinstance(predictor, predictors.FillMasks):
        texts = [f"{text} [MASK]{' [MASK]' * rng.randint(0, 2)}." for text in texts]
    asked = []
    for text, given in zip(texts, options, strict=True):
        (answer,) = predictor([text], **given)
        asked.append(("/predict", json.dumps({name: text, **given}).encode(), 200, answer))
        if isinstance(predictor, predictors.Continue):
            asked.append(("/generate", *asked[-1][1:]))
        if rng.random() < 0.1:
            asked.append(("/attention", json.dumps({"text": text}).encode(), 200, predictor.attention(text, 0, 0)))
    return asked


def wrong(predictor: predictors.Predictor) -> list[Asked]:
    """Return wrong requests, and the status that each gets."""
    name = "prompt" if isinstance(predictor, predictors.Continue) else "text"
    return [
        ("/predict", b"{", 422, None),
        ("/predict", b"", 422, None),
        ("/predict", b'{"%s": 1}' % name.encode(), 422, None),
        ("/predict", json.dumps({name: "a", "colour": 1}).encode(), 422, None),
        ("/predict", json.dumps({name: "[MASK] " * predictor.model.seq_len * 2}).encode(), 422, None),
        ("/predict", b'{"%s": "\\udc00"}' % name.encode(), 422, None),
        ("/predict", b"x" * (LIMIT + 1), 413, None),
        ("/attention", b'{"text": "a", "layer": 99}', 422, None),
        ("/elsewhere", b"{}", 404, None),
    ]


class Client(threading.Thread):
    """Asks one thing after another over one connection, as long as there is one."""

    def __init__(self, port: int, work: "Iterator[Asked]", lock: threading.Lock, seed: int):
        super().__init__()
        self.port, self.work, self.lock, self.rng = port, work, lock, random.Random(seed)
        self.connection: http.client.HTTPConnection | None = None
        self.seconds: dict[str, list[float]] = {}
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.n_gone = 0

    def run(self) -> None:
        while True:
            with self.lock:
                asked = next(self.work, None)
            if asked is None:
                break
            path, body, wanted, answer = asked
            if self.rng.random() < GONE:
                self._leave(path, body)
            started_s = time.monotonic()
            try:
                status, found = self._ask(path, body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.wrong.append(f"{path} {body[:80]!r}: {error!r}")
                self._close()
                continue
            kind = path if wanted == 200 else f"wrong: {wanted}"
            self.seconds.setdefault(kind, []).append(time.monotonic() - started_s)
            if status != wanted or (answer is not None and not _alike(found, answer)):
                self.wrong.append(f"{path} {body[:80]!r}: {status} {found}, not {wanted} {answer}")
        self._close()

    def _ask(self, path: str, body: bytes) -> tuple[int, Any]:
        while True:
            status, retry_s, content = self._send(path, body)
            self.statuses[status] += 1
            if status != 429:
                break
            time.sleep(retry_s * self.rng.uniform(0.5, 1))
        if path == "/generate" and status == 200:
            events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", content.decode())
            pieces = [json.loads(data)["text"] for kind, data in events if kind == "piece"]
            answer = json.loads(events[-1][1])
            return status, answer if "".join(pieces) == answer["continuation"] else pieces
        return status, json.loads(content)

    def _send(self, path: str, body: bytes) -> tuple[int, float, bytes]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self.connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        content = answer.read()
        return answer.status, float(answer.headers.get("Retry-After", 0)), content

    def _leave(self, path: str, body: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        time.sleep(self.rng.random() / 100)
        connection.close()
        self.n_gone += 1

    def _close(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None


def _alike(found: Any, wanted: Any) -> bool:
    """Return whether two answers are the same but for rounding."""
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(_alike(found[k], wanted[k]) for k in wanted)
        )
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_alike, found, wanted))
    if isinstance(wanted, float):
        return abs(found - wanted) < 1e-4
    return found == wanted


@contextlib.contextmanager
def serving(run: str, *options: str) -> Iterator[int]:
    """Yield the port of a server of a run."""
    command = [sys.executable, "-m", "jaxlm.serve", "--checkpoint", run, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        port = None
        for line in process.stderr:
            if match := re.match(r"serving http://127\.0\.0\.1:(\d+)/", line):
                port = int(match[1])
                break
        if port is None:
            sys.exit(f"{' '.join(command)}: exit status {process.wait()}")
        try:
            yield port
        finally:
            process.terminate()
            sys.stderr.write(process.stderr.read())
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--max-requests", default="256")
    args = parser.parse_args(argv)
    predictor = predict.load(args.run)
    right, bad, rng = questions(predictor), wrong(predictor), random.Random(1)
    work = iter([rng.choice(bad if rng.random() < WRONG else right) for _ in range(args.requests)])
    with serving(args.run, "--max-requests", args.max_requests) as port:
        lock = threading.Lock()
        clients = [Client(port, work, lock, seed) for seed in range(args.clients)]
        started_s = time.monotonic()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        wall_s = time.monotonic() - started_s
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        metrics = connection.getresponse().read().decode()
        connection.close()
    return report(args, clients, metrics, wall_s)


def report(args: argparse.Namespace, clients: list[Client], metrics: str, wall_s: float) -> int:
    """Print what has become of the requests; return the exit status."""
    statuses = sum((client.statuses for client in clients), Counter[int]())
    served = Counter[str]()
    for status, count in re.findall(r'^jaxlm_requests_total\{.*status="(\w+)"\} (\S+)$', metrics, re.MULTILINE):
        served[status] += int(float(count))
    batches, rows = (float(x) for x in re.findall(r"^jaxlm_batch_rows_(?:count|sum) (\S+)$", metrics, re.MULTILINE))
    seconds: dict[str, list[float]] = {}
    for client in clients:
        for kind, some in client.seconds.items():
            seconds.setdefault(kind, []).extend(some)
    mistakes = [line for client in clients for line in client.wrong]
    n, n_gone = sum(map(len, seconds.values())), sum(client.n_gone for client in clients)
    print(f"{args.requests:,} requests by {args.clients} clients in {wall_s:.1f} s, {n / wall_s:,.0f} a second")
    print(f"{n:,} answered; {len(mistakes)} wrong or lost; {n_gone} more, whose clients left before the answer")
    print(f"{statuses[429]:,} times told to come again; {rows / batches:.1f} texts in the model at once")
    print("| request | n | median, ms | 90% | 99% | most |\n| --- | --- | --- | --- | --- | --- |")
    for kind in sorted(seconds):
        ms = np.array(seconds[kind]) * 1e3
        figures = " | ".join(f"{x:.0f}" for x in (*np.percentile(ms, (50, 90, 99)), ms.max()))
        print(f"| {kind} | {len(ms):,} | {figures} |")
    # Those who left have not counted what they would have been answered.
    if not all(served[str(status)] - count in range(n_gone + 1) for status, count in statuses.items()):
        mistakes.append(f"the server counts {dict(served)}, the clients {dict(statuses)}")
    for line in mistakes[:10]:
        print(line, file=sys.stderr)
    return int(bool(mistakes) or n != args.requests)


if __name__ == "__main__":
    sys.exit(main())
