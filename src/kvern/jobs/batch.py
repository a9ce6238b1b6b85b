"""Runs batches over the one request path, so that nothing that was said to be done is ever lost or done twice.

    validating: check the input -> in_progress: ask, row by row -> finalizing -> completed
    the time is over -> expired; cancelled by its owner -> cancelled; the rows that wait fail with that code

A row's result counts when its transaction is on the disk; the row's state decides who writes it. Whatever ends the
process, the next one finds the rows that wait and goes on. One process works for a model (the store's claim); its
batches share a bounded number of requests in flight, fairly. Nothing here computes: the thread that asks is the event
loop's, the store has threads of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kvern.errors import KvernError
from kvern.jobs import request_cache
from kvern.jobs.asking import Ask, Question, ask_patiently
from kvern.jobs.batch_input import Limits, check, with_requests
from kvern.jobs.prefixes import Turns
from kvern.store import Store, batch_rows, batches, files
from kvern.store.batch_rows import Result, Tokens
from kvern.store.batches import Batch, Status
from kvern.wire.batch_lines import answer_line, body_asked, error_line
from kvern.wire.batches import BatchError

POLL_SECONDS = 1.0
SWEEP_SECONDS = 60.0
RETRY_SECONDS = 5.0
MOST_AT_ONCE = 8
"""Batches that run side by side."""

CACHED_ANSWERS = 200_000
THREADS = 2
EXPIRED = "batch_expired", "This request could not be executed before the completion window expired."
CANCELLED = "batch_cancelled", "This request was not executed before the batch was cancelled."
Got = TypeVar("Got")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """Who answers. `revision` changes with whatever changes its answers; `serves` knows the names it goes by."""

    name: str
    revision: str
    serves: Callable[[str], bool]


class BatchRunner:
    """Runs the batches of one model in one store. `parallel`: requests in flight."""

    def __init__(
        self,
        store: Store,
        model: Model,
        ask: Ask,
        *,
        limits: Limits,
        parallel: int,
        clock: Callable[[], float] = time.time,
        poll: float = POLL_SECONDS,
    ) -> None:
        self._store = store
        self._model = model
        self._ask = ask
        self._limits = limits
        self._slots = asyncio.Semaphore(parallel)
        self._clock = clock
        self._poll = poll
        self._wake = asyncio.Event()
        self._threads = ThreadPoolExecutor(THREADS, "kvern-batches")

    def wake(self) -> None:
        """Look now: a batch was made or cancelled."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled. Another process that works for this model goes first; its end is noticed."""
        release = await self._claim()
        tasks: dict[str, asyncio.Task[None]] = {}
        swept = 0.0
        try:
            while True:
                for batch_id in [batch_id for batch_id, task in tasks.items() if task.done()]:
                    del tasks[batch_id]
                for batch in await self._open():
                    if batch.id not in tasks and len(tasks) < MOST_AT_ONCE:
                        tasks[batch.id] = asyncio.create_task(self._work(batch.id))
                if self._clock() >= swept + SWEEP_SECONDS:
                    swept = self._clock()
                    await self._in_thread(self._sweep)
                await self._pause(tasks)
        finally:
            await _end(list(tasks.values()))
            self._threads.shutdown()
            release()

    async def finish(self, batch_id: str, noticed: Callable[[Batch], None] = lambda _: None) -> Batch:
        """Work on one batch until it ends; `noticed` sees it now and then. Raises what makes that impossible."""
        working = asyncio.create_task(self._advance(batch_id))
        try:
            while not working.done():
                noticed(await self._in_thread(self._batch, batch_id))
                await asyncio.wait((working,), timeout=self._poll)
            await working
            done = await self._in_thread(self._batch, batch_id)
            noticed(done)
            return done
        finally:
            await _end([working])
            self._threads.shutdown()

    async def _claim(self) -> Callable[[], None]:
        while True:
            try:
                if release := await self._in_thread(self._store.claim, f"batches of {self._model.name}"):
                    return release
            except KvernError:
                log.exception("the batches of %s could not be claimed", self._model.name)
            await asyncio.sleep(self._poll)

    async def _pause(self, tasks: dict[str, asyncio.Task[None]]) -> None:
        """Until there may be something new to do."""
        waking = asyncio.create_task(self._wake.wait())
        await asyncio.wait({waking, *tasks.values()}, timeout=self._poll, return_when=asyncio.FIRST_COMPLETED)
        waking.cancel()
        self._wake.clear()

    async def _open(self) -> list[Batch]:
        try:
            return await self._in_thread(self._read, batches.open_for, self._model.name)
        except KvernError:
            log.exception("the batches could not be read")
            await asyncio.sleep(RETRY_SECONDS)
            return []

    async def _work(self, batch_id: str) -> None:
        """Take a batch to its end; where something is in the way, try again later."""
        try:
            await self._advance(batch_id)
        except Exception:
            log.exception("batch %s stopped, and goes on in a while", batch_id)
            await asyncio.sleep(RETRY_SECONDS)

    async def _advance(self, batch_id: str) -> None:
        batch = await self._in_thread(self._batch, batch_id)
        while batch.status not in batches.ENDED:
            if batch.status == "validating":
                await self._in_thread(self._validate, batch)
            elif batch.status == "in_progress":
                await self._run(batch)
            elif batch.status == "finalizing":
                await self._in_thread(self._close, batch, "completed")
            else:
                await self._in_thread(self._close, batch, "cancelled", CANCELLED)
            batch = await self._in_thread(self._batch, batch_id)

    async def _run(self, batch: Batch) -> None:
        """Ask for all rows that wait, or for as many as there is time for."""
        rows, watch = asyncio.create_task(self._rows(batch)), asyncio.create_task(self._watch(batch))
        try:
            await asyncio.wait((rows, watch), return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not rows.done():
                await _end([rows])
                if watch.result() == "in_progress":
                    await self._in_thread(self._close, batch, "expired", EXPIRED)
                return
            await rows
            await self._in_thread(self._finalize, batch)
        finally:
            await _end([rows, watch])

    async def _watch(self, batch: Batch) -> Status:
        """Wait until the batch's time is over (then it is in progress still), or until it is something else."""
        while True:
            now = await self._in_thread(self._batch, batch.id)
            if now.status != "in_progress" or (now.expires_at is not None and self._clock() >= now.expires_at):
                return now.status
            await asyncio.sleep(self._poll)

    async def _rows(self, batch: Batch) -> None:
        turns = Turns(await self._in_thread(self._read, batch_rows.waiting, batch.id))
        changed = asyncio.Event()

        def ended(line: int, _: asyncio.Task[None]) -> None:
            self._slots.release()
            turns.done(line)
            changed.set()

        async with asyncio.TaskGroup() as tasks:
            while not turns.empty:
                await self._slots.acquire()
                line = turns.take()
                if line is None:  # what is left waits for rows that run
                    self._slots.release()
                    changed.clear()
                    await changed.wait()
                else:
                    task = tasks.create_task(self._row(batch, line))
                    task.add_done_callback(partial(ended, line))

    async def _row(self, batch: Batch, line: int) -> None:
        found = await self._in_thread(self._look_up, batch, line)
        if found is None:  # another runner was first
            return
        row, key, known = found
        row_id = _row_id(batch.id, line)
        body = body_asked(row.request, batch.endpoint)
        if known is not None:
            value = request_cache.renamed(json.loads(known))
            text = answer_line(row_id, row.custom_id, 200, row_id, value)
            await self._record(batch, Result(line, "output", text, 1, _usage(value)))
            return
        answer = await ask_patiently(self._ask, Question(batch.endpoint, json.dumps(body).encode(), batch.owner))
        value = answer.json
        text = answer_line(row_id, row.custom_id, answer.status, answer.request_id, value)
        if not 200 <= answer.status < 300:
            await self._record(batch, Result(line, "error", text))
        else:
            await self._record(batch, Result(line, "output", text, 0, _usage(value), key, answer.body))

    async def _record(self, batch: Batch, result: Result) -> None:
        await self._in_thread(self._write, batch_rows.record, batch.id, result, self._now())

    # What follows runs in the store's threads.

    def _look_up(self, batch: Batch, line: int) -> tuple[batch_rows.Row, str | None, bytes | None] | None:
        with self._store.read() as connection:
            row = batch_rows.row(connection, batch.id, line)
            if row is None:
                return None
            body = body_asked(row.request, batch.endpoint)
            key = request_cache.key(self._model.revision, batch.owner, batch.endpoint, body)
            return row, key, None if key is None else batch_rows.answer(connection, key)

    def _validate(self, batch: Batch) -> None:
        with self._store.read() as connection:
            if files.chunk(connection, batch.input_file_id, 0) is None:
                errors = [BatchError(code="empty_file", message="the input file is empty, or was deleted")]
                rows: list[batch_rows.Row] = []
            else:
                lines = files.lines(connection, batch.input_file_id)
                rows, errors = check(lines, batch.endpoint, self._model.serves, self._limits)
        with self._store.write() as connection:
            if errors:
                data = [error.model_dump() for error in errors]
                batches.move(connection, batch.id, ["validating"], "failed", self._now(), errors=data)
            elif batches.move(connection, batch.id, ["validating"], "in_progress", self._now(), total=len(rows)):
                again = files.lines(connection, batch.input_file_id)
                batch_rows.fill(connection, batch.id, with_requests(rows, again))

    def _finalize(self, batch: Batch) -> None:
        with self._store.write() as connection:
            batches.move(connection, batch.id, ["in_progress"], "finalizing", self._now())

    def _close(self, batch: Batch, status: Status, why: tuple[str, str] | None = None) -> None:
        """End a batch in one transaction; rows that still wait fail, because of `why`."""
        with self._store.write() as connection:
            if not batches.move(connection, batch.id, [batch.status], status, self._now()):
                return
            if why is not None:
                texts = [
                    (line, error_line(_row_id(batch.id, line), custom_id, *why))
                    for line, custom_id in batch_rows.names(connection, batch.id)
                ]
                batch_rows.fail_rest(connection, batch.id, texts, self._now())
            batch_rows.forget_requests(connection, batch.id)
            batch_rows.trim_answers(connection, CACHED_ANSWERS)

    def _sweep(self) -> None:
        """Forget files whose time is over, except those of batches that run."""
        with self._store.write() as connection:
            for file in files.expired(connection, self._now()):
                if not batches.reading(connection, file.id):
                    batch_rows.remove_file(connection, file)

    def _batch(self, batch_id: str) -> Batch:
        batch = self._read(batches.get, batch_id)
        assert batch is not None, "batches are never deleted"
        return batch

    def _read(self, function: Callable[..., Got], *arguments: Any) -> Got:
        with self._store.read() as connection:
            return function(connection, *arguments)

    def _write(self, function: Callable[..., Got], *arguments: Any) -> Got:
        with self._store.write() as connection:
            return function(connection, *arguments)

    async def _in_thread(self, function: Callable[..., Got], *arguments: Any) -> Got:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _now(self) -> int:
        return int(self._clock())


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _row_id(batch_id: str, line: int) -> str:
    """The same whenever it is made."""
    return f"batch_req_{hashlib.blake2b(f'{batch_id}/{line}'.encode(), digest_size=12).hexdigest()}"


def _usage(body: Any) -> Tokens:
    """The tokens of an answer, in the words of either dialect."""
    usage = body.get("usage") if isinstance(body, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    given = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    drawn = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    return Tokens(
        _count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        _count(given.get("cached_tokens")),
        _count(usage.get("completion_tokens", usage.get("output_tokens"))),
        _count(drawn.get("reasoning_tokens")),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**40 else 0
