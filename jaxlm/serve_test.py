"""`python -m jaxlm.serve`, by its address: answers, streams, limits, who is let in, and its end."""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import predict, serve, terminal
from jaxlm.errors import UserError
from jaxlm.inference import load, predictors
from jaxlm.report_test import Page
from jaxlm.reporting import html_page
from jaxlm.testing import tiny_runs

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
parser = pytest.importorskip("prometheus_client.parser")
from jaxlm.inference import batching, http_api  # noqa: E402
from jaxlm.inference.batching import Engine  # noqa: E402

LENGTH = 512  # positions of gpt, for continuations that take a while


class Server:
    """A service at an address of this process."""

    def __init__(self, predictor: Any, token: str = "", **limits: Any):
        self.predictor, self.engine, self.token = predictor, Engine(predictor), token
        app = http_api.make(self.engine, http_api.Limits(**limits), token)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()

    def begin(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if self.token:
            headers = {"Authorization": f"Bearer {self.token}"} | headers
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, sent, headers)
        return connection

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Return the status, the headers and the body, read as JSON if it is."""
        with contextlib.closing(self.begin(method, path, body, **headers)) as connection:
            answer = connection.getresponse()
            content = answer.read()
            is_json = answer.headers["Content-Type"] == "application/json"
            return answer.status, answer.headers, json.loads(content) if is_json else content.decode()

    def figures(self) -> dict[str, float]:
        """Return what /metrics tells, without labels summed up."""
        found: dict[str, float] = {}
        for family in parser.text_string_to_metric_families(self.ask("GET", "/metrics")[2]):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for task in ("mlm", "sst2"):
        tiny_runs.write(folder / task, task)
    tiny_runs.write(folder / "gpt", "gpt", **{"model.seq_len": LENGTH})
    return folder


@pytest.fixture(scope="module")
def serving() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(contextlib.closing(Server(*args, **kwargs)))


@pytest.fixture(scope="module")
def servers(runs: Path, serving: Callable[..., Server]) -> dict[str, Server]:
    return {task: serving(predict.load(runs / task), requests=100, body=2000) for task in ("mlm", "sst2", "gpt")}


def test_prompts_are_answered(serving: Callable[..., Server], tmp_path: Path) -> None:
    server = serving(predict.load(tiny_runs.write(tmp_path / "run", "pairs")))
    status, _, answer = server.ask("POST", "/predict", {"prompt": "the cat?", "seed": 3, "max_new_tokens": 9})
    assert (status, answer) == (200, server.predictor(["the cat?"], seed=3, max_new_tokens=9)[0])
    assert "<title>Answer a prompt: run" in str(server.ask("GET", "/")[2])


@pytest.mark.parametrize(("task", "seq_len", "most", "expected"), [("pairs", 16, 1000, 8), ("gpt", 5, 1000, 2)])
def test_the_default_length_fits_the_model(
    task: str, seq_len: int, most: int, expected: int, serving: Callable[..., Server], tmp_path: Path
) -> None:
    run = tiny_runs.write(tmp_path / "run", task, **{"model.seq_len": seq_len})
    server = serving(predict.load(run), new_tokens=most)
    fields = server.ask("GET", "/openapi.json")[2]["components"]["schemas"]["Prompt"]["properties"]
    assert fields["max_new_tokens"]["default"] == expected
    for seed in range(5):
        status, _, answer = server.ask("POST", "/predict", {"prompt": "", "temperature": 5, "top_p": 1, "seed": seed})
        assert status == 200 and answer["ending"] in ("length", "article") and answer["tokens"] <= expected


def events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    while line := answer.readline():
        kind, data = line.decode(), answer.readline().decode()
        assert kind.startswith("event: ") and data.startswith("data: ") and answer.readline() == b"\n"
        yield kind[7:-1], json.loads(data[6:])


TEXTS = [f"the cat {'and the dog ' * (i % 3)}sat on" for i in range(40)]


@pytest.mark.parametrize("task", ["mlm", "sst2", "gpt"])
def test_each_of_many_clients_gets_its_own_answer(task: str, servers: dict[str, Server]) -> None:
    server = servers[task]
    before = server.figures()
    asked: list[dict[str, Any]] = {
        "mlm": [{"text": f"{text} [MASK]", "top_k": 1 + i % 7} for i, text in enumerate(TEXTS)],
        "sst2": [{"text": f"{text}{' a' * (i % 5)}"} for i, text in enumerate(TEXTS)],
        "gpt": [{"prompt": text, "seed": i, "max_new_tokens": 1 + i} for i, text in enumerate(TEXTS)],
    }[task]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda body: server.ask("POST", "/predict", body), asked))
    after = server.figures()
    for body, (status, _, answer) in zip(asked, answers, strict=True):
        options = {name: value for name, value in body.items() if name not in ("text", "prompt")}
        (expected,) = server.predictor([body.get("text", body.get("prompt"))], **options)
        assert status == 200 and answer.keys() == expected.keys()
        for name, value in expected.items():
            if name == "masks":
                found = [[guess["probability"] for guess in guesses] for guesses in answer[name]]
                wanted = [[guess["probability"] for guess in guesses] for guesses in value]
                np.testing.assert_allclose(found, wanted, rtol=1e-4)
            elif name == "probabilities":
                np.testing.assert_allclose(answer[name], value, rtol=1e-4)
            else:
                assert answer[name] == value, name
    assert after["jaxlm_requests_total"] - before.get("jaxlm_requests_total", 0) == len(asked) + 1
    assert after["jaxlm_batch_rows_sum"] - before["jaxlm_batch_rows_sum"] >= len(asked)
    assert after["jaxlm_batch_rows_sum"] > after["jaxlm_batch_rows_count"]
    assert after["jaxlm_open_requests"] == after["jaxlm_waiting_requests"] == 0


def test_nothing_is_compiled_for_a_request(runs: Path, serving: Callable[..., Server]) -> None:
    for task in ("mlm", "gpt"):
        server = serving(predict.load(runs / task))
        name = "prompt" if task == "gpt" else "text"
        before = server.figures()["jaxlm_compilations_total"]
        for body in ({name: "[MASK] " * n} for n in (1, 2, 3, 14)):
            assert server.ask("POST", "/predict", body)[0] == 200
        with ThreadPoolExecutor(13) as pool:
            list(pool.map(lambda i: server.ask("POST", "/predict", {name: f"[MASK] {i}"}), range(13)))  # noqa: B023
        assert server.ask("POST", "/attention", {"text": "the cat", "layer": 1, "head": 2})[0] == 200
        assert server.figures()["jaxlm_compilations_total"] == before > 0


def test_a_long_prompt_gets_a_large_slot_and_the_cache_stays_bounded(
    runs: Path, serving: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "ROOM", LENGTH // 8)
    server, bound = serving(predict.load(runs / "gpt")), predictors.N_ROWS * LENGTH // 8
    places: Any = server.engine.work
    made: list[tuple[int, int]] = []
    empty = places.predictor.decoder.empty
    monkeypatch.setattr(places.predictor.decoder, "empty", lambda *shape: made.append(shape) or empty(*shape))
    assert places.rows.tokens_BS.shape[0] == places.n_rows == 16 and places.room == LENGTH // 8
    long, short = "the cat sat on the mat " * 20, "the cat"
    asked = [{"prompt": x, "seed": i, "max_new_tokens": 40} for i, x in enumerate([short] * 6 + [long] * 3 + [short])]
    with ThreadPoolExecutor(len(asked)) as pool:
        told = list(pool.map(lambda body: server.ask("POST", "/predict", body), asked))
    for body, (status, _, answer) in zip(asked, told, strict=True):
        options = {name: body[name] for name in ("seed", "max_new_tokens")}
        assert (status, answer) == (200, server.predictor([body["prompt"]], **options)[0])
    assert max(room for _, room in made) > LENGTH // 8 and all(n * room <= bound for n, room in made)
    assert server.ask("POST", "/predict", asked[0])[2] == told[0][2]
    assert places.room == LENGTH // 8  # small again


def test_a_continuation_is_streamed(servers: dict[str, Server]) -> None:
    body = {"prompt": "the cat", "seed": 5, "max_new_tokens": 200, "temperature": 1.5}
    with contextlib.closing(servers["gpt"].begin("POST", "/generate", body)) as connection:
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        told = [(kind, data, time.monotonic()) for kind, data in events(answer)]
    *pieces, (kind, last, ended_s) = told
    assert kind == "answer" and {kind for kind, _, _ in pieces} == {"piece"} and len(pieces) > 10
    assert "".join(data["text"] for _, data, _ in pieces) == last["continuation"]
    expected = servers["gpt"].predictor(["the cat"], seed=5, max_new_tokens=200, temperature=1.5)
    assert [last] == expected and ended_s - pieces[0][2] > 0.01


def test_who_goes_away_frees_a_place(servers: dict[str, Server]) -> None:
    server = servers["gpt"]
    body = {"prompt": "the cat", "max_new_tokens": LENGTH, "temperature": 0}
    length = server.predictor(["the cat"], max_new_tokens=LENGTH, temperature=0)[0]["tokens"]
    assert length > 400
    before = server.figures()
    streams = [server.begin("POST", "/generate", body) for _ in range(8)]
    for connection in streams:
        next(events(connection.getresponse()))
    others = [server.begin("POST", path, body) for path in ["/generate"] * 12 + ["/predict"] * 12]
    for connection in streams + others:
        connection.close()
    steps = [-1.0, -2.0]
    while steps[-1] != steps[-2]:  # until nothing is done any more
        time.sleep(0.05)
        after = server.figures()
        steps.append(after["jaxlm_batch_rows_count"])
    assert after["jaxlm_open_requests"] == after["jaxlm_waiting_requests"] == 0
    made = after["jaxlm_generated_tokens_total"] - before["jaxlm_generated_tokens_total"]
    assert 0 < made < 4 * length


@pytest.mark.parametrize(
    ("task", "path", "body", "field", "message"),
    [
        ("mlm", "/predict", {"text": "no mask"}, "text", "there is no [MASK] in the text"),
        ("mlm", "/predict", {"text": "[MASK] " * 40}, "text", "the text has 42 tokens, with special ones"),
        ("mlm", "/predict", {"text": "[MASK]", "top_k": 0}, "top_k", "greater than or equal to 1"),
        ("mlm", "/predict", {"text": "[MASK]", "top_k": "5"}, "top_k", "valid integer"),
        ("mlm", "/predict", {"text": "[MASK]", "top_q": 1}, "top_q", "not permitted"),
        ("mlm", "/predict", {}, "text", "required"),
        ("mlm", "/predict", b'{"text": "a \\ud800 [MASK]"}', "text", "not Unicode at character 3"),
        ("mlm", "/predict", b"[MASK]", "1", "JSON decode error"),
        ("mlm", "/predict", b"[1]", "body", "Must be a JSON object"),
        ("gpt", "/generate", {"prompt": "cat " * 600}, "prompt", "tokens, with special ones, but the model takes 512"),
        ("gpt", "/generate", b'{"prompt": "a", "temperature": NaN}', "temperature", "finite"),
        ("gpt", "/predict", {"prompt": "a", "top_p": 1.5}, "top_p", "less than or equal to 1"),
        ("gpt", "/predict", {"prompt": "a", "max_new_tokens": 1001}, "max_new_tokens", "less than or equal to 1000"),
        ("gpt", "/predict", {"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0"),
        ("sst2", "/predict", {"text": ["a"]}, "text", "valid string"),
        ("sst2", "/attention", {"text": "a", "layer": 2}, "layer", "less than 2"),
        ("sst2", "/attention", {"text": "a " * 40}, "text", "the text has 42 tokens"),
    ],
)
def test_bad_input_is_told_with_its_field(
    task: str, path: str, body: Any, field: str, message: str, servers: dict[str, Server]
) -> None:
    server = servers[task]
    if isinstance(body, dict) and len(str(body)) > 1900:
        body = {"prompt": "x" * 1900}  # is within the limit of bytes
    status, _, answer = server.ask("POST", path, body)
    (problem,) = answer["detail"]
    assert (status, str(problem["loc"][-1])) == (422, field) and message in problem["msg"]
    assert problem.keys() == {"type", "loc", "msg"}


def test_other_requests_are_refused(servers: dict[str, Server]) -> None:
    server = servers["sst2"]
    assert server.ask("POST", "/generate", {"text": "a"})[0] == 404
    assert server.ask("GET", "/predict")[0] == 405
    assert server.ask("POST", "/predict", {"text": "a"}, Content_Type="text/plain")[0] == 422
    status, _, answer = server.ask("POST", "/predict", {"text": "a" * 2000})
    assert (status, answer) == (413, {"detail": "the body has more than 2000 bytes"})
    for body, message in (
        ('{"text": "the café"}'.encode("latin-1"), "the body is not UTF-8 at byte 17 (from 0); convert it"),
        ('{"text": "the café"}'.encode("utf-16"), "the body is UTF-16, not UTF-8; convert it"),
        ('{"text": "the café"}'.encode("utf-16-le"), "the body is binary, or text in UTF-16"),
        (b'{"text": "a \xed\xa0\x80"}', "the body is not UTF-8 at byte 12"),
    ):
        status, _, answer = server.ask("POST", "/predict", body)
        assert status == 400 and message in answer["detail"]
    assert server.ask("POST", "/predict", b'\xef\xbb\xbf{"text": "the cat"}')[2]["text"] == "the cat"
    status, _, answer = server.ask("GET", "/health", Host="elsewhere.example")
    assert (status, answer) == (400, "Invalid host header")
    assert server.ask("GET", "/health", Host="localhost")[0] == 200


def test_too_many_at_once_are_told_to_come_again(servers: dict[str, Server], serving: Callable[..., Server]) -> None:
    server = serving(servers["gpt"].predictor, requests=2)
    body = {"prompt": "the", "max_new_tokens": LENGTH, "temperature": 3.0, "top_p": 1.0, "seed": 1}
    streams = [server.begin("POST", "/generate", body) for _ in range(2)]
    answers = [connection.getresponse() for connection in streams]
    status, headers, answer = server.ask("POST", "/predict", body)
    assert (status, headers["Retry-After"]) == (429, "1") and "2 requests" in answer["detail"]
    assert server.ask("GET", "/health")[0] == 200
    assert [list(events(answer))[-1][0] for answer in answers] == ["answer"] * 2
    for connection in streams:
        connection.close()
    until_s = time.monotonic() + 120
    while (status := server.ask("POST", "/predict", body)[0]) == 429 and time.monotonic() < until_s:
        time.sleep(0.01)
    assert status == 200


def test_what_takes_too_long_ends(servers: dict[str, Server], serving: Callable[..., Server]) -> None:
    server = serving(servers["gpt"].predictor, seconds=0.05)
    body = {"prompt": "the", "max_new_tokens": LENGTH, "temperature": 3.0, "top_p": 1.0, "seed": 1}
    status, headers, answer = server.ask("POST", "/predict", body)
    assert (status, headers["Retry-After"]) == (503, "1") and "timeout" in answer["detail"]
    with contextlib.closing(server.begin("POST", "/generate", body)) as connection:
        *_, (kind, data) = events(connection.getresponse())
    assert kind == "error" and "timeout" in data["detail"]
    with socket.create_connection(("127.0.0.1", server.port)) as client:  # sends no body
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_model_that_fails_is_no_stack_trace(runs: Path, serving: Callable[..., Server], capfd: Any) -> None:
    classify = predict.load(runs / "sst2")
    bias = classify.trained.model.head.linear.bias
    bias[...] = bias[...] * np.nan
    server = serving(classify)
    status, _, answer = server.ask("POST", "/predict", {"text": "a"})
    assert (status, answer) == (500, {"detail": http_api.FAILED})
    assert "not JSON compliant" in capfd.readouterr().err
    assert server.ask("GET", "/health")[0] == 200


def test_a_token_is_wanted(servers: dict[str, Server], serving: Callable[..., Server]) -> None:
    server = serving(servers["sst2"].predictor, token="secret")
    assert server.ask("POST", "/predict", {"text": "a"})[0] == 200
    for path in ("/predict", "/attention", "/metrics", "/elsewhere"):
        status, headers, _ = server.ask("POST", path, {"text": "a"}, Authorization="Bearer secre")
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    for path in ("/", "/health", "/docs", "/openapi.json"):
        assert server.ask("GET", path, Authorization="")[0] == 200
    # Nor does a host that looks like such an address.
    assert server.ask("GET", "/metrics", Authorization="", Host="localhost/health?")[0] == 401


def sent(server: Server, request: bytes) -> tuple[int, Any, bytes]:
    """Send bytes in one go, as they are; return the status, the headers and the body of the answer."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        return answer.status, answer.headers, answer.read()


