"""From the event loop to the engine's thread and back: one hand-over a step, whatever the number of requests.

    submit (loop) -> engine thread: step -> deliver -> one call_soon_threadsafe -> distribute (loop) -> answers

Text is made on the loop's side, so the engine's thread only computes. An answer that is read too slowly fills its
bounded buffer and is then cancelled; an answer that nobody reads any more is cancelled at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from kvern.engine import Update
from kvern.engine.service import EngineThread
from kvern.errors import KvernError, UnavailableError
from kvern.llm import LLM, Prepared
from kvern.server.metrics import Metrics

BUFFER = 2048
"""Updates of a request that may wait for their reader."""

RETRY_SECONDS = 5.0
GRACE_SECONDS = 2.0
"""How long answers that were cut short get to send their last event."""

log = logging.getLogger(__name__)


class SlowReaderError(KvernError):
    """The client reads much slower than the model writes."""

    status = 408
    code = "slow_reader"


class EngineHost:
    """Owns the model and the engine's thread. `start` loads; then `submit`; `drain` and `stop` end."""

    def __init__(self, load: Callable[[], LLM], metrics: Metrics, *, buffer: int = BUFFER) -> None:
        self._load = load
        self._metrics = metrics
        self._buffer = buffer
        self._llm: LLM | None = None
        self._thread: EngineThread | None = None
        self._answers: dict[int, Answer] = {}
        self._draining = False
        self.before_draining: list[Callable[[], None]] = []
        """Called when draining begins: what need not end by itself gives way."""

    async def start(self) -> None:
        """Load the model beside the event loop; what `load` raises is raised here."""
        loop = asyncio.get_running_loop()
        llm = await asyncio.to_thread(self._load)
        if self._draining:
            return
        self._llm = llm

        def deliver(updates: list[Update]) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody reads any more
                loop.call_soon_threadsafe(self._distribute, updates)

        self._thread = EngineThread(llm.engine, deliver)
        self._metrics.serve(llm.name, llm.engine.stats)

    @property
    def llm(self) -> LLM:
        """The model. Raises UnavailableError until it is loaded."""
        if self._llm is None:
            hint = "ask GET /ready until it answers 200"
            raise UnavailableError("the model is still being loaded", retry_after=RETRY_SECONDS, hint=hint)
        return self._llm

    @property
    def healthy(self) -> bool:
        """Whether the engine computes, or is still to come."""
        return self._thread is None or self._thread.healthy

    def open(self) -> LLM:
        """The model, where a new request would be served. UnavailableError: it loads, stops, or comes after a fault."""
        if self._draining:
            raise UnavailableError("the server is stopping", retry_after=RETRY_SECONDS)
        llm = self.llm
        if not self.healthy:
            raise UnavailableError("the engine failed and is starting again", retry_after=RETRY_SECONDS)
        return llm

    def submit(self, requests: Sequence[Prepared], *, priority: int, salt: bytes) -> Answer:
        """Queue the requests behind one HTTP request, all or none.

        Raises BusyError, UnavailableError, BadRequestError.
        """
        self.open()
        assert self._thread is not None
        answer = Answer(self, len(requests) * self._buffer)
        try:
            for request in requests:
                number = self._thread.submit(request.prompt, request.params, priority=priority, salt=salt)
                self._answers[number] = answer
                self._metrics.submitted(number)
                answer.add(number)
        except BaseException:
            answer.close()
            raise
        return answer

    def cancel(self, number: int) -> None:
        """Let go of one engine request; it ends within one step."""
        if self._answers.pop(number, None) is not None and self._thread is not None:
            self._thread.cancel(number)
            self._metrics.forget(number)

    async def drain(self, seconds: float) -> None:
        """Take nothing new and wait until what runs has ended; after `seconds`, cut it short."""
        self._draining = True
        for give_way in self.before_draining:
            give_way()
        await self._wait_until_idle(seconds)
        for answer in set(self._answers.values()):
            answer.fail(UnavailableError("the server is stopping", retry_after=RETRY_SECONDS))
        await self._wait_until_idle(GRACE_SECONDS)

    async def stop(self) -> None:
        """Cancel whatever is left and join the engine's thread."""
        self._draining = True
        if self._thread is not None:
            await asyncio.to_thread(self._thread.stop, 0.0)
            await asyncio.to_thread(self.llm.engine.close)

    async def _wait_until_idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._answers and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def _distribute(self, updates: list[Update]) -> None:
        """On the loop, once a step: give every answer its updates."""
        now = time.monotonic()
        for update in updates:
            answer = self._answers.get(update.request_id)
            if answer is None:  # cancelled while the step ran
                continue
            self._metrics.updated(update, now)
            if update.finish is not None:
                del self._answers[update.request_id]
            answer.put(update)


class Answer:
    """The updates of the engine requests behind one HTTP request; read them as lists of (index, update)."""

    def __init__(self, host: EngineHost, limit: int) -> None:
        self._host = host
        self._limit = limit
        self._index: dict[int, int] = {}
        self._running: set[int] = set()
        self._unread: deque[tuple[int, Update]] = deque()
        self._error: KvernError | None = None
        self._arrived = asyncio.Event()

    def add(self, number: int) -> None:
        """Wait for one more engine request."""
        self._index[number] = len(self._index)
        self._running.add(number)

    def put(self, update: Update) -> None:
        """Take an update from the engine."""
        if update.finish is not None:
            self._running.discard(update.request_id)
        self._unread.append((self._index[update.request_id], update))
        if len(self._unread) > self._limit:
            self.fail(SlowReaderError("the answer was read too slowly and has been cancelled"))
        self._arrived.set()

    def end(self, index: int) -> None:
        """One request needs no more tokens: a stop string was found."""
        for number, position in self._index.items():
            if position == index and number in self._running:
                self._running.discard(number)
                self._host.cancel(number)

    def fail(self, error: KvernError) -> None:
        """Cancel what runs; the reader gets what waits, then the error."""
        self._error = self._error or error
        self.close()
        self._arrived.set()

    def close(self) -> None:
        """Cancel what still runs."""
        for number in self._running:
            self._host.cancel(number)
        self._running.clear()

    async def batches(self, patience: float) -> AsyncIterator[list[tuple[int, Update]]]:
        """All updates, as many at once as there are, none after `patience` seconds without any.

        Raises the error that ended the answer.
        """
        while True:
            if self._unread:
                waiting = list(self._unread)
                self._unread.clear()
                yield waiting
            elif self._error is not None:
                raise self._error
            elif not self._running:
                return
            elif not await self._arrives(patience):
                yield []

    async def _arrives(self, patience: float) -> bool:
        self._arrived.clear()
        try:
            async with asyncio.timeout(patience):
                return await self._arrived.wait()
        except TimeoutError:
            return False
