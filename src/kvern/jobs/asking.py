"""What a row asks and what it gets: the call that batches are handed in, and the patience around it.

A server that is busy or starting again is asked again, for as long as it takes: that is no answer to the row. An error
inside the server is, once it has come ATTEMPTS times.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

ATTEMPTS = 3
LATER = (429, 503)
LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Question:
    """One request: the route, the JSON body, whose it is."""

    url: str
    body: bytes
    owner: str


@dataclass(frozen=True)
class Answer:
    """What came back. retry_after: seconds, where the server said so."""

    status: int
    body: bytes
    request_id: str
    retry_after: float | None = None

    @property
    def json(self) -> Any:
        """The body; one that is no JSON (a proxy's page) as an error envelope around it."""
        try:
            return json.loads(self.body)
        except ValueError:
            text = self.body[:1000].decode(errors="replace")
            return {"error": {"message": text, "type": "server_error", "param": None, "code": "not_json"}}


Ask: TypeAlias = Callable[[Question], Awaitable[Answer]]
"""Asks the model. Raises only where nothing can be asked any more."""


async def ask_patiently(ask: Ask, question: Question, pause: float = 1.0) -> Answer:
    """Ask until there is an answer that says something about the request."""
    failures = 0
    while True:
        answer = await ask(question)
        if answer.status < 500 and answer.status not in LATER:
            return answer
        if answer.status not in LATER:
            failures += 1
            if failures == ATTEMPTS:
                return answer
        await asyncio.sleep(min(answer.retry_after or pause, LONGEST_PAUSE))