def is_of(schema: dict[str, Any], value: Any, types: dict[str, Any]) -> bool:
    """Return whether a value is of a schema, and has no field that the schema lacks."""
    if "$ref" in schema:
        return is_of(types[schema["$ref"].rpartition("/")[2]], value, types)
    if "anyOf" in schema:
        return any(is_of(choice, value, types) for choice in schema["anyOf"])
    if schema["type"] == "array":
        return isinstance(value, list) and all(is_of(schema["items"], x, types) for x in value)
    if schema["type"] == "object":
        if not isinstance(value, dict) or not set(schema.get("required", ())) <= value.keys():
            return False
        fields, others = schema.get("properties", {}), schema.get("additionalProperties")
        has_all = others is not None or value.keys() <= fields.keys()
        return has_all and all(is_of(fields.get(name, others), x, types) for name, x in value.items())
    kinds = {"string": str, "integer": int, "number": (int, float), "null": type(None)}
    return isinstance(value, kinds[schema["type"]])


@pytest.mark.parametrize("task", ["sst2", "gpt"])
def test_every_status_of_an_address_is_in_the_schema(
    task: str, runs: Path, servers: dict[str, Server], serving: Callable[..., Server]
) -> None:
    predictor = servers[task].predictor
    server, full = (serving(predictor, token="secret", requests=n, body=2000) for n in (100, 1))
    dead = serving(predictor, seconds=0.5)
    dead.engine.close()
    broken = serving(predict.load(runs / task))
    broken.predictor.tokenizer = None
    schema = server.ask("GET", "/openapi.json")[2]
    texts = {"/attention": "text", "/predict": "text" if task == "sst2" else "prompt", "/generate": "prompt"}
    headers = "Host: localhost\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"

    def request(method: str, path: str, body: bytes = b"", length: int | None = None, headers: str = headers) -> bytes:
        n = len(body) if length is None else length
        return f"{method} {path} HTTP/1.1\r\n{headers}Content-Length: {n}\r\n\r\n".encode() + body

    def held(path: str) -> tuple[int, Any, bytes]:
        """Return an answer to a request while another one is still being sent."""
        with socket.create_connection(("127.0.0.1", full.port)) as other:
            other.sendall(request("POST", path, length=5))
            while (answer := sent(full, request("POST", path)))[0] != 429:
                time.sleep(0.01)  # the other has not come in yet
            return answer

    for path, methods in schema["paths"].items():
        ((method, described),) = methods.items()
        anonymous = headers.replace("Bearer secret", "none")
        elsewhere = headers.replace("localhost", "elsewhere.example")
        if method == "get":
            got = [sent(server, request("GET", path)), sent(server, request("GET", path, headers=elsewhere))]
            got += [sent(server, request("GET", path, headers=anonymous))]
            got += [sent(dead, request("GET", path))]
        else:
            body = json.dumps({texts[path]: "the cat"}).encode()
            got = [sent(server, request("POST", path, x)) for x in (body, b"{}", b'"\xff"', b"[" * 1999, b"a" * 2001)]
            got += [sent(server, request("POST", path, body, headers=x)) for x in (elsewhere, anonymous)]
            got += [held(path), sent(dead, request("POST", path, length=5)), sent(dead, request("POST", path, body))]
            got += [sent(broken, request("POST", path, body))]
        got += [sent(server, b"no HTTP\r\n\r\n")]
        assert {str(status) for status, _, _ in got} == described["responses"].keys()
        for status, answered, content in got:
            kind = answered["Content-Type"].partition(";")[0]
            shape = described["responses"][str(status)]["content"][kind]
            if kind == "application/json":
                assert is_of(shape["schema"], json.loads(content), schema["components"]["schemas"]), (path, status)
        assert ("security" in described) == ("401" in described["responses"]) == (path != "/health")
    without = dead.ask("GET", "/openapi.json")[2]["paths"].values()
    assert not [x for methods in without for x in methods.values() if "401" in x["responses"] or "security" in x]


