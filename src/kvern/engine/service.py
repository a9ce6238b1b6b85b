"""The engine's thread: steps as long as there is work, hands the updates over once a step, survives a fault.

    submit (any thread) -> engine.add | engine thread: step -> deliver(updates)

A step that raises ends every live request with an error; the engine forgets its cache and starts again after a pause
that doubles with each fault in a row. `stop` lets the running requests end for a while, then cancels them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from kvern.engine.engine import Engine
from kvern.engine.params import SamplingParams
from kvern.engine.request import Update
from kvern.errors import KvernError, UnavailableError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a restart."""

log = logging.getLogger(__name__)


class EngineFaultError(KvernError):
    """The step that computed a request failed; the log has the reason."""

    code = "engine_fault"


class EngineThread:
    """Runs `engine` in one thread. `deliver` is called there, once a step that has anything to tell."""

    def __init__(
        self, engine: Engine, deliver: Callable[[list[Update]], None], *, first_pause: float = FIRST_PAUSE
    ) -> None:
        self.engine = engine
        self._deliver = deliver
        self._first_pause = self._pause = first_pause
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._down = threading.Event()
        self._deadline = float("inf")
        self._gate = threading.Lock()
        """Held while a request enters, a fault clears the engine, or the stop begins: no request slips between."""
        self._thread = threading.Thread(target=self._run, name="kvern-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the engine computes: it runs, and is not waiting to restart after a fault."""
        return self._thread.is_alive() and not self._down.is_set()

    def submit(self, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0, salt: bytes = b"") -> int:
        """Queue a request, from any thread. Raises as `Engine.add`, and UnavailableError when down or stopping."""
        with self._gate:
            if self._stopping.is_set():
                raise UnavailableError("the server is stopping", retry_after=5)
            if not self.healthy:
                raise UnavailableError("the engine failed and is restarting", retry_after=self._pause)
            request_id = self.engine.add(prompt, params, priority=priority, salt=salt)
        self._wake.set()
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request within one step, from any thread."""
        self.engine.cancel(request_id)
        self._wake.set()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take nothing new, let what runs end for up to `drain_seconds`, cancel the rest, and join the thread."""
        self._deadline = time.monotonic() + drain_seconds
        with self._gate:
            self._stopping.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._drained()):
            try:
                updates = self._work()
            except Exception:
                self._fail()
                continue
            if updates:
                self._deliver(updates)

    def _work(self) -> list[Update]:
        """One step; or, when idle, a check that every block is accounted for, and sleep until there is work."""
        if self.engine.has_work():
            updates = self.engine.step()
            self._pause = self._first_pause
            return updates
        self.engine.check()
        self._wake.wait()
        self._wake.clear()
        return []

    def _drained(self) -> bool:
        """Whether nothing is left; after the deadline everything is cancelled."""
        if time.monotonic() >= self._deadline:
            for request_id in self.engine.live():
                self.engine.cancel(request_id)
            if updates := self.engine.step_cancelled():
                self._deliver(updates)
        return not self.engine.has_work()

    def _fail(self) -> None:
        log.exception("a step of the engine failed; it restarts in %.1f s", self._pause)
        error = EngineFaultError("the engine failed while it computed this request")
        with self._gate:
            self._down.set()
            lost = self.engine.live()
            self.engine.reset()
        self._deliver([Update(number, finish="error", error=error) for number in lost])
        self._stopping.wait(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._down.clear()
