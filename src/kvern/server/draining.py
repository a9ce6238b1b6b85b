"""A uvicorn that stops in two steps: first it answers 503 and finishes what runs, then it closes.

Uvicorn alone would close its sockets at once, and a client in the middle of a retry would find nobody. A second signal
closes without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn

from kvern.server.generate import EngineHost


class DrainingServer(uvicorn.Server):
    """Serves until SIGINT or SIGTERM; running answers then get `seconds` to end. Returns, so the exit code is 0."""

    def __init__(self, config: uvicorn.Config, host: EngineHost, seconds: float) -> None:
        super().__init__(config)
        self._host = host
        self._seconds = seconds
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Serve, with a task beside it that waits for the signal."""
        self._loop = asyncio.get_running_loop()
        draining = asyncio.create_task(self._drain())
        try:
            await super().serve(sockets=None if sockets is None else list(sockets))
        finally:
            draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await draining

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler of uvicorn: called between two instructions of the main thread."""
        if self._stop.is_set() or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._stop.set)

    async def _drain(self) -> None:
        await self._stop.wait()
        await self._host.drain(self._seconds)
        self.should_exit = True
