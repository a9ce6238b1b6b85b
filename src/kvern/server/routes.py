"""The routes, and how a chat answer leaves: as one body, or as events that start once the request is known to be good.

A handler waits for the answer and for the client's disconnect at once, whichever comes first, also while the request
waits for its turn.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvern.errors import BadRequestError, KvernError, NotFoundError
from kvern.llm import LLM, Prepared
from kvern.server.generate import EngineWorker
from kvern.wire import openai as wire
from kvern.wire.stream import ChatStream, error_event

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_CLOSED_REQUEST = 499
JSON_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatCompletionRequest"}}},
    }
}
router = APIRouter(responses={"4XX": {"model": wire.ErrorBody}, "5XX": {"model": wire.ErrorBody}})


class BodyTooLargeError(BadRequestError):
    """A request body above the limit of the settings."""

    status = 413
    code = "request_too_large"


class MediaTypeError(BadRequestError):
    """A body that is not declared as JSON; refusing it also keeps web pages from posting here unasked."""

    status = 415
    code = "unsupported_media_type"


class EventStream(StreamingResponse):
    """Server-sent events; closes their source at once when the client hangs up, which cancels the request."""

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=SSE_HEADERS)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


@router.get("/health")
async def health() -> dict[str, str]:
    """200 as long as the process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 once the model is loaded, 503 before."""
    return {"status": "ready", "model": _worker(request).llm.name}


@router.get("/v1/models")
async def models(request: Request) -> wire.ModelList:
    """The served model, with its context length."""
    return wire.ModelList(data=[_model(request)])


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> wire.Model:
    """One model by its id."""
    _check_model(name, _worker(request).llm)
    return _model(request)


@router.post("/v1/chat/completions", response_model=wire.ChatCompletion, openapi_extra=JSON_BODY)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation; with `stream: true` as server-sent events."""
    body = wire.parse_chat_request(await _read_body(request, request.app.state.settings.max_body_bytes))
    worker = _worker(request)
    _check_model(body.model, worker.llm)
    prepared = await worker.prepare(body.to_messages(), body.to_options())
    if body.stream:
        events = _events(worker, prepared, _chat_stream(body, worker.llm))
        return EventStream(events)
    return await _unless_disconnected(request, _answer(worker, prepared))


async def _answer(worker: EngineWorker, prepared: Prepared) -> Response:
    text, tokens, reason = [], 0, None
    async with aclosing(worker.stream(prepared)) as pieces:
        async for piece in pieces:
            text.append(piece.text)
            tokens += piece.token_id is not None
            reason = piece.finish_reason
    if reason is None:
        raise KvernError("the server is stopping")
    completion = wire.ChatCompletion(
        id=_new_id(),
        created=int(time.time()),
        model=worker.llm.name,
        choices=[wire.Choice(message=wire.AnswerMessage(content="".join(text)), finish_reason=reason)],
        usage=wire.Usage.of(len(prepared.prompt), tokens),
        system_fingerprint=worker.llm.fingerprint,
    )
    return Response(completion.model_dump_json(), media_type="application/json")


async def _events(worker: EngineWorker, prepared: Prepared, stream: ChatStream) -> AsyncGenerator[bytes]:
    yield stream.start()
    tokens = 0
    try:
        async with aclosing(worker.stream(prepared)) as pieces:
            async for piece in pieces:
                tokens += piece.token_id is not None
                if piece.text:
                    yield stream.text(piece.text)
                if piece.finish_reason is not None:
                    yield stream.finish(piece.finish_reason, wire.Usage.of(len(prepared.prompt), tokens))
                    return
        yield error_event(KvernError("the server is stopping"))
    except KvernError as error:
        yield error_event(error)


async def _unless_disconnected(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Await `answer`, and cancel it when the client hangs up."""
    answering, watching = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
        return await answering if answering.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        answering.cancel()
        watching.cancel()
        await asyncio.gather(answering, watching, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, limit: int) -> bytes:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("the body must be JSON", hint="send the header Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise BodyTooLargeError(f"the body is larger than {limit} bytes", hint="see --max-body-bytes")
    return bytes(body)


def _chat_stream(body: wire.ChatCompletionRequest, llm: LLM) -> ChatStream:
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return ChatStream(_new_id(), int(time.time()), llm.name, llm.fingerprint, include_usage)


def _check_model(name: str, llm: LLM) -> None:
    if name != llm.name:
        raise NotFoundError(f"there is no model {name!r}", hint=f"served here: {llm.name}", param="model")


def _model(request: Request) -> wire.Model:
    llm = _worker(request).llm
    return wire.Model(id=llm.name, created=request.app.state.started, max_model_len=llm.max_context)


def _worker(request: Request) -> EngineWorker:
    worker: EngineWorker = request.app.state.worker
    return worker


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"