def test_nobody_learns_where_the_run_lies(
    serving: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_runs.write(tmp_path / "acme" / "churn", "sst2")
    alone = shutil.copytree(run / "checkpoints" / "3", tmp_path / "acme" / "alone")
    monkeypatch.chdir(run)
    for checkpoint, name in (
        (run, "churn"),
        (Path("."), "churn"),
        (run / "checkpoints" / "3", "churn"),
        (alone, "alone"),
    ):
        predictor = predict.load(checkpoint, str(run / "tokenizer.json"))
        for token in ("", "secret"):
            server = serving(predictor, token, seconds=5.0)
            asked = [("GET", path, None) for path in (*http_api.PATHS, "/info", "/../churn")]
            asked += [
                ("POST", path, body) for path in http_api.PATHS for body in ({"text": "a"}, {"text": "a " * 40}, b"[")
            ]
            answers = [server.ask(*request, Authorization="Bearer none") for request in asked]
            text = " ".join(f"{headers} {content}" for _, headers, content in answers)
            leaks = [tmp_path.name, "acme", "checkpoints", *(["churn", "alone"] if token else [])]
            assert [leak for leak in leaks if leak in text] == []
            assert token or (f"<title>Classify a text: {name}<" in text and f"Interface to {name}'" in text)


def test_pages_load_nothing(servers: dict[str, Server]) -> None:
    for server in servers.values():
        _, headers, shown = server.ask("GET", "/")
        found = Page(shown)
        links = [attrs.get("href") or attrs.get("src") for _, attrs in found.tags if {"href", "src"} & attrs.keys()]
        assert links == ["data:,", "docs"]
        (script,) = re.findall("<script>(.*?)</script>", shown, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy
        _, _, docs = server.ask("GET", "/docs")
        _, _, schema = server.ask("GET", "/openapi.json")
        assert "script" not in docs and all(f"{path}</h2>" in docs for path in schema["paths"])
        assert ("/generate" in schema["paths"]) == (server is servers["gpt"])


def test_attention_is_the_predictors(servers: dict[str, Server]) -> None:
    for server in servers.values():
        status, _, answer = server.ask("POST", "/attention", {"text": "the cat sat", "layer": 1, "head": 2})
        assert (status, answer) == (200, server.predictor.attention("the cat sat", 1, 2))
        assert len(answer["weights"]) == len(answer["tokens"]) >= 4
        np.testing.assert_allclose(np.sum(answer["weights"], axis=1), 1, atol=1e-4)


def test_at_its_end_it_answers_what_was_asked(runs: Path) -> None:
    command = [sys.executable, "-m", "jaxlm.serve", "--checkpoint", str(runs / "gpt"), "--port", "0"]
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE) as process:
        assert process.stderr
        lines = [next(process.stderr)]
        while not lines[-1].startswith("serving "):  # jaxlib 0.10.0 and slow machines say more
            lines.append(next(process.stderr))
        assert f"{runs}/gpt/checkpoints/3 (task gpt, step 3): compiling\n" in lines
        port = int(re.fullmatch(r"serving http://127\.0\.0\.1:(\d+)/\n", lines[-1])[1])  # type: ignore[index]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = {"prompt": "the", "max_new_tokens": LENGTH, "temperature": 3.0, "top_p": 1.0, "seed": 1}
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        stream = events(connection.getresponse())
        assert next(stream)[0] == "piece"
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1][0] == "answer"
        connection.close()
        assert process.stderr.read() == "all requests are answered; stopped\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--checkpoint", "none", "--port", "0"], "none: there is no such run or checkpoint"),
        (["--checkpoint", "RUN", "--port", "70000"], "--port 70000: must be 0 to 65535"),
        (["--checkpoint", "RUN", "--port", "TAKEN"], "cannot be served (Address already in use); give another"),
        (["--checkpoint", "RUN", "--timeout", "0"], "--timeout 0.0: must be above 0"),
        (["--checkpoint", "RUN", "--timeout", "inf"], "--timeout inf: must be above 0, and below 2147483648"),
        (["--checkpoint", "RUN", "--host", "a..b", "--port", "0"], "--host a..b --port 0: cannot be served ("),
        (["--checkpoint", "RUN", "--host", "0.0.0.0"], "set JAXLM_TOKEN in the environment to a secret"),
        (["--checkpoint", "RUN", "--host", "no.such.host.invalid"], "set JAXLM_TOKEN"),
        ([], "the following arguments are required: --checkpoint"),
    ],
)
def test_bad_commands_are_one_line(
    argv: list[str],
    message: str,
    runs: Path,
    servers: dict[str, Server],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"RUN": str(runs / "sst2"), "TAKEN": str(servers["sst2"].port)}
    if "a..b" in argv:
        monkeypatch.setenv(serve.TOKEN, "secret")
    with pytest.raises(SystemExit) as error:
        serve.main([given.get(arg, arg) for arg in argv])
    captured = capsys.readouterr()
    assert (error.value.code, captured.out, len(captured.err.splitlines())) == (2, "", 1) and message in captured.err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        try:
            chromium = html_page.browser(started)
        except UserError:
            pytest.skip("no Chromium")
        yield chromium
        chromium.close()


