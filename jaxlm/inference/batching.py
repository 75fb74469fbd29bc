"""Dynamic and continuous batching: one thread answers concurrent requests with one model.

Texts to fill or classify that arrive within GATHER_S are batched. Prompts are continued in slots: a new request takes a
free slot while others are being decoded, and a cancelled one frees its slot. A request of more than ROOM positions
waits until all slots are free, and makes them anew: larger and fewer, so that their memory stays the same. All other
shapes are compiled before the first request.
"""

import asyncio
import collections
import contextlib
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from jaxlm.inference.decode import Sampling
from jaxlm.inference.predictors import N_ROWS, Answer, Continuation, Continue, FillMasks, Look, Predictor

GATHER_S = 0.002  # how long a text waits for others to form a batch
ROOM = 4096  # positions of a slot; of fewer slots, where a request needs more
AT_ONCE = 2  # tokens decoded per prompt before new prompts are admitted
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event


class Failed(Exception):
    """The model failed for a reason that the client cannot fix; it is printed on stderr."""


Said = str | Answer | Failed  # a piece of a continuation, an answer, or a failure


@dataclasses.dataclass(eq=False)
class Request:
    """A pending request. `say` is called in the engine's thread."""

    text: str
    options: dict[str, Any]  # all of them, with defaults
    say: Callable[[Said], None]
    look: tuple[int, int] | None = None  # layer and head, if the request is for attention weights
    is_streamed: bool = False
    is_dropped: bool = False  # the client has gone


def fail(requests: Iterable[Request]) -> None:
    """Print the current exception, and answer the requests with a failure."""
    traceback.print_exc()
    for request in requests:
        request.say(Failed())


class Batches:
    """Dynamic batching, for fill, classify and predict."""

    gather_s = GATHER_S
    is_busy = False
    n_waiting = 0

    def __init__(self, predictor: Predictor, metrics: "Metrics"):
        self.predictor, self.metrics = predictor, metrics
        text = "[MASK]" if isinstance(predictor, FillMasks) else predictor.empty
        if type(predictor) is not Look:
            for i in range(N_ROWS.bit_length()):
                predictor([text] * 2**i)

    def step(self, requests: Sequence[Request]) -> None:
        """Answer the requests as one batch."""
        if not requests:
            return
        self.metrics.rows.observe(len(requests))
        # The only option is the number of guesses: compute the largest one, and cut the answers below.
        options = {name: max(request.options[name] for request in requests) for name in self.predictor.options}
        try:
            answers = self.predictor([request.text for request in requests], **options)
        except Exception:
            return fail(requests)
        for request, answer in zip(requests, answers, strict=True):
            if "masks" in answer:
                answer["masks"] = [guesses[: request.options["top_k"]] for guesses in answer["masks"]]
            request.say(answer)


