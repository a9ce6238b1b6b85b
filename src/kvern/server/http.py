"""What the routes need of HTTP: bounded JSON bodies, event streams that notice a client that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvern.errors import BadRequestError, KvernError

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_CLOSED_REQUEST = 499
Result = TypeVar("Result")


class BodyTooLargeError(BadRequestError):
    """A request body above the limit of the settings."""

    status = 413
    code = "request_too_large"


class MediaTypeError(BadRequestError):
    """A body that is not declared as JSON; refusing it also keeps web pages from posting here unasked."""

    status = 415
    code = "unsupported_media_type"


class EventStream(StreamingResponse):
    """Server-sent events. When the client hangs up, sending stops and `close` is called, at once and in any case."""

    def __init__(
        self, events: AsyncGenerator[bytes], close: Callable[[], None], media_type: str = "text/event-stream"
    ) -> None:
        super().__init__(events, media_type=media_type, headers=SSE_HEADERS)
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await until_disconnected(receive, self.stream_response(send))
        finally:
            self._close()
            await self._events.aclose()


async def patiently(
    request: Request,
    work: Coroutine[Any, Any, Response],
    close: Callable[[], None],
    refused: Callable[[KvernError], Response],
    patience: float | None,
) -> Response:
    """The response that `work` makes. `close` is called when it is done, or the client hangs up.

    Whoever waits longer than `patience` seconds gets a response that begins at once, with empty lines until the body
    comes (None: nobody does): proxies do not take it for dead, and JSON may begin with them. Its status is 200 then,
    whatever comes; an error that comes so late is the body, in the envelope of `refused`, and the connection breaks off
    behind it.
    """
    task = asyncio.ensure_future(work)

    def end() -> None:
        task.cancel()
        close()

    try:
        there = await until_disconnected(request.receive, _arrives(task, patience))
    except BaseException:
        end()
        raise
    if there is False and patience is not None:
        return EventStream(_lines(task, refused, patience), end, "application/json")
    try:
        return task.result() if there else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        end()


async def _arrives(task: asyncio.Future[Response], seconds: float | None) -> bool:
    await asyncio.wait((task,), timeout=seconds)
    return task.done()


async def _lines(
    task: asyncio.Future[Response], refused: Callable[[KvernError], Response], patience: float
) -> AsyncGenerator[bytes]:
    while not task.done():
        yield b"\n"
        await _arrives(task, patience)
    try:
        yield bytes(task.result().body)
    except KvernError as error:
        yield bytes(refused(error).body)
        raise


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Await `work`, and cancel it when the client hangs up; None then."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a JSON request. Raises MediaTypeError, BodyTooLargeError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("the body must be JSON", hint="send the header Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise BodyTooLargeError(f"the body is larger than {limit} bytes", hint="see --max-body-bytes")
    return bytes(body)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
