"""The engine's thread: steps as long as there is work, hands the updates over once a step, survives a fault.

    submit (any thread) -> engine.add | engine thread: step -> deliver(updates)

A step or a delivery that raises ends every request with an error, those included whose end was being delivered; the
engine forgets its cache and starts again after a pause that doubles with each fault in a row. Nothing but `stop` ends
the thread: it lets the running requests end for a while, then cancels them.
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
        self._undelivered: list[Update] = []
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
        while True:
            try:
                if self._stopping.is_set() and self._drained():
                    return
                self._work()
            except Exception:
                self._fail()

    def _work(self) -> None:
        """One step; or, when idle, a check that every block is accounted for, and sleep until there is work."""
        if self.engine.has_work():
            self._hand_over(self.engine.step())
            self._pause = self._first_pause
            return
        self.engine.check()
        self._wake.wait()
        self._wake.clear()

    def _drained(self) -> bool:
        """Whether nothing is left; after the deadline everything is cancelled."""
        if time.monotonic() >= self._deadline:
            for request_id in self.engine.live():
                self.engine.cancel(request_id)
            self._hand_over(self.engine.step_cancelled())
        return not self.engine.has_work()

    def _hand_over(self, updates: list[Update]) -> None:
        self._undelivered = updates
        if updates:
            self._deliver(updates)
        self._undelivered = []

    def _fail(self) -> None:
        log.exception("a step of the engine or its delivery failed; it restarts in %.1f s", self._pause)
        error = EngineFaultError("the engine failed while it computed this request")
        with self._gate:
            self._down.set()
            lost = dict.fromkeys([*self.engine.live(), *(update.request_id for update in self._undelivered)])
            self.engine.reset()
        try:
            self._hand_over([Update(number, finish="error", error=error) for number in lost])
        except Exception:
            log.exception("the end of %d requests could not be delivered", len(lost))
        self._undelivered = []
        self._stopping.wait(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._down.clear()
