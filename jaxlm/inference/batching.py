"""Answers requests that come at any time with one model, in one thread, many of them at a time.

Texts to fill or classify that come within a moment go through the model together. Prompts are continued in places: a
new one takes a free place while the others go on, and one that nobody waits for any more frees its own. Every shape is
compiled before the first request, and none after.
"""

import asyncio
import collections
import contextlib
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from jaxlm.inference.decode import Sampling
from jaxlm.inference.predictors import N_ROWS, Answer, Continue, FillMasks, Look, Predictor

GATHER_S = 0.002  # how long a text waits for others to go with
AT_ONCE = 2  # tokens made of each prompt before others are let in
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's name of the event


class Failed(Exception):
    """The model could not answer, for a reason that is on stderr and nothing a client can mend."""


Said = str | Answer | Failed  # a piece of a continuation, an answer, or that there will be none


@dataclasses.dataclass(eq=False)
class Request:
    """What somebody waits for. `say` is called in the engine's thread."""

    text: str
    options: dict[str, Any]  # all there are
    say: Callable[[Said], None]
    look: tuple[int, int] | None = None  # a layer and a head, where their attention is asked for instead of an answer
    is_streamed: bool = False
    is_dropped: bool = False  # nobody waits any more


class Batches:
    """Answers texts that go through the model together."""

    gather_s = GATHER_S
    is_busy = False

    def __init__(self, predictor: Predictor, metrics: "Metrics"):
        self.predictor, self.metrics = predictor, metrics
        if type(predictor) is Look:
            return
        text = "[MASK]" if isinstance(predictor, FillMasks) else ""
        for i in range(N_ROWS.bit_length()):
            predictor([text] * 2**i)

    def step(self, requests: Sequence[Request]) -> None:
        """Answer all of some requests."""
        if not requests:
            return
        self.metrics.rows.observe(len(requests))
        # The only option there is is a number of guesses, of which one may get fewer than another.
        options = {name: max(request.options[name] for request in requests) for name in self.predictor.options}
        try:
            answers = self.predictor([request.text for request in requests], **options)
        except Exception:
            traceback.print_exc()
            for request in requests:
                request.say(Failed())
            return
        for request, answer in zip(requests, answers, strict=True):
            if "masks" in answer:
                answer["masks"] = [guesses[: request.options["top_k"]] for guesses in answer["masks"]]
            request.say(answer)


@dataclasses.dataclass(eq=False)
class Place:
    """A prompt that is being continued."""

    request: Request
    prompt: list[int]
    sent: str = ""


class Places:
    """Continues prompts, of which each comes and goes when it likes."""

    gather_s = 0.0

    def __init__(self, predictor: Continue, metrics: "Metrics"):
        self.predictor, self.metrics = predictor, metrics
        self.waiting: collections.deque[Request] = collections.deque()
        self._clear()
        request = Request("", predictor.checked({"max_new_tokens": 2 * AT_ONCE}), lambda said: None)
        self.step([request])
        request.is_dropped = True
        self.step([])

    @property
    def is_busy(self) -> bool:
        return bool(self.places or self.waiting)

    def step(self, requests: Sequence[Request]) -> None:
        """Take some requests, and make a few tokens for each that has a place."""
        self.waiting += requests
        try:
            self._let_in()
            if self.places:
                self.metrics.rows.observe(len(self.places))
                self._extend()
        except Exception:
            traceback.print_exc()
            for place in self.places.values():
                place.request.say(Failed())
            self._clear()

    def _clear(self) -> None:
        self.rows = self.predictor.decoder.empty(N_ROWS)
        self.places: dict[int, Place] = {}

    def _let_in(self) -> None:
        free = [i for i in range(N_ROWS) if i not in self.places]
        while free and self.waiting:
            request = self.waiting.popleft()
            if request.is_dropped:
                continue
            i = free.pop()
            place = self.places[i] = Place(request, self.predictor.encode(request.text))
            row = self.predictor.decoder.begin([place.prompt], request.options["max_new_tokens"])
            self.rows = self.predictor.decoder.put(self.rows, i, row)

    def _extend(self) -> None:
        sampling = Sampling(*np.zeros((4, N_ROWS)))
        for i, place in self.places.items():
            for name, values in zip(Sampling._fields, sampling, strict=True):
                values[i] = place.request.options[name]
        self.rows = self.predictor.decoder.extend(self.rows, sampling, AT_ONCE)
        tokens_BS, n_B, end_B = (np.array(x) for x in (self.rows.tokens_BS, self.rows.n_B, self.rows.end_B))
        for i, place in list(self.places.items()):
            ids = tokens_BS[i, len(place.prompt) : n_B[i]].tolist()
            if place.request.is_dropped:
                end_B[i] = 0
                self.rows = self.rows._replace(end_B=jnp.asarray(end_B))
            elif n_B[i] >= end_B[i]:
                self._finish(place, ids)
            else:
                if place.request.is_streamed and (piece := self.predictor.piece(place.prompt, ids, place.sent)):
                    place.request.say(piece)
                    place.sent += piece
                continue
            self.metrics.tokens.inc(len(ids))
            del self.places[i]

    def _finish(self, place: Place, ids: list[int]) -> None:
        request = place.request
        answer = self.predictor.answer(request.text, place.prompt, ids, request.options)
        if request.is_streamed and (rest := answer["continuation"].removeprefix(place.sent)):
            request.say(rest)
        request.say(answer)


