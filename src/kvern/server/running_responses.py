"""Responses while they are made, and afterwards: who reads one, who ends it, where it is kept.

    foreground: the handler draws from `Run.produce`; when its client hangs up, the answer is dropped
    background: a task of the server draws, and notes all events; readers follow the notes from any event on

Either way a finished response is kept before its last event leaves, so whoever has seen that event can continue it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

from kvern.errors import BadRequestError, KvernError, NotFoundError, UnavailableError
from kvern.server.answering import Pieces
from kvern.server.generate import RETRY_SECONDS, Answer
from kvern.store import Store, responses
from kvern.store.responses import StoredResponse
from kvern.wire.responses_answer import failed_since
from kvern.wire.responses_items import Item, named_response
from kvern.wire.responses_stream import Event, ResponseBuilder, encode
from kvern.wire.stream import KEEP_ALIVE

SWEEP_SECONDS = 60.0
MAX_NOTED_BYTES = 32 * 2**20
"""Of the events of background streams that have ended, for readers who come back; beyond that the oldest go first."""

CANCEL_SECONDS = 5.0
log = logging.getLogger(__name__)


class PreviousResponseNotFoundError(BadRequestError):
    """A response to continue that is not there."""

    code = "previous_response_not_found"


class ResponseCancelledError(KvernError):
    """Somebody asked for the end of the answer."""

    status = 409
    code = "response_cancelled"


class Run:
    """One response in the making. `keep` None: it is not stored."""

    def __init__(self, builder: ResponseBuilder, pieces: Pieces, answer: Answer, keep: Keep | None) -> None:
        self.builder = builder
        self.keep = keep
        self.error: KvernError | None = None
        self.ended = asyncio.Event()
        self._pieces = pieces
        self._answer = answer
        self._noted: list[bytes] = []
        self._news = asyncio.Event()

    async def produce(self) -> AsyncGenerator[list[Event]]:
        """The events, those that are ready together as one list; an empty one where there are none for long."""
        sent = time.monotonic()
        try:
            yield self.builder.start()
            async for events in self._events():
                if events or time.monotonic() - sent >= self._pieces.patience:
                    yield events
                    sent = time.monotonic()
        finally:
            self._answer.close()
            self.ended.set()

    async def note(self, followed: bool) -> None:
        """Draw everything; with `followed` the events are kept for whoever follows."""
        async for events in self.produce():
            if followed:
                self._noted += [encode([event]) for event in events]
                self._news.set()
        self._news.set()

    @property
    def noted_bytes(self) -> int:
        """What the events take that are kept."""
        return sum(map(len, self._noted))

    async def follow(self, after: int, patience: float) -> AsyncGenerator[bytes]:
        """The events behind number `after`, as they come; a comment after `patience` seconds without any."""
        position = after + 1
        while True:
            ready = self._noted[position:]
            if ready:
                position += len(ready)
                yield b"".join(ready)
            elif self.ended.is_set():
                return
            else:
                self._news = news = self._news if not self._news.is_set() else asyncio.Event()
                try:
                    await asyncio.wait_for(news.wait(), patience)
                except TimeoutError:
                    yield KEEP_ALIVE

    @property
    def stored(self) -> bool:
        """Whether it can be asked for."""
        return self.keep is not None and not self.keep.forgotten()

    def cancel(self) -> None:
        """End it soon, with what it has."""
        self.fail(ResponseCancelledError("the response was cancelled"))

    def fail(self, error: KvernError) -> None:
        """End it soon, with an error."""
        self._answer.fail(error)

    async def _events(self) -> AsyncGenerator[list[Event]]:
        """The events after the first; the last list holds the end."""
        events: list[Event] = []
        try:
            async for batch in self._pieces:
                events = [event for _, piece in batch for event in self.builder.piece(piece)]
                reason = next((piece.finish_reason for _, piece in batch if piece.finish_reason), None)
                if reason is not None:
                    events += self.builder.finish(reason, self._pieces.usage())
                    break
                yield events
        except ResponseCancelledError:
            events = self.builder.cancel()
        except KvernError as error:
            self.error, events = error, self.builder.fail(error)
        except Exception:
            log.exception("a response failed")
            self.error = KvernError("the answer failed inside the server")
            events = self.builder.fail(self.error)
        await self._save(events[-1])
        yield events

    async def _save(self, last: Event) -> None:
        if self.keep is None:
            return
        try:
            await self.keep(last["response"])
        except KvernError as error:
            log.error("a response could not be stored: %s", error)
            last["response"] = self.builder.not_stored()


class Keep:
    """Keeps one response, in whatever state it is."""

    def __init__(self, store: Store, owner: str, items: Sequence[Item], seconds: float) -> None:
        self.items = list(items)
        self._store = store
        self._owner = owner
        self._seconds = seconds
        self._forgotten = False

    async def __call__(self, response: dict[str, Any]) -> None:
        """Store it, unless it was deleted meanwhile. Raises StoreError."""
        if self.forgotten():
            return
        expires = math.ceil(time.time() + self._seconds)
        stored = StoredResponse(self._owner, response["id"], response["created_at"], expires, self.items, response)
        await asyncio.to_thread(self._save, stored)

    def forget(self) -> None:
        """It was deleted: store it no more."""
        self._forgotten = True

    def forgotten(self) -> bool:
        """Whether it was deleted."""
        return self._forgotten

    def _save(self, stored: StoredResponse) -> None:
        with self._store.write() as connection:
            if not self.forgotten():
                responses.save(connection, stored)


class Responses:
    """All responses of a server: those that run and those that are kept."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._runs: dict[tuple[str, str], Run] = {}
        self._followed: OrderedDict[tuple[str, str], Run] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sweep what expires."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """End what runs, and stop sweeping."""
        for run in self._runs.values():
            run.fail(UnavailableError("the server is stopping", retry_after=RETRY_SECONDS))
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def keep(self, owner: str, items: Sequence[Item]) -> Keep:
        """What keeps a response of the owner's, made from `items`."""
        return Keep(self._store, owner, items, self._seconds)

    def add(self, owner: str, response_id: str, run: Run) -> None:
        """A response begins."""
        self._runs[owner, response_id] = run

    def remove(self, owner: str, response_id: str) -> None:
        """It ended, or its reader has gone."""
        self._runs.pop((owner, response_id), None)

    def work(self, owner: str, response_id: str, run: Run, followed: bool) -> None:
        """Compute it in the background; with `followed` its events can be read, also again."""
        self.add(owner, response_id, run)
        if followed:
            self._followed[owner, response_id] = run
        task = asyncio.create_task(self._work(owner, response_id, run, followed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def get(self, owner: str, response_id: str) -> dict[str, Any]:
        """The response as it is now. Raises NotFoundError."""
        response, _ = await self._find(owner, response_id)
        return response

    async def items(self, owner: str, response_id: str) -> list[Item]:
        """What the response was made from, oldest first. Raises NotFoundError."""
        _, items = await self._find(owner, response_id)
        return items

    async def before(self, owner: str, response_id: str) -> list[Item]:
        """All items up to and with a response's output, to be continued. Raises PreviousResponseNotFoundError."""
        where = "previous_response_id"
        try:
            response, items = await self._find(owner, response_id)
        except NotFoundError as error:
            hint = "it may have expired, or store was false"
            raise PreviousResponseNotFoundError(error.message, hint=hint, param=where) from error
        if response["status"] not in ("completed", "incomplete"):
            raise BadRequestError(f"response {response_id!r} is {response['status']}", param=where)
        return [*items, *response["output"]]

    async def resolve(self, owner: str, items: Sequence[Item], before: Sequence[Item]) -> list[Item]:
        """The items, references replaced by what they name. Raises BadRequestError."""
        known = {item["id"]: item for item in before}
        resolved = []
        for index, item in enumerate(items):
            found: Item | None = item
            if item["type"] == "item_reference":
                found = known.get(item["id"]) or await self._referenced(owner, item["id"])
            if found is None:
                raise BadRequestError(f"there is no item {item['id']!r}", param=f"input.{index}.id")
            resolved.append(found)
        return resolved

    async def delete(self, owner: str, response_id: str) -> None:
        """End it and forget it. Raises NotFoundError."""
        run = self._runs.get((owner, response_id))
        running = run is not None and run.stored
        if run is not None and run.keep is not None:
            run.keep.forget()
            run.cancel()
        self._followed.pop((owner, response_id), None)
        if not await asyncio.to_thread(self._remove, owner, response_id) and not running:
            raise NotFoundError(f"there is no response {response_id[:256]!r}", param="response_id")

    async def cancel(self, owner: str, response_id: str) -> dict[str, Any]:
        """End a response that runs; one that ended in the background stays as it is.

        Raises NotFoundError, and BadRequestError for one that ended while its client waited.
        """
        run = self._runs.get((owner, response_id))
        if run is not None:
            run.cancel()
            with suppress(TimeoutError):  # a client that reads slowly
                await asyncio.wait_for(run.ended.wait(), CANCEL_SECONDS)
            return run.builder.response()
        response = await self.get(owner, response_id)
        if not response["background"]:
            raise BadRequestError("the response has ended", hint="only what runs can be cancelled", param="response_id")
        return response

    def followed(self, owner: str, response_id: str) -> Run | None:
        """A background response whose events are still there."""
        return self._followed.get((owner, response_id))

    async def _work(self, owner: str, response_id: str, run: Run, followed: bool) -> None:
        try:
            await run.note(followed)
        finally:
            self.remove(owner, response_id)
            self._forget_events()

    def _forget_events(self) -> None:
        room = MAX_NOTED_BYTES
        for key, run in list(reversed(self._followed.items())):
            if run.ended.is_set() and (room := room - run.noted_bytes) < 0:
                del self._followed[key]

    async def _find(self, owner: str, response_id: str) -> tuple[dict[str, Any], list[Item]]:
        """A response, running or kept, and what it was made from."""
        run = self._runs.get((owner, response_id))
        if run is not None and run.keep is not None and run.stored:
            return run.builder.response(), list(run.keep.items)
        stored = await asyncio.to_thread(self._load, owner, response_id)
        if stored is None or (run is not None and not run.stored):
            raise NotFoundError(f"there is no response {response_id[:256]!r}", param="response_id")
        return failed_since(stored.response), stored.items

    def _load(self, owner: str, response_id: str) -> StoredResponse | None:
        with self._store.read() as connection:
            return responses.get(connection, owner, response_id, time.time())

    def _remove(self, owner: str, response_id: str) -> bool:
        with self._store.write() as connection:
            found = responses.get(connection, owner, response_id, time.time())
            return responses.remove(connection, owner, response_id) and found is not None

    def _expire(self) -> None:
        with self._store.write() as connection:
            responses.expire(connection, time.time())

    async def _referenced(self, owner: str, item_id: str) -> Item | None:
        response_id = named_response(item_id)
        if response_id is None:
            return None
        try:
            response, items = await self._find(owner, response_id)
        except NotFoundError:
            return None
        return next((item for item in (*items, *response["output"]) if item["id"] == item_id), None)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, self._seconds))
            try:
                await asyncio.to_thread(self._expire)
            except KvernError as error:
                log.error("expired responses could not be removed: %s", error)