@contextlib.contextmanager
def shown(browser: Any, server: Server, width: int = 360, colours: str = "dark") -> Iterator[Any]:
    """Open the page, and see that it fits, loads nothing from elsewhere and has no errors."""
    tab = browser.new_page(viewport={"width": width, "height": 700}, color_scheme=colours)
    told: list[str] = []
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("console", lambda line: told.append(line.text) if line.type == "error" else None)
    tab.on("request", lambda request: None if request.url.startswith(address) else told.append(request.url))
    address = f"http://127.0.0.1:{server.port}/"
    tab.goto(address)
    tab.locator("#text:focus").wait_for()  # it gets the focus after the page has loaded; keys before that go nowhere
    yield tab
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert [line for line in told if "the server responded with a status of 4" not in line] == []
    tab.close()


def type_in(tab: Any, text: str) -> None:
    """Ask by the keyboard alone, from the text, which has the focus at first."""
    tab.keyboard.press("Control+A")
    tab.keyboard.type(text)
    tab.keyboard.press("Control+Enter")


def copied(tab: Any) -> str:
    """Return what the button copies, pasted."""
    tab.press("#copy", "Enter")
    tab.locator("#copied", has_text="Copied.").wait_for()
    before = tab.input_value("#text")
    tab.fill("#text", "")
    tab.press("#text", "Control+V")
    pasted = tab.input_value("#text")
    tab.fill("#text", before)
    return str(pasted)


