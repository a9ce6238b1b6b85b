"""The routes of Anthropic's Messages, for the clients that speak nothing else (Claude Code, the anthropic SDK).

The answer itself takes the one request path; here a body becomes a conversation, and pieces become blocks.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from kvern.errors import BadRequestError
from kvern.llm import LLM, Prepared
from kvern.server.answering import Pieces, events, whole
from kvern.server.http import EventStream, read_body
from kvern.server.routes import EVENTS, check_model, finish, json_body, submit
from kvern.server.state import host_of, settings_of
from kvern.text.conversation import Conversation
from kvern.wire import anthropic_answers as answers
from kvern.wire.anthropic import CountTokensRequest, MessagesRequest, parse_count_request, parse_messages_request
from kvern.wire.anthropic_stream import MessageStream

NAMES = {"stop": "stop_sequences", "continues": "messages"}
"""What the request path calls fields, and what this dialect calls them."""

REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": answers.AnthropicErrorBody},
    "5XX": {"model": answers.AnthropicErrorBody},
}
router = APIRouter(responses=REFUSED)


@router.post(
    "/v1/messages",
    response_model=answers.AnthropicMessage,
    responses=EVENTS,
    openapi_extra=json_body("MessagesRequest"),
)
async def messages(request: Request) -> Response:
    """Answer a conversation in Anthropic's dialect; with `stream: true` as server-sent events."""
    settings, host = settings_of(request), host_of(request)
    body = parse_messages_request(await read_body(request, settings.max_body_bytes))
    llm = host.open()
    check_model(request, body.model, llm)
    prepared, room = await asyncio.to_thread(prepare, llm, body)
    answer = submit(request, [prepared], priority=0)
    pieces = Pieces(llm, answer, [prepared], 1, settings.stream_keep_alive)
    id, edited = f"msg_{secrets.token_hex(12)}", body.context_management is not None
    omit = body.thinking is not None and body.thinking.display == "omitted"
    if body.stream:
        stream = MessageStream(
            id=id,
            model=body.model,
            prompt_tokens=len(prepared.prompt),
            room=room,
            omit_thinking=omit,
            edited=edited,
        )
        return EventStream(events(pieces, stream, 1), answer.close)

    async def respond() -> Response:
        (done,) = await whole(pieces, [prepared])
        message = answers.message_of(done, id=id, model=body.model, room=room, omit_thinking=omit)
        if edited:
            message = answers.EditedMessage(**message.model_dump())
        return Response(message.model_dump_json(), media_type="application/json")

    return await finish(request, answer, respond())


@router.post(
    "/v1/messages/count_tokens", response_model=answers.TokenCount, openapi_extra=json_body("CountTokensRequest")
)
async def count_tokens(request: Request) -> answers.TokenCount:
    """The tokens of a conversation, whether it fits or not."""
    body = parse_count_request(await read_body(request, settings_of(request).max_body_bytes))
    llm = host_of(request).open()
    check_model(request, body.model, llm)
    return answers.TokenCount(input_tokens=await asyncio.to_thread(_count, llm, body))


def prepare(llm: LLM, body: MessagesRequest) -> tuple[Prepared, int | None]:
    """Check and tokenise. Raises BadRequestError that names this dialect's fields.

    More `max_tokens` than the context has room for is no error here: clients ask for the most that there can be. The
    room is returned then, None otherwise; an answer that fills it says so in its stop_reason.
    """
    try:
        prepared = llm.prepare_chat(wished(llm, body), body.to_options())
    except BadRequestError as error:
        error.param = _named(error.param)
        raise
    room = prepared.params.max_tokens
    if body.max_tokens > room:
        return prepared, room
    return replace(prepared, params=replace(prepared.params, max_tokens=body.max_tokens)), None


def _named(param: str | None) -> str | None:
    """A field of the request path's in the words of this dialect."""
    if param is None:
        return None
    return NAMES.get(param, param.replace(".function.parameters", ".input_schema").replace(".function.", "."))


def wished(llm: LLM, body: CountTokensRequest) -> Conversation:
    """The conversation. To think is a wish, which a model that cannot does not hear: clients send it to every model."""
    chat = body.to_conversation()
    if chat.thinking and llm.template is not None and not llm.template.can_think:
        return replace(chat, thinking=None)
    return chat


def _count(llm: LLM, body: CountTokensRequest) -> int:
    ids, _ = llm.encode_chat(wished(llm, body))
    return len(ids)
