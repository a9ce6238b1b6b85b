"""The routes of OpenAI's Responses: made at once, as events, or in the background; then fetched, ended, forgotten.

The answer itself takes the one request path; here a body becomes a conversation, and pieces become a response.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from kvern.errors import BadRequestError, ContextLengthError
from kvern.llm import LLM, Prepared
from kvern.server.answering import Pieces
from kvern.server.http import CLIENT_CLOSED_REQUEST, EventStream, read_body, until_disconnected
from kvern.server.paging import choice, parameters, read_page
from kvern.server.routes import EVENTS, check_model, json_body
from kvern.server.running_responses import Responses, Run
from kvern.server.state import host_of, owner_of, salt_of, settings_of
from kvern.wire import answers as wire
from kvern.wire import responses_answer as answer_wire
from kvern.wire.responses import SEALED_REASONING, ResponsesRequest, parse_responses_request
from kvern.wire.responses_items import Item, with_ids
from kvern.wire.responses_stream import Event, ResponseBuilder, encode
from kvern.wire.stream import KEEP_ALIVE

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "thinking": "reasoning.effort"}
"""What the request path calls fields, and what this dialect calls them."""

TOOL = re.compile(r"tools\.(\d+)\.function\.")
MOST_ITEMS = 100
router = APIRouter(responses={"4XX": {"model": wire.ErrorBody}, "5XX": {"model": wire.ErrorBody}})


@router.post(
    "/v1/responses",
    response_model=answer_wire.Response,
    responses=EVENTS,
    openapi_extra=json_body("ResponsesRequest"),
)
async def create(request: Request) -> Response:
    """Answer a text or items; with `stream: true` as server-sent events, with `background: true` later."""
    settings = settings_of(request)
    host = host_of(request)
    body, given = parse_responses_request(await read_body(request, settings.max_body_bytes))
    llm = host.open()
    check_model(request, body.model, llm)
    response_id, owner, responses = _new_id(), owner_of(request), _responses(request)
    previous = body.previous_response_id
    before = [] if previous is None else await responses.before(owner, previous)
    fresh = await responses.resolve(owner, given, before)
    items = [*before, *with_ids(fresh, response_id.removeprefix("resp_"))]
    try:
        prepared = await asyncio.to_thread(_prepare, llm, body, items)
    except ContextLengthError as error:
        if body.stream and not body.background:  # clients look for it here, and shorten the conversation
            return EventStream(_refused(_builder(body, response_id, None), error), lambda: None)
        raise
    builder = _builder(body, response_id, prepared)
    answer = host.submit([prepared], priority=body.priority, salt=salt_of(request))
    pieces = Pieces(llm, answer, [prepared], 1, settings.stream_keep_alive)
    run = Run(builder, pieces, answer, responses.keep(owner, items) if body.store else None)
    if body.background:
        return await _in_background(responses, owner, response_id, run, body, settings.stream_keep_alive)
    responses.add(owner, response_id, run)

    def close() -> None:
        responses.remove(owner, response_id)
        answer.close()

    if body.stream:
        return EventStream(_encoded(run.produce()), close)
    return await _whole(request, run, close)


@router.get(
    "/v1/responses/{response_id}",
    response_model=answer_wire.Response,
    responses=EVENTS,
    openapi_extra=parameters(
        stream={"type": "string", "enum": ["true", "false"]}, starting_after={"type": "integer", "minimum": -1}
    ),
)
async def get(request: Request, response_id: str) -> Response:
    """A stored response; with `stream=true` the events of a background one, those behind `starting_after`."""
    responses, owner = _responses(request), owner_of(request)
    if choice(request, "stream", ("true", "false"), "false") == "false":
        return _json(await responses.get(owner, response_id))
    after = _starting_after(request)
    await responses.get(owner, response_id)
    run = responses.followed(owner, response_id)
    if run is None:
        hint = "those made with background and stream can, while they run and for a while after"
        raise BadRequestError("the events of this response cannot be read again", hint=hint, param="stream")
    settings = settings_of(request)
    return EventStream(run.follow(after, settings.stream_keep_alive), lambda: None)


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> answer_wire.Deleted:
    """Forget a response; one that runs ends."""
    await _responses(request).delete(owner_of(request), response_id)
    return answer_wire.Deleted(id=response_id)


@router.post("/v1/responses/{response_id}/cancel", response_model=answer_wire.Response)
async def cancel(request: Request, response_id: str) -> Response:
    """End a response that runs, in the background or as a stream."""
    return _json(await _responses(request).cancel(owner_of(request), response_id))


@router.get(
    "/v1/responses/{response_id}/input_items",
    openapi_extra=parameters(
        after={"type": "string"},
        limit={"type": "integer", "minimum": 1, "maximum": MOST_ITEMS},
        order={"type": "string", "enum": ["asc", "desc"]},
    ),
)
async def input_items(request: Request, response_id: str) -> answer_wire.ItemList:
    """The items that a response was made from, those of earlier responses included; the newest first."""
    page = read_page(request, 20, MOST_ITEMS, ("order", "include"))
    newest = choice(request, "order", ("asc", "desc"), "desc") == "desc"
    items = await _responses(request).items(owner_of(request), response_id)
    if newest:
        items.reverse()
    if page.after is not None:
        ids = [item["id"] for item in items]
        if page.after not in ids:
            raise BadRequestError(f"there is no item {page.after!r}", param="after")
        items = items[ids.index(page.after) + 1 :]
    data = items[: page.limit]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return answer_wire.ItemList(data=data, first_id=first, last_id=last, has_more=len(items) > len(data))


def _prepare(llm: LLM, body: ResponsesRequest, items: list[Item]) -> Prepared:
    """Check and tokenise. Raises BadRequestError that names this dialect's fields."""
    can_think = llm.template is not None and llm.template.can_think
    chat = body.to_conversation(items, can_think)
    try:
        return llm.prepare_chat(chat, body.to_options())
    except BadRequestError as error:
        error.param = NAMES.get(error.param or "", error.param)
        if error.param is not None and (found := TOOL.match(error.param)):
            place = [tool.get("name") for tool in body.tools].index(chat.tools[int(found[1])].name)
            error.param = f"tools.{place}.{error.param[found.end() :]}"
        raise