def percent(p: float) -> str:
    return f"{100 * p:.1f}%"


@pytest.mark.slow
def test_the_page_fills_masks(browser: Any, servers: dict[str, Server]) -> None:
    (expected,) = servers["mlm"].predictor(["the cat [MASK] on the [MASK]"])
    for width, colours in ((1000, "light"), (360, "dark")):
        with shown(browser, servers["mlm"], width, colours) as tab:
            type_in(tab, "the cat [MASK] on the [MASK]")
            masks = tab.locator(".mask")
            masks.nth(1).wait_for()
            for i, guesses in enumerate(expected["masks"]):
                found = masks.nth(i).locator(".bar span").all_text_contents()
                assert found == [guess["token"] for guess in guesses]
                found = masks.nth(i).locator(".bar i").all_text_contents()
                assert found == [percent(guess["probability"]) for guess in guesses]
            assert copied(tab) == expected["filled"]
            second = f" {expected['masks'][1][1]['token']}".replace(" ##", "")
            masks.nth(1).locator("button").nth(1).press("Enter")
            masks.nth(1).wait_for(state="detached")
            assert tab.input_value("#text") == f"the cat [MASK] on the{second}"
            tab.locator(".words > button", has_text="cat").press("Enter")
            masks.nth(1).wait_for()
            assert tab.input_value("#text") == f"the [MASK] [MASK] on the{second}"
            tab.focus("#text")
            type_in(tab, "no such thing")
            tab.locator("#state.wrong").wait_for()
            assert tab.inner_text("#state").startswith("text: there is no [MASK] in the text")
            tab.press("#mask", "Enter")
            assert tab.input_value("#text") == "no such thing[MASK]"
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") in (
                "rgb(255, 255, 255)" if colours == "light" else "rgb(20, 22, 26)"
            )


