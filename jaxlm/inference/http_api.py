"""The HTTP interface of `python -m jaxlm.serve`: endpoints, schemas, limits, page. batching.py runs the model.

SERVE.md describes the endpoints.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxlm.errors import UserError
from jaxlm.inference.batching import Engine, Failed
from jaxlm.inference.limits import Limits
from jaxlm.inference.predictors import (
    ENDINGS,
    Answer,
    Classify,
    Continue,
    Embed,
    FillMasks,
    Labels,
    Look,
    Predict,
    Predictor,
    Reply,
    Tag,
)
from jaxlm.io import storage, utf8
from jaxlm.reporting import html_page
from jaxlm.terminal import dumps

PATHS = ("/", "/predict", "/generate", "/attention", "/health", "/metrics", "/docs", "/openapi.json")
OPEN = ("/", "/health", "/docs", "/openapi.json")  # without authentication
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
EVENTS = "text/event-stream"
RETRY = {"Retry-After": "1"}  # seconds
TOO_LONG = "timeout; try again, or ask for less"
FAILED = "the model has failed; see the server's log"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Strict(BaseModel):
    """A request: exact types, no extra fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Guess(BaseModel):
    token: str
    id: int
    probability: float


class Filled(BaseModel):
    text: str
    filled: str = Field(description="the text with the likeliest tokens")
    masks: list[list[Guess]] = Field(description="for each mask, the likeliest tokens in order")


class Continued(BaseModel):
    prompt: str
    continuation: str
    tokens: int = Field(description="number of new tokens")
    ending: str = Field(description="article, length or positions")
    seed: int = Field(description="reproduces this continuation")


class Classified(BaseModel):
    model_config = ConfigDict(extra="allow")  # `pair`, of a model of two texts

    text: str
    label: int | str | None = Field(
        description="name of the class, or its number without a name; null: none (possible with the original's head)"
    )
    probabilities: dict[str, float] | list[float] = Field(description="by name of the class, or in order without names")


class Labelled(BaseModel):
    model_config = ConfigDict(extra="allow")  # `pair`, of a model of two texts

    text: str
    labels: list[str] = Field(description="those with a probability above 0.5")
    probabilities: dict[str, float] = Field(description="by name of the label; each is of its own")


class Span(BaseModel):
    type: str
    start: int = Field(description="number of its first character in the text, from 0")
    end: int = Field(description="number of the character behind it")
    text: str
    probability: float = Field(description="the lowest of the probabilities of its words' tags")


class Tagged(BaseModel):
    text: str
    spans: list[Span]


class Embedded(BaseModel):
    text: str
    vector: list[float] = Field(description="of length 1")


class Predicted(BaseModel):
    model_config = ConfigDict(extra="allow")  # fields of the task's `answer`

    text: str


class Attended(BaseModel):
    model_config = ConfigDict(extra="allow")  # `pair`, of a model of two texts

    text: str
    layer: int
    head: int
    tokens: list[str]
    weights: list[list[float]] = Field(description="attention weights from each token to each token")


class Error(BaseModel):
    detail: str


class Health(BaseModel):
    status: str = Field(description="ready or failed")
    task: str
    step: int = Field(description="number of training updates")


# By predictor: kind and title of its page, and schema of its answers.
KINDS: dict[type[Predictor], tuple[str, str, type[BaseModel]]] = {
    FillMasks: ("fill", "Fill masks", Filled),
    Continue: ("continue", "Continue a text", Continued),
    Reply: ("answer", "Answer a prompt", Continued),
    Classify: ("classify", "Classify a text", Classified),
    Labels: ("classify", "Label a text", Labelled),
    Predict: ("predict", "Predict", Predicted),
    Tag: ("tag", "Find names", Tagged),
    Embed: ("predict", "Embed a text", Embedded),
    Look: ("look", "Attention", Attended),
}
PLAIN = {"content": {"text/plain": {"schema": {"type": "string"}}}}
# Requests that are not HTTP, or for another host name, are answered by the layers below, as plain text.
UNREADABLE: dict[int | str, dict[str, Any]] = {400: {"description": "not HTTP, or for another host", **PLAIN}}
ERRORS: dict[int, dict[str, Any]] = {
    400: {"model": Error, "description": "not HTTP, not UTF-8, nested too deeply, or for another host", **PLAIN},
    401: {"model": Error, "description": "the token is missing or wrong"},
    408: {"model": Error, "description": "the body has not arrived in time"},
    413: {"model": Error, "description": "the body is too large"},
    429: {"model": Error, "description": "too many concurrent requests; Retry-After says when to try again"},
    500: {"model": Error, "description": FAILED},
    503: {"model": Error, "description": "timeout; Retry-After says when to try again"},
}
REFUSALS = (400, 401, 408, 413, 429)  # of each endpoint with a request body