class Places:
    """Continuous batching, for generation: N_ROWS slots, or fewer and larger ones."""

    gather_s = 0.0

    def __init__(self, predictor: Continue, metrics: "Metrics"):
        self.predictor, self.metrics = predictor, metrics
        self.waiting: collections.deque[tuple[Request, Continuation]] = collections.deque()
        self.places: dict[int, tuple[Request, Continuation]] = {}
        self._make(predictor.decoder.room(0, ROOM))
        request = Request("", predictor.checked({"max_new_tokens": 2 * AT_ONCE}), lambda said: None)
        self.step([request])
        request.is_dropped = True
        self.step([])

    @property
    def is_busy(self) -> bool:
        return bool(self.places or self.waiting)

    @property
    def n_waiting(self) -> int:
        return len(self.waiting)

    def step(self, requests: Sequence[Request]) -> None:
        """Queue the requests, and decode a few tokens in each occupied slot."""
        try:
            for request in requests:
                begun = Continuation(request.text, self.predictor.encode(request.text), request.options)
                self.waiting.append((request, begun))
            self._let_in()
            if self.places:
                self.metrics.rows.observe(len(self.places))
                self._extend()
        except Exception:
            fail(request for request, _ in self.places.values())
            self.places = {}
            self._make(self.predictor.decoder.room(0, ROOM))

    def _make(self, room: int) -> None:
        """Make slots of so many positions each, empty; all together have at most N_ROWS * ROOM, or are one."""
        self.room, self.n_rows = room, min(N_ROWS, max(1, N_ROWS * ROOM // room))
        self.rows: Any = None  # frees the memory of those before
        self.rows = self.predictor.decoder.empty(self.n_rows, room)

    def _let_in(self) -> None:
        while self.waiting and len(self.places) < self.n_rows:
            request, begun = self.waiting[0]
            most_new = request.options["max_new_tokens"]
            room = self.predictor.decoder.room(len(begun.prompt) + most_new, ROOM)
            if not request.is_dropped and room > self.room and self.places:
                return
            self.waiting.popleft()
            if request.is_dropped:
                continue
            is_other = room > self.room or (room < self.room and not self.places)
            i = next(i for i in range(self.n_rows) if i not in self.places)
            self.places[i] = request, begun
            if is_other:
                self._make(room)
            row = self.predictor.decoder.begin([begun.prompt], most_new, self.room)
            self.rows = self.predictor.decoder.put(self.rows, i, row)

    def _extend(self) -> None:
        sampling = Sampling(*np.zeros((4, self.n_rows)))
        for i, (request, _) in self.places.items():
            for name, values in zip(Sampling._fields, sampling, strict=True):
                values[i] = request.options[name]
        self.rows = self.predictor.decoder.extend(self.rows, sampling, AT_ONCE)
        tokens_BS, n_B, end_B = (np.array(x) for x in (self.rows.tokens_BS, self.rows.n_B, self.rows.end_B))
        for i, (request, begun) in list(self.places.items()):
            ids = tokens_BS[i, len(begun.prompt) : n_B[i]].tolist()
            is_over, is_dropped = bool(n_B[i] >= end_B[i]), request.is_dropped
            if is_dropped:
                end_B[i] = 0
                self.rows = self.rows._replace(end_B=jax.device_put(end_B, self.rows.end_B.sharding))
            elif is_over or request.is_streamed:
                for piece in self.predictor.pieces(begun, ids, is_over):
                    request.say(piece)
            if is_over or is_dropped:
                self.metrics.tokens.inc(len(ids))
                del self.places[i]


class Metrics:
    """Prometheus metrics of an engine."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        buckets = [2**i for i in range(N_ROWS.bit_length())]
        self.rows = Histogram("jaxlm_batch_rows", "Texts in the model at once", buckets=buckets, registry=registry)
        self.tokens = Counter("jaxlm_generated_tokens", "Tokens made", registry=registry)
        self.compiled = Counter(
            "jaxlm_compilations", "Compilations; all at the start but those for long requests", registry=registry
        )
        self.waiting = Gauge("jaxlm_waiting_requests", "Requests that the model has not begun", registry=registry)


class Engine:
    """Answers requests with a predictor. Ready when constructed; `close` waits for open requests."""

    def __init__(self, predictor: Predictor):
        self.predictor, self.metrics = predictor, Metrics()
        self.asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
        if predictor.has_attention:
            predictor.attention(predictor.empty, 0, 0)
        begun = Metrics()  # discards the numbers of the warmup, except for compilations
        self.work: Batches | Places = (
            Places(predictor, begun) if isinstance(predictor, Continue) else Batches(predictor, begun)
        )
        self.work.metrics = self.metrics
        self.metrics.waiting.set_function(lambda: self.asked.qsize() + self.work.n_waiting)
        self.thread = threading.Thread(target=self._run, name="engine")
        self.thread.start()

    async def answer(
        self, text: str, options: dict[str, Any] | None = None, look: tuple[int, int] | None = None
    ) -> Answer:
        """Return the answer to a valid text; with `look`, the result of Predictor.attention."""
        async with contextlib.aclosing(self.stream(text, options or {}, look, is_streamed=False)) as said:
            (answer,) = [what async for what in said if not isinstance(what, str)]
        return answer

    async def stream(
        self, text: str, options: dict[str, Any], look: tuple[int, int] | None = None, is_streamed: bool = True
    ) -> AsyncGenerator[str | Answer]:
        """Yield the continuation of a text in pieces, then its answer; closing cancels it. Raises Failed."""
        loop, said = asyncio.get_running_loop(), asyncio.Queue[Said]()

        def say(what: Said) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(said.put_nowait, what)

        request = Request(text, self.predictor.options | options, say, look, is_streamed)
        self.asked.put(request)
        try:
            while isinstance(what := await said.get(), str):
                yield what
            if isinstance(what, Failed):
                raise what
            yield what
        finally:
            request.is_dropped = True

    def close(self) -> None:
        self.asked.put(None)
        self.thread.join()

    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def _run(self) -> None:
        is_open = True
        while is_open or self.work.is_busy:
            requests = self._gathered()
            is_open = is_open and None not in requests
            open_requests = [request for request in requests if request and not request.is_dropped]
            self._look([request for request in open_requests if request.look])
            self.work.step([request for request in open_requests if not request.look])

    def _gathered(self) -> list[Request | None]:
        """Return the next requests, at most one batch; wait only if no slot is occupied."""
        requests: list[Request | None] = []
        until_s = 0.0
        with contextlib.suppress(queue.Empty):
            if not self.work.is_busy:
                requests.append(self.asked.get())
                until_s = time.monotonic() + self.work.gather_s
            while len(requests) < N_ROWS and None not in requests:
                left_s = until_s - time.monotonic()
                requests.append(self.asked.get(timeout=left_s) if left_s > 0 else self.asked.get_nowait())
        return requests

    def _look(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                request.say(self.predictor.attention(request.text, *request.look or ()))
            except Exception:
                fail([request])

    def _count_compilation(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == COMPILED:
            self.metrics.compiled.inc()
