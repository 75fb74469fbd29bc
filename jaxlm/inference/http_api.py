"""The web service of `python -m jaxlm.serve`: its addresses, what they take and give, its limits. SERVE.md has them.

Nothing here computes: batching.py does.
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
    TAB,
    Answer,
    Classify,
    Continue,
    FillMasks,
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
OPEN = ("/", "/health", "/docs", "/openapi.json")  # need no token
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
EVENTS = "text/event-stream"
RETRY = {"Retry-After": "1"}  # seconds
TOO_LONG = "it has taken too long; try again, or ask for less"
FAILED = "the model has failed; the log of the server says why"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Strict(BaseModel):
    """What a request has: of the very types, and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Guess(BaseModel):
    token: str
    id: int
    probability: float


class Filled(BaseModel):
    text: str
    filled: str = Field(description="the text with the likeliest tokens in")
    masks: list[list[Guess]] = Field(description="for each mask, the likeliest tokens, the likeliest first")


class Continued(BaseModel):
    prompt: str
    continuation: str
    tokens: int = Field(description="how many were made")
    ending: str = Field(description="article, length or positions")
    seed: int = Field(description="with which it can be had again")


class Classified(BaseModel):
    model_config = ConfigDict(extra="allow")  # `pair`, of a model of two texts

    text: str
    label: int | str | None = Field(
        description="name of the class, or its number if it has no name; null: the original's head predicts none"
    )
    probabilities: dict[str, float] | list[float] = Field(
        description="by name of the class, or by number where there are no names"
    )


class Span(BaseModel):
    type: str
    start: int = Field(description="number of its first character in the text, from 0")
    end: int = Field(description="number of the character behind it")
    text: str
    probability: float = Field(description="the lowest of the probabilities of its words' tags")


class Tagged(BaseModel):
    text: str
    spans: list[Span]


class Predicted(BaseModel):
    model_config = ConfigDict(extra="allow")  # what the task's `answer` returns

    text: str


class Attended(BaseModel):
    model_config = ConfigDict(extra="allow")  # `pair`, of a model of two texts

    text: str
    layer: int
    head: int
    tokens: list[str]
    weights: list[list[float]] = Field(description="for each token, how much it looks at each")


class Error(BaseModel):
    detail: str


class Health(BaseModel):
    status: str = Field(description="ready or failed")
    task: str
    step: int = Field(description="updates that the model was trained for")


# What the page of a predictor does, the title of the page, and the answers.
KINDS: dict[type[Predictor], tuple[str, str, type[BaseModel]]] = {
    FillMasks: ("fill", "Fill masks", Filled),
    Continue: ("continue", "Continue a text", Continued),
    Reply: ("answer", "Answer a prompt", Continued),
    Classify: ("classify", "Classify a text", Classified),
    Predict: ("predict", "Predict", Predicted),
    Tag: ("tag", "Find names", Tagged),
    Look: ("look", "Attention", Attended),
}
PLAIN = {"content": {"text/plain": {"schema": {"type": "string"}}}}
# A host name that is not this host's, and what is no HTTP, are answered below this service, as plain text.
UNREADABLE: dict[int | str, dict[str, Any]] = {400: {"description": "not HTTP, or for another host", **PLAIN}}
ERRORS: dict[int, dict[str, Any]] = {
    400: {"model": Error, "description": "not HTTP, not UTF-8, nested too deeply, or for another host", **PLAIN},
    401: {"model": Error, "description": "the token is missing or wrong"},
    408: {"model": Error, "description": "the body has not arrived in time"},
    413: {"model": Error, "description": "the body is too large"},
    429: {"model": Error, "description": "too many requests at once; Retry-After says when to try again"},
    500: {"model": Error, "description": FAILED},
    503: {"model": Error, "description": "it has taken too long; Retry-After likewise"},
}
REFUSALS = (400, 401, 408, 413, 429)  # of each address that takes a body