@pytest.mark.slow
def test_the_page_streams_a_continuation(browser: Any, servers: dict[str, Server]) -> None:
    server = servers["gpt"]
    options = {"max_new_tokens": 450, "temperature": 2.0, "seed": 3}
    (expected,) = server.predictor(["the cat"], **options)
    with shown(browser, server) as tab:
        for name, value in options.items():
            tab.fill(f"#{name}", str(value))
        # So slow that the answer, of 30 kB, does not come at once, however late the browser reads it.
        slow = {"offline": False, "latency": 0, "downloadThroughput": 10_000, "uploadThroughput": -1}
        tab.context.new_cdp_session(tab).send("Network.emulateNetworkConditions", slow)
        tab.evaluate(
            "window.n = 0; new MutationObserver(() => n++).observe(document.querySelector('#told'), "
            "{childList: true, subtree: true})"
        )
        tab.focus("#text")
        type_in(tab, "the cat")
        tab.locator("#state", has_text="seed 3").wait_for()
        assert tab.locator(".made").text_content() == terminal.shown("the cat" + expected["continuation"])
        assert tab.evaluate("n") > 5
        tab.evaluate("document.querySelector('#go').click(); document.querySelector('#stop').click()")
        tab.locator("#state", has_text="Stopped.").wait_for()
        until_s = time.monotonic() + 120
        while server.figures()["jaxlm_open_requests"] and time.monotonic() < until_s:
            time.sleep(0.02)
        assert server.figures()["jaxlm_open_requests"] == 0


