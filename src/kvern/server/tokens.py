"""The routes that show how the model reads a text: /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from kvern.errors import BadRequestError
from kvern.llm import LLM
from kvern.server.http import read_body
from kvern.server.routes import check_model, json_body
from kvern.server.state import host_of, settings_of
from kvern.text.conversation import Conversation
from kvern.wire import answers as wire
from kvern.wire.tokens import (
    Detokenized,
    TokenizeRequest,
    Tokens,
    parse_detokenize_request,
    parse_tokenize_request,
)

router = APIRouter(responses={"4XX": {"model": wire.ErrorBody}, "5XX": {"model": wire.ErrorBody}})


@router.post("/tokenize", openapi_extra=json_body("TokenizeRequest"))
async def tokenize(request: Request) -> Tokens:
    """The ids of a text or of a conversation, whether it fits or not. Control strings in it stay text."""
    body, chat = parse_tokenize_request(await read_body(request, _limit(request)))
    llm = _model(request, body.model)
    return await asyncio.to_thread(_tokens, llm, body, chat)


@router.post("/detokenize", openapi_extra=json_body("DetokenizeRequest"))
async def detokenize(request: Request) -> Detokenized:
    """The text of ids; special tokens show."""
    body = parse_detokenize_request(await read_body(request, _limit(request)))
    llm = _model(request, body.model)
    for index, token in enumerate(body.tokens):
        if token >= llm.vocab_limit:
            says = f"token id {token} is outside the vocabulary of {llm.vocab_limit}"
            raise BadRequestError(says, param=f"tokens.{index}")
    return Detokenized(prompt=await asyncio.to_thread(_text, llm, body.tokens))


def _tokens(llm: LLM, body: TokenizeRequest, chat: Conversation | None) -> Tokens:
    if chat is not None:
        ids, _ = llm.encode_chat(chat)
    else:
        start = llm.start_ids if body.add_special_tokens in (None, True) else []
        ids = start + llm.tokenizer.encode(body.prompt or "")
    names = [llm.tokenizer.token_bytes(one).decode(errors="replace") for one in ids] if body.return_token_strs else None
    return Tokens(count=len(ids), max_model_len=llm.max_context, tokens=ids, token_strs=names)


def _text(llm: LLM, ids: list[int]) -> str:
    return b"".join(llm.tokenizer.token_bytes(one) for one in ids).decode(errors="replace")


def _model(request: Request, name: str | None) -> LLM:
    host = host_of(request)
    llm = host.open()
    if name is not None:
        check_model(request, name, llm)
    return llm


def _limit(request: Request) -> int:
    settings = settings_of(request)
    return settings.max_body_bytes
