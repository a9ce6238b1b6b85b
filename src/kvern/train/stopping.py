"""SIGTERM and SIGINT: a run ends after the step that runs, with a checkpoint, or at once where no step has begun.

A second signal acts at once, too. Within a second of the first it is the same wish: `make` and `timeout` send theirs
twice. What it gives up: before the first step, ranks under torchrun end as any process does, for they may wait for each
other where Python hears nothing.
"""

from __future__ import annotations

import signal
import sys
from time import monotonic
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME = 1.0
"""Seconds within which a second signal is the first one's echo."""


class Stopping:
    """Hears signals between `at_once` or `after_step` and the end of `with`. signal: the first one that came."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._time, self._waits = 0.0, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Handle signals as before. A run that one has cut off says so, and ends with 128 and the signal's number."""
        self._restore()
        if self.signal is not None and isinstance(error, KeyboardInterrupt):
            sys.stderr.write(f"stopped by {self.signal.name} at once; --resume auto goes on\n")
            raise SystemExit(128 + self.signal) from None

    def at_once(self) -> None:
        """From now on the first signal raises KeyboardInterrupt."""
        if not self._before:
            self._before = {one: signal.signal(one, self._hear) for one in SIGNALS}

    def after_step(self) -> None:
        """From now on whoever takes the steps looks whether there was a signal."""
        self.at_once()
        self._waits = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = monotonic()
        if self.signal is None:
            self.signal, self._time = signal.Signals(number), now
            if not self._waits:
                raise KeyboardInterrupt
        elif now >= self._time + SAME:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