@pytest.mark.slow
def test_a_continuation_is_copied_and_continued(browser: Any, serving: Callable[..., Server], tmp_path: Path) -> None:
    found = load.load(tiny_runs.write(tmp_path / "run", "gpt", **{"model.seq_len": 256}), precision="float32")
    bias = found.model.head.linear.bias
    tokens = [found.tokenizer.decode([i]) for i in range(len(bias[...]))]
    # A text area does not keep control characters as they are.
    bias[...] = np.where([token.isascii() and token.isprintable() and token != "" for token in tokens], 0.0, -1e9)
    server = serving(predictors.Continue(found))
    for clipboard in ("granted", "denied", "missing"):
        with shown(browser, server) as tab:
            setting = {"permission": {"name": "clipboard-write"}, "setting": clipboard}
            if clipboard == "missing":  # as at an address that is neither https nor this host's
                tab.evaluate("delete Navigator.prototype.clipboard")
            else:
                tab.context.new_cdp_session(tab).send("Browser.setPermission", setting)
            assert tab.input_value("#max_new_tokens") == "100" and tab.is_hidden("#use")
            prompt = "the cat"
            tab.fill("#seed", "3")
            tab.focus("#text")
            type_in(tab, prompt)
            tab.locator("#state", has_text="seed 3").wait_for()
            (expected,) = server.predictor([prompt], max_new_tokens=100, seed=3)
            prompt += expected["continuation"]
            assert copied(tab) == prompt
    with shown(browser, server) as tab:
        tab.fill("#seed", "3")
        tab.focus("#text")
        type_in(tab, "the cat")
        tab.locator("#state", has_text="seed 3").wait_for()
        for seed in range(4, 9):  # more than there are positions
            tab.fill("#seed", str(seed))
            tab.press("#more", "Enter")
            tab.locator("#state", has_text=f"seed {seed}").wait_for()
            before, whole = tab.input_value("#text"), str(tab.locator(".made").text_content())
            assert prompt.endswith(before) and whole.startswith(before) and len(whole) > len(before)
            assert seed > 4 or before == prompt
            prompt = prompt + whole.removeprefix(before)
        assert len(before) < len(prompt) / 2