def make(engine: Engine, limits: Limits, token: str = "", is_loopback: bool = True) -> FastAPI:
    """Return the service. With a `token`, clients have to send it; with `is_loopback`, they have to be of this host."""
    predictor, metrics = engine.predictor, engine.metrics
    # A page whose own name is made to lead here would be of the same origin as this service to a browser.
    hosts = [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)] if is_loopback else []
    trained = predictor.trained
    # Pages and schema are open to everybody: where there is a token, they do not name the run.
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
        """Return the errors of an address, for the schema; FastAPI adds 422."""
        return {status: ERRORS[status] for status in statuses if status != 401 or token}

    def parts(request: BaseModel) -> tuple[str, dict[str, Any]]:
        """Return the text and the options of a request."""
        options = request.model_dump()
        text = _joined(options.pop(text_field), options.pop("pair", None))
        return text, predictor.checked(options) if isinstance(predictor, Continue) else options

    if type(predictor) is not Look:

        @app.post(
            "/predict", responses={200: {"model": KINDS[type(predictor)][2]}, **errors(*REFUSALS, 500, 503)}, **secured
        )
        async def predict(request: asked) -> Response:  # type: ignore[valid-type]
            """Answer a text: fill its masks, continue it, classify it, find names in it, or what else the task does."""
            async with _in_time(limits):
                return Json(await engine.answer(*parts(request)))

    if isinstance(predictor, Continue):
        described = {
            "description": 'events: "piece" with {text}, again and again; at last "answer" with what /predict gives, '
            'or "error" with {detail}',
            "content": {EVENTS: {}},
        }

        @app.post("/generate", response_class=Response, responses={200: described, **errors(*REFUSALS, 500)}, **secured)
        async def generate(request: asked) -> Response:  # type: ignore[valid-type]
            """Continue a prompt, and send the continuation as it is made, by server-sent events."""
            events = _events(engine, limits, *parts(request))
            return StreamingResponse(events, media_type=EVENTS, headers={"Cache-Control": "no-store"})

    if predictor.has_attention:

        @app.post("/attention", responses={200: {"model": Attended}, **errors(*REFUSALS, 500, 503)}, **secured)
        async def attention(request: looked) -> Response:  # type: ignore[valid-type]
            """Tell, for each token of a text, how much a head of attention makes it look at each."""
            async with _in_time(limits):
                body = request.model_dump()  # type: ignore[attr-defined]
                text = _joined(body["text"], body.get("pair"))
                return Json(await engine.answer(text, look=(body["layer"], body["head"])))

    is_failed = {"model": Health, "description": "requests are not answered"}

    @app.get("/health", responses={200: {"model": Health}, **UNREADABLE, 503: is_failed})
    async def health() -> Response:
        """Tell whether requests are answered."""
        status, code = ("ready", 200) if engine.is_alive() else ("failed", 503)
        return Json({"status": status, "task": trained.config.task, "step": trained.start.info["step"]}, code)

    @app.get("/metrics", response_class=Response, responses={200: PLAIN, **UNREADABLE, **errors(401)}, **secured)
    async def figures() -> Response:
        """Return figures for Prometheus."""
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
        # Without what was sent, of which not everything can be written as JSON.
        told = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
        if told[0]["loc"] == ("body",):
            told[0]["msg"] = "Has to be an object of JSON, sent with Content-Type: application/json"
        return Json({"detail": told}, 422)

    return app