def _builder(body: ResponsesRequest, response_id: str, prepared: Prepared | None) -> ResponseBuilder:
    """`prepared` None: nothing will be drawn, so what was asked for is all there is to say."""
    temperature = prepared.params.temperature if prepared else (1.0 if body.temperature is None else body.temperature)
    top_p = prepared.params.top_p if prepared else (1.0 if body.top_p is None else body.top_p)
    response = answer_wire.Response.of(body, response_id, int(time.time()), temperature=temperature, top_p=top_p)
    summary = (body.reasoning.summary or body.reasoning.generate_summary) is not None
    return ResponseBuilder(response, summary=summary, sealed=SEALED_REASONING in body.include, logprobs=body.logprobs)


async def _in_background(
    responses: Responses, owner: str, response_id: str, run: Run, body: ResponsesRequest, patience: float
) -> Response:
    assert run.keep is not None
    first = {**run.builder.response(), "status": "queued"}
    try:
        await run.keep(first)
    except BaseException:
        run.cancel()
        raise
    responses.work(owner, response_id, run, followed=body.stream)
    return EventStream(run.follow(-1, patience), lambda: None) if body.stream else _json(first)


async def _whole(request: Request, run: Run, close: Callable[[], None]) -> Response:
    """Await the whole answer; a client that hangs up ends it."""

    async def respond() -> Response:
        async for _ in run.produce():
            pass
        if run.error is not None:
            raise run.error
        return _json(run.builder.response())

    try:
        response = await until_disconnected(request.receive, respond())
    finally:
        close()
    return response or Response(status_code=CLIENT_CLOSED_REQUEST)


async def _encoded(lists: AsyncIterable[list[Event]]) -> AsyncGenerator[bytes]:
    async for events in lists:
        yield encode(events) if events else KEEP_ALIVE


async def _refused(builder: ResponseBuilder, error: ContextLengthError) -> AsyncGenerator[bytes]:
    yield encode([*builder.start(), *builder.fail(error)])


def _json(body: dict[str, Any]) -> Response:
    return Response(json.dumps(body, ensure_ascii=False), media_type="application/json")


def _new_id() -> str:
    return f"resp_{secrets.token_hex(12)}"


def _responses(request: Request) -> Responses:
    responses: Responses = request.app.state.responses
    return responses


def _starting_after(request: Request) -> int:
    given = request.query_params.get("starting_after", "-1")
    if re.fullmatch("-1|[0-9]{1,9}", given) is None:
        raise BadRequestError("starting_after must be the number of an event", param="starting_after")
    return int(given)