@pytest.mark.slow
def test_the_attention_matrix_names_its_tokens(browser: Any, servers: dict[str, Server]) -> None:
    server = servers["gpt"]
    text = " ".join(f"the cat {i}" for i in range(20))
    looked = server.predictor.attention(text, 0, 0)
    names = [token.strip() or "␣" for token in looked["tokens"]]
    assert len(names) >= 60
    for width in (1000, 360):
        with shown(browser, server, width) as tab:
            tab.fill("#text", text)
            tab.press("#look summary", "Enter")
            tab.locator("#matrix").wait_for()
            assert tab.locator("#grid .rows span").all_text_contents() == names
            assert tab.locator("#grid .columns span").all_text_contents() == names
            canvas = tab.locator("#grid canvas")
            size = canvas.bounding_box()
            cell = size["width"] / len(names)
            assert size["height"] == size["width"] and cell >= 12
            for kind, side, length in (("rows", "y", "height"), ("columns", "x", "width")):
                boxes = [span.bounding_box() for span in tab.locator(f"#grid .{kind} span").all()]
                for i in (0, 1, 30, len(names) - 1):  # beside its cells, as high or as wide as they are
                    assert boxes[i][side] == pytest.approx(size[side] + i * cell, abs=1)
                    assert boxes[i][length] == pytest.approx(cell, abs=1)
            assert (
                tab.evaluate("parseFloat(getComputedStyle(document.querySelector('#grid span.chosen')).fontSize)") >= 11
            )
            canvas.hover(position={"x": 2.5 * cell, "y": 5.5 * cell})
            assert tab.inner_text("#axes") == f"{names[5]} looks at {names[2]}: {percent(looked['weights'][5][2])}"
            canvas.click(position={"x": 2.5 * cell, "y": 7.5 * cell})
            buttons = tab.locator("#tokens button i").all_text_contents()
            assert buttons == [percent(p) for p in looked["weights"][7]]
            # Names stay in sight where the matrix is scrolled.
            tab.evaluate("document.querySelector('#matrix').scrollTo(500, 500)")
            area, row = (tab.locator(x).first.bounding_box() for x in ("#matrix", "#grid .rows"))
            assert row["x"] == pytest.approx(area["x"], abs=1)


@pytest.mark.slow
def test_the_page_classifies_and_shows_attention(browser: Any, serving: Callable[..., Server], tmp_path: Path) -> None:
    classes = ("negative", "<b>neutral</b> \u202e", "positive" * 20)
    server = serving(predict.load(tiny_runs.write(tmp_path / "run", "sst2", classes=classes)), token="secret")
    (expected,) = server.predictor(["the dog sat"])
    looked = server.predictor.attention("the dog sat", 1, 2)
    with shown(browser, server) as tab:
        tab.focus("#text")
        type_in(tab, "the dog sat")
        tab.locator("#state", has_text="the token is missing or wrong").wait_for()
        tab.focus("#token")
        tab.keyboard.type("secret")
        tab.keyboard.press("Enter")
        tab.locator(".classes b").wait_for()
        assert tab.inner_text(".classes > b") == terminal.shown(f"Label {expected['label']}")
        assert tab.locator(".classes .bar span").all_text_contents() == [terminal.shown(name) for name in classes]
        found = tab.locator(".classes .bar i").all_text_contents()
        assert found == [percent(p) for p in expected["probabilities"].values()]
        tab.press("#look summary", "Enter")
        tab.locator("#tokens button").first.wait_for()
        tab.select_option("#layer", "1")
        tab.select_option("#head", "2")
        tab.locator('#grid[aria-label="Attention of layer 1, head 2"]').wait_for()
        buttons = tab.locator("#tokens button")
        assert buttons.locator("span").all_text_contents() == looked["tokens"]
        last = len(looked["tokens"]) - 1
        for chosen, key in ((last, "End"), (0, "Home"), (1, "ArrowRight")):
            tab.locator("#tokens button[aria-pressed=true]").press(key)
            assert buttons.locator("i").all_text_contents() == [percent(p) for p in looked["weights"][chosen]]
