"""An engine without a model: every request gets the same script, one token a step. It counts what it is asked."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence

from kvern.engine import Engine, EngineStats, SamplingParams, Update
from kvern.errors import BusyError


class ScriptedEngine(Engine):
    """Repeats `script` until a stop id or max_tokens; a step takes `pause` seconds. Set `fails` to make steps raise."""

    def __init__(
        self, script: Sequence[int] = (64,), *, max_context: int = 1000, max_waiting: int = 256, pause: float = 0.0
    ) -> None:
        self.script = script
        self.max_context = max_context
        self.longer_context = ", or serve with a larger --max-context"
        self.max_waiting = max_waiting
        self.vocab_size = 320
        self.pause = pause
        self.fails = False
        self.asked: list[SamplingParams] = []
        self.salts: list[bytes] = []
        self.priorities: list[int] = []
        self.finished: Counter[str] = Counter()
        self.drawn = 0
        self._ids = itertools.count()
        self.reset()

    def reset(self) -> None:
        self._running: dict[int, tuple[SamplingParams, int]] = {}
        self._gone: list[int] = []

    def add(self, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0, salt: bytes = b"") -> int:
        if len(self._running) >= self.max_waiting:
            raise BusyError(f"{self.max_waiting} requests are waiting already", retry_after=1)
        self.asked.append(params)
        self.salts.append(salt)
        self.priorities.append(priority)
        number = next(self._ids)
        self._running[number] = (params, 0)
        return number

    def close(self) -> None:
        """Nothing is on a disk."""

    def cancel(self, request_id: int) -> None:
        self._gone.append(request_id)

    def step(self) -> list[Update]:
        time.sleep(self.pause)
        if self.fails:
            raise RuntimeError("secret detail")
        return self.step_cancelled() + [self._draw(number) for number in list(self._running)]

    def step_cancelled(self) -> list[Update]:
        gone = [number for number in self._gone if number in self._running]
        self._gone.clear()
        return [self._end(number, Update(number, finish="cancelled")) for number in gone]

    def _draw(self, number: int) -> Update:
        params, count = self._running[number]
        token = self.script[count % len(self.script)]
        self._running[number] = (params, count + 1)
        self.drawn += 1
        if token in params.stop_token_ids:
            return self._end(number, Update(number, (token,), finish="stop"))
        if count + 1 >= params.max_tokens:
            return self._end(number, Update(number, (token,), finish="length"))
        return Update(number, (token,))

    def _end(self, number: int, update: Update) -> Update:
        del self._running[number]
        self.finished[update.finish or ""] += 1
        return update

    def has_work(self) -> bool:
        return bool(self._running or self._gone)

    def live(self) -> list[int]:
        return list(self._running)

    def check(self) -> None:
        pass

    def stats(self) -> EngineStats:
        drafts = (4, 9, (3, 2, 0))
        return EngineStats(len(self._running), 0, 10, 4, 30, 20, 1, 50, self.drawn, 7, dict(self.finished), *drafts)