def make(engine: Engine, limits: Limits, token: str = "", is_loopback: bool = True) -> FastAPI:
    """Return the application. With a `token`, clients must send it; with `is_loopback`, they must be on this host."""
    predictor, metrics = engine.predictor, engine.metrics
    # Against DNS rebinding: a page whose host name resolves to this address would be same-origin for a browser.
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)] if is_loopback else []
    trained = predictor.trained
    # Pages and schema need no token, so with a token they do not name the run.
    name = "" if token else _run_name(predictor)
    app = FastAPI(
        title=f"Interface to {name or f'a model of {trained.config.task}'}",
        description=f"Task {trained.config.task}, step {trained.start.info['step']:,}.",
        docs_url=None,
        redoc_url=None,
        middleware=[Middleware(Guard, limits=limits, token=token, registry=metrics.registry), *hosts],
    )
    secured: dict[str, Any] = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if token else []}
    asked, looked = _asked(predictor, limits), _looked(predictor)
    text_field, *_ = asked.model_fields

    def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
        """Return the errors of an endpoint, for the schema; FastAPI adds 422."""
        return {status: ERRORS[status] for status in statuses if status != 401 or token}

    def unpacked(request: BaseModel) -> tuple[str, dict[str, Any]]:
        """Return the text and the options of a request."""
        options = request.model_dump()
        text = utf8.joined(options.pop(text_field), options.pop("pair", None))
        return text, predictor.checked(options) if isinstance(predictor, Continue) else options

    if type(predictor) is not Look:

        @app.post(
            "/predict", responses={200: {"model": KINDS[type(predictor)][2]}, **errors(*REFUSALS, 500, 503)}, **secured
        )
        async def predict(request: asked) -> Response:  # type: ignore[valid-type]
            """Answer a text: fill its masks, continue it, classify it, tag it, or use the task's predictor."""
            async with _in_time(limits):
                return Json(await engine.answer(*unpacked(request)))

    if isinstance(predictor, Continue):
        described = {
            "description": 'events: "piece" with {text}, repeatedly; then "answer" with the answer of /predict, or '
            '"error" with {detail}',
            "content": {EVENTS: {}},
        }

        @app.post("/generate", response_class=Response, responses={200: described, **errors(*REFUSALS, 500)}, **secured)
        async def generate(request: asked) -> Response:  # type: ignore[valid-type]
            """Continue a prompt, and stream the continuation by server-sent events."""
            events = _events(engine, limits, *unpacked(request))
            return StreamingResponse(events, media_type=EVENTS, headers={"Cache-Control": "no-store"})

    if predictor.has_attention:

        @app.post("/attention", responses={200: {"model": Attended}, **errors(*REFUSALS, 500, 503)}, **secured)
        async def attention(request: looked) -> Response:  # type: ignore[valid-type]
            """Return the attention weights of one head, from each token of a text to each token."""
            async with _in_time(limits):
                body = request.model_dump()  # type: ignore[attr-defined]
                text = utf8.joined(body["text"], body.get("pair"))
                return Json(await engine.answer(text, look=(body["layer"], body["head"])))

    is_failed = {"model": Health, "description": "requests are not answered"}

    @app.get("/health", responses={200: {"model": Health}, **UNREADABLE, 503: is_failed})
    async def health() -> Response:
        """Return whether requests are answered."""
        status, code = ("ready", 200) if engine.is_alive() else ("failed", 503)
        return Json({"status": status, "task": trained.config.task, "step": trained.start.info["step"]}, code)

    @app.get("/metrics", response_class=Response, responses={200: PLAIN, **UNREADABLE, **errors(401)}, **secured)
    async def figures() -> Response:
        """Return metrics for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_docs(app.openapi()), headers=HEADERS)

    shown, headers = _page(predictor, asked, name, bool(token))

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(shown, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> Response:
        # Without the input, which may not be valid JSON.
        details = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
        if details[0]["loc"] == ("body",):
            details[0]["msg"] = "Must be a JSON object, sent with Content-Type: application/json"
        return Json({"detail": details}, 422)

    return app


def _asked(predictor: Predictor, limits: Limits) -> type[BaseModel]:
    """Return the schema of a request for an answer; its first field is the text."""
    model, defaults = predictor.model, predictor.options
    Taken = Annotated[str, _check_of(predictor.encode)]  # noqa: N806  # it is a type
    takes = predictor.wants + ("" if isinstance(predictor, Tag | Embed) else f"; at most {model.seq_len} tokens")
    if isinstance(predictor, FillMasks):
        most = min(model.vocab_size, 100)

        class Fill(Strict):
            text: Taken = Field(description=takes)
            top_k: int = Field(min(defaults["top_k"], most), ge=1, le=most, description="guesses for each mask")

        return Fill
    if isinstance(predictor, Look) and predictor.takes_two:

        class Texts(Strict):
            text: str = Field(description="the first text")
            pair: Annotated[str, _check_of(predictor.encode)] = Field(description="the second text; both: " + takes)

        return Texts
    if isinstance(predictor, Look):

        class Text(Strict):
            text: Taken = Field(description=takes)

        return Text
    # By default, a prompt of up to half of the positions is continued to the full length.
    length = max(1, min(defaults["max_new_tokens"], limits.new_tokens, model.seq_len // 2))

    class Prompt(Strict):
        prompt: Taken = Field(description=takes)
        max_new_tokens: int = Field(length, ge=1, le=limits.new_tokens, description="maximum number of new tokens")
        temperature: float = Field(
            defaults["temperature"], ge=0, allow_inf_nan=False, description="divides the logits; 0: greedy"
        )
        top_k: int = Field(defaults["top_k"], ge=0, lt=2**31, description="sample from the k likeliest tokens; 0: all")
        top_p: float = Field(
            defaults["top_p"], gt=0, le=1, description="of these, from the fewest whose probabilities sum to p"
        )
        seed: int | None = Field(None, ge=0, lt=2**32, description="of the random numbers; null: random")

    return Prompt


def _looked(predictor: Predictor) -> type[BaseModel]:
    Taken = Annotated[str, _check_of(predictor.encode_any)]  # noqa: N806  # it is a type

    if predictor.takes_two:

        class LookAtTwo(Strict):
            text: str = Field(description="the first text")
            pair: Taken = Field(description=f"the second text; both of {predictor.model.seq_len} tokens at most")
            layer: int = Field(0, ge=0, lt=predictor.model.n_layers, description="counted from 0")
            head: int = Field(0, ge=0, lt=predictor.model.n_heads, description="counted from 0")

        return LookAtTwo

    class Look(Strict):
        text: Taken = Field(description=f"at most {predictor.model.seq_len} tokens")
        layer: int = Field(0, ge=0, lt=predictor.model.n_layers, description="counted from 0")
        head: int = Field(0, ge=0, lt=predictor.model.n_heads, description="counted from 0")

    return Look


def _check_of(encode: Callable[[str], Any]) -> AfterValidator:
    """Return a validator that refuses texts that the model cannot encode."""

    def check(text: str, info: ValidationInfo) -> str:
        try:
            encode(utf8.joined(info.data.get("text", ""), text) if info.field_name == "pair" else text)
        except UserError as error:
            raise PydanticCustomError("value_error", "{reason}", {"reason": str(error)}) from None
        return text

    return AfterValidator(check)


@contextlib.asynccontextmanager
async def _in_time(limits: Limits) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(limits.seconds):
            yield
    except TimeoutError:
        raise HTTPException(503, TOO_LONG, RETRY) from None
    except Failed:
        raise HTTPException(500, FAILED) from None


async def _events(engine: Engine, limits: Limits, text: str, options: dict[str, Any]) -> AsyncIterator[str]:
    until_s = time.monotonic() + limits.seconds
    async with contextlib.aclosing(engine.stream(text, options)) as said:
        try:
            while isinstance(piece := await asyncio.wait_for(anext(said), until_s - time.monotonic()), str):
                yield _event("piece", {"text": piece})
            yield _event("answer", piece)
        except TimeoutError:
            yield _event("error", {"detail": TOO_LONG})
        except Failed:
            yield _event("error", {"detail": FAILED})


def _event(kind: str, data: Answer) -> str:
    return f"event: {kind}\ndata: {dumps(data)}\n\n"


class Json(JSONResponse):
    """JSON in printable ASCII, safe to show on a terminal."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Guard:
    """Middleware: checks the token and the limits, cancels requests of disconnected clients, and counts."""

    def __init__(self, app: ASGIApp, limits: Limits, token: str, registry: CollectorRegistry):
        self.app, self.limits, self.token = app, limits, f"Bearer {token}".encode() if token else b""
        self.n = 0  # open requests
        kinds = ("method", "path", "status")
        self.counted = Counter("jaxlm_requests", "Requests by status", kinds, registry=registry)
        self.seconds = Histogram("jaxlm_request_seconds", "Time to the end of an answer", ["path"], registry=registry)
        Gauge("jaxlm_open_requests", "Open requests", registry=registry).set_function(lambda: self.n)
        ProcessCollector(registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = "gone"  # the client, before the answer
        started_s = time.monotonic()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._answer(scope, receive, noting)
        except HTTPException as error:
            await Json({"detail": error.detail}, error.status_code, error.headers)(scope, receive, noting)
        except ClientDisconnect:
            pass
        except Exception:
            traceback.print_exc()
            if status == "gone":
                await Json({"detail": FAILED}, 500)(scope, receive, noting)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.counted.labels(scope["method"] if path != "other" else "", path, status).inc()
            self.seconds.labels(path).observe(time.monotonic() - started_s)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if self.token and scope["path"] not in OPEN:  # not the path of request.url, which uses the client's Host header
            if not secrets.compare_digest(request.headers.get("authorization", "").encode(), self.token):
                raise HTTPException(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        if request.method != "POST":
            return await self.app(scope, receive, send)
        if self.n >= self.limits.requests:
            raise HTTPException(429, f"{self.limits.requests} requests are open; try again soon", RETRY)
        self.n += 1
        try:
            body = await self._body(request)
            await self._answer_while_there(body, scope, receive, send)
        finally:
            self.n -= 1

    async def _body(self, request: Request) -> bytes:
        """Return the body. Raises HTTPException if it is too long, too slow or not UTF-8."""
        body = b""
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.limits.body:
                        raise HTTPException(413, f"the body has more than {self.limits.body} bytes")
            return utf8.decode(body).encode()
        except TimeoutError:
            raise HTTPException(408, f"the body has not arrived in {self.limits.seconds:g} s") from None
        except ValueError as error:
            raise HTTPException(400, f"the body is {error}") from None

    async def _answer_while_there(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; cancel it if the client disconnects."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await asyncio.Future()

        answering = asyncio.ensure_future(self.app(scope, receive_again, send))
        leaving = asyncio.ensure_future(receive())  # the next message can only be the disconnection
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            leaving.cancel()
            answering.cancel()


def _run_name(predictor: Predictor) -> str:
    start = predictor.trained.start
    path = start.run or start.path
    assert path is not None, "a model that is served was read from somewhere"
    return storage.absolute(path).name


def _page(predictor: Predictor, asked: type[BaseModel], name: str, wants_token: bool) -> tuple[str, dict[str, str]]:
    """Return the HTML page and its headers. `name` is that of the run, "": not shown."""
    kind, title, _ = KINDS[type(predictor)]
    fields = asked.model_json_schema()["properties"]
    about = {
        "kind": kind,
        "options": {name: field for name, field in fields.items() if "default" in field},
        "between": getattr(predictor, "between", ""),
        "isByteLevel": predictor.is_byte_level,
        "layers": predictor.model.n_layers if predictor.has_attention else 0,
        "heads": predictor.model.n_heads,
        "positions": predictor.model.seq_len,
        "endings": ENDINGS,
        "wantsToken": wants_token,
        "takesTwo": predictor.takes_two,
    }
    fragment = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", fragment, re.DOTALL)
    assert script
    title = f"{title}: {name}" if name else title
    data = json.dumps(about).replace("<", "\\u003c")
    parts = [f'<script type="application/json" id="about">{data}</script>', fragment]
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = HEADERS["Content-Security-Policy"] + f"; script-src 'sha256-{digest}'; connect-src 'self'"
    return html_page.page(title, parts), HEADERS | {"Content-Security-Policy": policy}


def _docs(schema: dict[str, Any]) -> str:
    """Return an HTML page about the endpoints. Unlike FastAPI's own, it loads no scripts from elsewhere."""
    types = schema["components"]["schemas"]
    parts = ['<p>For programs: <a href="openapi.json">openapi.json</a>. For people: <a href="./">the page</a>.</p>']
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            heading = f"{method.upper()} {html_page.text(path)}"
            parts.append(f"<h2>{heading}</h2><p>{html_page.text(operation['description'])}</p>")
            if "requestBody" in operation:
                parts.append(_fields("takes", types[_content(operation["requestBody"])]))
            for status, answer in operation["responses"].items():
                parts.append(f"<p><b>{status}</b> {html_page.text(answer['description'])}</p>")
                if status == "200" and (name := _content(answer)) in types:
                    parts.append(_fields("gives", types[name]))
    return html_page.page(schema["info"]["title"], parts)


def _content(described: dict[str, Any]) -> str:
    """Return the name of the type of a body; "": it is not JSON."""
    return _type(described.get("content", {}).get("application/json", {}).get("schema", {}))


def _type(schema: dict[str, Any]) -> str:
    """Return the name of a type, such as "list of Guess"."""
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    return schema.get("$ref", schema.get("type", "")).rpartition("/")[2]


def _fields(name: str, of: dict[str, Any]) -> str:
    """Return a table of the fields of an object."""
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    lines = []
    for field, schema in of["properties"].items():
        limits = (f"{word} {schema[key]:,.15g}" for key, word in bounds.items() if key in schema)
        kind = " ".join([_type(schema), *limits])
        if "default" in schema:
            kind += f"; default {json.dumps(schema['default'])}"
        lines.append([field, kind, schema.get("description", "")])
    return html_page.table([name, "", ""], lines, name)
