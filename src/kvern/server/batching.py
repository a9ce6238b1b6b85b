"""The runner of a server's batches: it starts when the model is loaded, and stops before the server drains.

What runs is safe to cut short at any moment: rows without a result run again after the next start.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI

from kvern.errors import KvernError
from kvern.jobs.asking import Ask
from kvern.jobs.batch import BatchRunner, Model
from kvern.jobs.batch_input import Limits
from kvern.llm import LLM
from kvern.server.aliases import Aliases
from kvern.server.inside import inside
from kvern.settings import ServeSettings
from kvern.store import Store
from kvern.wire.batches import MAX_LINES

OFFLINE_BODY_BYTES = 64 * 2**20
log = logging.getLogger(__name__)


class Batching:
    """Starts, wakes and stops the runner."""

    def __init__(self) -> None:
        self._runner: BatchRunner | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, app: FastAPI, llm: LLM) -> None:
        """Work on the batches of the store that are for this model."""
        settings: ServeSettings = app.state.settings
        self._runner = BatchRunner(
            app.state.store,
            _model(app, llm),
            inside(app),
            limits=Limits(MAX_LINES, settings.max_body_bytes),
            parallel=parallel(settings),
        )
        self._task = asyncio.create_task(self._runner.run())
        self._task.add_done_callback(_report)

    def wake(self) -> None:
        """Look for new work now."""
        if self._runner is not None:
            self._runner.wake()

    def stop(self) -> None:
        """Cut short what runs, and take nothing more."""
        if self._task is not None:
            self._task.cancel()

    async def stopped(self) -> None:
        """Stop, and wait until nothing runs."""
        self.stop()
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task


def parallel(settings: ServeSettings) -> int:
    """Rows in flight: as many as are computed together, and never more than half of the queue."""
    return max(1, min(settings.max_running, settings.max_waiting // 2))


def revision(llm: LLM) -> str:
    """What changes whenever the model's answers may: its files, their sizes and dates, the context's length.

    A copy of a model has dates of its own; then requests are computed once more, which is the harmless mistake.
    """
    digest = hashlib.sha256(f"{llm.fingerprint} {llm.max_context}".encode())
    for file in sorted(Path(llm.folder).iterdir()):
        if file.suffix in (".json", ".safetensors"):
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _model(app: FastAPI, llm: LLM) -> Model:
    aliases: Aliases = app.state.aliases
    return Model(llm.name, revision(llm), lambda name: aliases.resolve(name, llm.name) == llm.name)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the batches of this server stopped", exc_info=error)


@asynccontextmanager
async def offline(load: Callable[[], LLM], store: Store) -> AsyncIterator[tuple[Model, Ask]]:
    """A model in this process, asked as a server is, without one. Raises what `load` raises."""
    from kvern.server.app import create_app

    loading: asyncio.Future[LLM] = asyncio.get_running_loop().create_future()

    def loaded(result: LLM | KvernError) -> None:
        if isinstance(result, KvernError):
            loading.set_exception(result)
        else:
            loading.set_result(result)

    app = create_app(load, ServeSettings(run_batches=False, max_body_bytes=OFFLINE_BODY_BYTES), loaded, store=store)
    async with app.router.lifespan_context(app):
        llm = await loading
        yield _model(app, llm), inside(app)