def _asked(predictor: Predictor, limits: Limits) -> type[BaseModel]:
    """Return what a request for an answer has; its first field is the text."""
    model, defaults = predictor.model, predictor.options
    Taken = Annotated[str, _check_of(predictor.encode)]  # noqa: N806  # it is a type
    takes = predictor.wants + ("" if isinstance(predictor, Tag) else f"; of {model.seq_len} tokens at most")
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
    # A prompt of up to half of the positions gets as much as is asked for by default.
    length = max(1, min(defaults["max_new_tokens"], limits.new_tokens, model.seq_len // 2))

    class Prompt(Strict):
        prompt: Taken = Field(description=takes)
        max_new_tokens: int = Field(length, ge=1, le=limits.new_tokens, description="tokens to make at most")
        temperature: float = Field(
            defaults["temperature"], ge=0, allow_inf_nan=False, description="what logits are divided by; 0: likeliest"
        )
        top_k: int = Field(defaults["top_k"], ge=0, lt=2**31, description="draw from so many likeliest tokens; 0: all")
        top_p: float = Field(
            defaults["top_p"], gt=0, le=1, description="and from the fewest whose probabilities sum to this"
        )
        seed: int | None = Field(None, ge=0, lt=2**32, description="of the random numbers; null: another each time")

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
        text: Taken = Field(description=f"of {predictor.model.seq_len} tokens at most")
        layer: int = Field(0, ge=0, lt=predictor.model.n_layers, description="counted from 0")
        head: int = Field(0, ge=0, lt=predictor.model.n_heads, description="counted from 0")

    return Look


def _check_of(encode: Callable[[str], Any]) -> AfterValidator:
    """Return what refuses a text, or two, that the model cannot take, as any other wrong field is refused."""

    def check(text: str, info: ValidationInfo) -> str:
        try:
            encode(_joined(info.data.get("text", ""), text) if info.field_name == "pair" else text)
        except UserError as error:
            raise PydanticCustomError("value_error", "{reason}", {"reason": str(error)}) from None
        return text

    return AfterValidator(check)


def _joined(text: str, pair: str | None) -> str:
    """Return a text as predictors take it: two with a tab between them."""
    return text if pair is None else f"{text.replace(TAB, ' ')}{TAB}{pair}"


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
            while isinstance(what := await asyncio.wait_for(anext(said), until_s - time.monotonic()), str):
                yield _event("piece", {"text": what})
            yield _event("answer", what)
        except TimeoutError:
            yield _event("error", {"detail": TOO_LONG})
        except Failed:
            yield _event("error", {"detail": FAILED})


def _event(kind: str, data: Answer) -> str:
    return f"event: {kind}\ndata: {dumps(data)}\n\n"


class Json(JSONResponse):
    """JSON in printable ASCII, for those who ask on a terminal."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Guard:
    """Lets in what keeps within the limits and has the token; lets go of what nobody waits for; counts."""

    def __init__(self, app: ASGIApp, limits: Limits, token: str, registry: CollectorRegistry):
        self.app, self.limits, self.token = app, limits, f"Bearer {token}".encode() if token else b""
        self.n = 0  # requests that are being answered
        kinds = ("method", "path", "status")
        self.counted = Counter("jaxlm_requests", "Requests, by how they ended", kinds, registry=registry)
        self.seconds = Histogram("jaxlm_request_seconds", "Time to the end of an answer", ["path"], registry=registry)
        going_on = Gauge("jaxlm_open_requests", "Requests that are being answered", registry=registry)
        going_on.set_function(lambda: self.n)
        ProcessCollector(registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = "gone"  # the client, before there was an answer
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
        if self.token and scope["path"] not in OPEN:  # not that of request.url, which is made of the client's Host
            if not secrets.compare_digest(request.headers.get("authorization", "").encode(), self.token):
                raise HTTPException(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})
        if request.method != "POST":
            return await self.app(scope, receive, send)
        if self.n >= self.limits.requests:
            raise HTTPException(429, f"{self.limits.requests} requests are being answered; try again soon", RETRY)
        self.n += 1
        try:
            body = await self._body(request)
            await self._answer_while_there(body, scope, receive, send)
        finally:
            self.n -= 1

    async def _body(self, request: Request) -> bytes:
        """Return the body, as UTF-8."""
        body = b""
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.limits.body:
                        raise HTTPException(413, f"the body has more than {self.limits.body} bytes")
            return utf8.decode(body).encode()
        except TimeoutError:
            raise HTTPException(408, f"the body has not come in {self.limits.seconds:g} s") from None
        except ValueError as error:
            raise HTTPException(400, f"the body is {error}") from None

    async def _answer_while_there(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; leave it where the client goes away."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await asyncio.Future()

        answering = asyncio.ensure_future(self.app(scope, receive_again, send))
        leaving = asyncio.ensure_future(receive())  # nothing else can come
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
    """Return the page for people, and its headers. `name` is that of the run, "": the page does not give it."""
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
    """Return a page of what the addresses take and give. It loads nothing, as the usual ones do."""
    types = schema["components"]["schemas"]
    parts = ['<p>For programs: <a href="openapi.json">openapi.json</a>. For people: <a href="./">the page</a>.</p>']
    for path, methods in schema["paths"].items():
        for method, told in methods.items():
            heading = f"{method.upper()} {html_page.text(path)}"
            parts.append(f"<h2>{heading}</h2><p>{html_page.text(told['description'])}</p>")
            if "requestBody" in told:
                parts.append(_fields("takes", types[_content(told["requestBody"])]))
            for status, answer in told["responses"].items():
                parts.append(f"<p><b>{status}</b> {html_page.text(answer['description'])}</p>")
                if status == "200" and (name := _content(answer)) in types:
                    parts.append(_fields("gives", types[name]))
    return html_page.page(schema["info"]["title"], parts)


def _content(described: dict[str, Any]) -> str:
    """Return the name of the type of a body; "": it is no JSON."""
    return _type(described.get("content", {}).get("application/json", {}).get("schema", {}))


def _type(schema: dict[str, Any]) -> str:
    """Return the name of a type, as in "Guess" for a list of lists of them, too."""
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    return schema.get("$ref", schema.get("type", "")).rpartition("/")[2]


def _fields(name: str, of: dict[str, Any]) -> str:
    """Return a table of what an object has."""
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    lines = []
    for field, told in of["properties"].items():
        kind = " ".join([_type(told), *(f"{word} {told[key]:,.15g}" for key, word in bounds.items() if key in told)])
        if "default" in told:
            kind += f"; default {json.dumps(told['default'])}"
        lines.append([field, kind, told.get("description", "")])
    return html_page.table([name, "", ""], lines, name)
