"""From the event loop to the engine and back: one request at a time, in order of arrival.

One worker thread computes. Finished pieces cross to the event loop through a bounded hand-over: a reader that is slow
holds the worker after HAND_OVER pieces instead of filling memory. When the reader goes away, at whatever point, the
engine is told and stops within one token; the next request starts only after that.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

from kvern.errors import KvernError
from kvern.llm import LLM, Piece, Prepared
from kvern.text.messages import Message, SamplingOptions

HAND_OVER = 64
POLL_SECONDS = 0.1
log = logging.getLogger(__name__)


class NotReadyError(KvernError):
    """The model is still being loaded."""

    status = 503
    code = "not_ready"


class EngineWorker:
    """Owns the worker thread. Load the model with `start`, then `prepare` and `stream` requests."""

    def __init__(self, load: Callable[[], LLM]) -> None:
        self._load = load
        self._llm: LLM | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvern-engine")
        self._stopping = threading.Event()

    @property
    def llm(self) -> LLM:
        """The model. Raises NotReadyError until it is loaded."""
        if self._llm is None:
            raise NotReadyError("the model is still being loaded", hint="ask GET /ready until it answers 200")
        return self._llm

    async def start(self) -> None:
        """Load the model in the worker; what `load` raises is raised here."""
        self._llm = await asyncio.get_running_loop().run_in_executor(self._worker, self._load)

    def stop(self) -> None:
        """End the request that runs within one token, drop those that wait, and let the worker go."""
        self._stopping.set()
        self._worker.shutdown(wait=True, cancel_futures=True)

    async def prepare(self, messages: list[Message], options: SamplingOptions) -> Prepared:
        """Check a chat request and tokenise it, off the event loop and beside the engine."""
        return await asyncio.to_thread(self.llm.prepare_chat, messages, options)

    async def stream(self, prepared: Prepared) -> AsyncGenerator[Piece]:
        """Yield the pieces of the answer. Closing this iterator cancels the request."""
        hand_over = _HandOver(asyncio.get_running_loop())
        pieces = self.llm.run(prepared, lambda: hand_over.closed.is_set() or self._stopping.is_set())
        self._worker.submit(hand_over.fill, pieces)
        try:
            async for piece in hand_over:
                yield piece
        finally:
            hand_over.closed.set()


class _HandOver:
    """Carries pieces, then an end or an exception, from the worker thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.closed = threading.Event()
        self._loop = loop
        self._room = threading.Semaphore(HAND_OVER)
        self._queue: asyncio.Queue[Piece | KvernError | None] = asyncio.Queue()

    def fill(self, pieces: Generator[Piece]) -> None:
        """In the worker: put all pieces, unless the reader is gone."""
        try:
            with closing(pieces):
                for piece in pieces:
                    if not self._put(piece):
                        return
            self._put(None)
        except KvernError as error:
            self._put(error)
        except Exception:
            log.exception("a request failed")
            self._put(KvernError("the answer failed inside the server"))

    def _put(self, item: Piece | KvernError | None) -> bool:
        while not self.closed.is_set():
            if self._room.acquire(timeout=POLL_SECONDS):
                with suppress(RuntimeError):  # the loop was closed: nobody reads any more
                    self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
                return True
        return False

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            item = await self._queue.get()
            self._room.release()
            if item is None:
                return
            if isinstance(item, KvernError):
                raise item
            yield item
