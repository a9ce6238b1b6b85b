"""Asks any server over HTTP, for `kvern batch run --url`.

A server that is gone is asked again for `patience` seconds: it may be restarting. One that wants another key gives no
answer to any row, so that ends the run instead of failing every row.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

import httpx

from kvern.client import ANSWER_SECONDS, CONNECT_SECONDS, api_root
from kvern.errors import BadRequestError, UnreachableError
from kvern.jobs.asking import Answer, Question

PATIENCE_SECONDS = 120.0
PAUSE_SECONDS = 1.0


class HttpAsk:
    """Calls one server; `url` may end before or after `/v1`."""

    def __init__(self, url: str, *, api_key: str | None, parallel: int, patience: float | None = None) -> None:
        self.url = api_root(url)
        self._patience = PATIENCE_SECONDS if patience is None else patience
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=parallel),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def __call__(self, question: Question) -> Answer:
        """Ask. Raises UnreachableError, and BadRequestError where the key is refused."""
        end = time.monotonic() + self._patience
        while True:
            try:
                response = await self._http.post(self.url.removesuffix("/v1") + question.url, content=question.body)
                break
            except httpx.HTTPError as error:
                if time.monotonic() >= end:
                    hint = "run the same command again when it answers: what is done stays done"
                    raise UnreachableError(f"nobody answers at {self.url}: {error}", hint=hint) from error
                await asyncio.sleep(PAUSE_SECONDS)
        if response.status_code in (401, 403):
            raise BadRequestError(f"{self.url} answered {response.status_code}", hint="its key goes into KVERN_API_KEY")
        return Answer(
            response.status_code,
            response.content,
            response.headers.get("x-request-id", ""),
            _seconds(response.headers.get("retry-after")),
        )


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:  # a date
        return None