class Metrics:
    """What an engine counts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        buckets = [2**i for i in range(N_ROWS.bit_length())]
        self.rows = Histogram("jaxlm_batch_rows", "Texts in the model at once", buckets=buckets, registry=registry)
        self.tokens = Counter("jaxlm_generated_tokens", "Tokens made", registry=registry)
        self.compiled = Counter("jaxlm_compilations", "Compilations; all of them at the start", registry=registry)
        self.waiting = Gauge("jaxlm_waiting_requests", "Requests that the model has not begun", registry=registry)


class Engine:
    """Answers with a predictor; ready once it is made. To be closed, which waits for the answers to all requests."""

    def __init__(self, predictor: Predictor):
        self.predictor, self.metrics = predictor, Metrics()
        self.asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.metrics.waiting.set_function(self._n_waiting)
        jax.monitoring.register_event_duration_secs_listener(self._note)
        if predictor.has_attention:
            predictor.attention("", 0, 0)
        begun = Metrics()  # of which only the compilations are told
        self.work: Batches | Places = (
            Places(predictor, begun) if isinstance(predictor, Continue) else Batches(predictor, begun)
        )
        self.work.metrics = self.metrics
        self.thread = threading.Thread(target=self._run, name="engine")
        self.thread.start()

    async def answer(self, text: str, options: dict[str, Any]) -> Answer:
        """Return the answer to a text that the predictor can take."""
        return await self._last(text, options)

    async def attention(self, text: str, layer: int, head: int) -> Answer:
        """Return what Predictor.attention does."""
        return await self._last(text, {}, look=(layer, head))

    async def stream(self, text: str, options: dict[str, Any], **kwargs: Any) -> AsyncGenerator[str | Answer]:
        """Yield the continuation of a text in pieces, and at last its answer. To be closed where it is left.

        Raises Failed.
        """
        loop, said = asyncio.get_running_loop(), asyncio.Queue[Said]()

        def say(what: Said) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody there to hear it
                loop.call_soon_threadsafe(said.put_nowait, what)

        request = Request(text, self.predictor.options | options, say, **({"is_streamed": True} | kwargs))
        self.asked.put(request)
        try:
            while isinstance(what := await said.get(), str):
                yield what
            if isinstance(what, Failed):
                raise what
            yield what
        finally:
            request.is_dropped = True

    async def _last(self, *args: Any, **kwargs: Any) -> Answer:
        async with contextlib.aclosing(self.stream(*args, is_streamed=False, **kwargs)) as said:
            async for what in said:
                if not isinstance(what, str):
                    return what
        raise AssertionError("the last that is said is an answer")

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
            wanted = [request for request in requests if request and not request.is_dropped]
            for request in wanted:
                if request.look:
                    self._look(request, *request.look)
            self.work.step([request for request in wanted if not request.look])

    def _gathered(self) -> list[Request | None]:
        """Return what was asked, at most for one batch; wait only if there is nothing else to do."""
        requests: list[Request | None] = []
        until_s = 0.0
        try:
            if not self.work.is_busy:
                requests.append(self.asked.get())
                until_s = time.monotonic() + self.work.gather_s
            while len(requests) < N_ROWS and None not in requests:
                left_s = until_s - time.monotonic()
                requests.append(self.asked.get(timeout=left_s) if left_s > 0 else self.asked.get_nowait())
        except queue.Empty:
            pass
        return requests

    def _look(self, request: Request, layer: int, head: int) -> None:
        try:
            request.say(self.predictor.attention(request.text, layer, head))
        except Exception:
            traceback.print_exc()
            request.say(Failed())

    def _n_waiting(self) -> int:
        return self.asked.qsize() + (len(self.work.waiting) if isinstance(self.work, Places) else 0)

    def _note(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == COMPILED:
            self.metrics.compiled.inc()
