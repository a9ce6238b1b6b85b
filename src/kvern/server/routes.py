"""The routes. A request is checked, tokenised and queued before the first byte of an answer leaves.

So whatever refuses it (a bad field, a full queue, a prompt that can never fit) does so with a status of its own. From
then on the handler waits for the answer and for the client's disconnect at once, whichever comes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from kvern.errors import BadRequestError, KvernError, NotFoundError, UnavailableError
from kvern.llm import LLM, Prepared
from kvern.server.aliases import Aliases
from kvern.server.answering import Pieces, chat_body, completion_body, events, head, spread, whole
from kvern.server.generate import RETRY_SECONDS, Answer
from kvern.server.http import EventStream, patiently, read_body
from kvern.server.inside import OWNER
from kvern.server.refusals import refusal, speaks_anthropic
from kvern.server.state import host_of, salt_of, settings_of
from kvern.text.conversation import Conversation
from kvern.wire import answers as wire
from kvern.wire.anthropic_answers import AnthropicModel, AnthropicModelList
from kvern.wire.chat import ChatCompletion, ChatCompletionRequest, parse_chat_request
from kvern.wire.completions import Completion, CompletionRequest, parse_completion_request
from kvern.wire.deepseek import THINKS, DeepSeekStream
from kvern.wire.stream import ChatStream, CompletionStream

DOCS_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "One body, or its events."}
}
router = APIRouter(responses={"4XX": {"model": wire.ErrorBody}, "5XX": {"model": wire.ErrorBody}})


def one_tenant(request: Request) -> bytes:
    """Everybody shares prefixes with everybody."""
    return b""


def json_body(schema: str) -> dict[str, Any]:
    """The OpenAPI of a request body that the handler reads itself."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"requestBody": {"required": True, "content": content}}


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 as long as the engine computes, also while the model loads; 503 after a fault, until it runs again."""
    if not host_of(request).healthy:
        raise UnavailableError("the engine failed and is starting again", retry_after=RETRY_SECONDS)
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 while new requests are served: the model is loaded, and the server is not stopping."""
    return {"status": "ready", "model": host_of(request).open().name}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus' text format, under vLLM's names."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """A page that shows /openapi.json; it loads nothing from elsewhere."""
    page = (resources.files("kvern.server") / "static" / "docs.html").read_text(encoding="utf-8")
    return HTMLResponse(page, headers={"Content-Security-Policy": DOCS_POLICY})


@router.get("/v1/models")
async def models(request: Request) -> wire.ModelList | AnthropicModelList:
    """The served model, with its context length and capabilities; in Anthropic's words to who speaks them."""
    one = _model(request)
    return AnthropicModelList.of([one]) if isinstance(one, AnthropicModel) else wire.ModelList(data=[one])


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> wire.Model | AnthropicModel:
    """One model by its id."""
    check_model(request, name, host_of(request).llm)
    return _model(request)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=EVENTS,
    openapi_extra=json_body("ChatCompletionRequest"),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation; with `stream: true` as server-sent events."""
    settings, host = settings_of(request), host_of(request)
    body = parse_chat_request(await read_body(request, settings.max_body_bytes))
    llm = host.open()
    check_model(request, body.model, llm)
    prepared = await asyncio.to_thread(llm.prepare_chat, _conversation(llm, body), body.to_options())
    requests = spread([prepared], body.n)
    answer, top = submit(request, requests, body.priority), head(llm, "chatcmpl", body.model)
    pieces = Pieces(llm, answer, requests, body.n, settings.stream_keep_alive)
    if body.stream:
        kind = DeepSeekStream if _speaks_deepseek(request, body.model) else ChatStream
        stream = kind(top, body.include_usage, body.logprobs, prepared.parsing.thinks == "inside")
        return EventStream(events(pieces, stream, len(requests)), answer.close)

    async def respond() -> Response:
        done = await whole(pieces, requests)
        return _json(chat_body(top, done, pieces.usage(), body.logprobs))

    return await finish(request, answer, respond())


@router.post(
    "/v1/completions", response_model=Completion, responses=EVENTS, openapi_extra=json_body("CompletionRequest")
)
async def completions(request: Request) -> Response:
    """Continue prompts, or fill the gap before `suffix`; with `stream: true` as server-sent events."""
    settings, host = settings_of(request), host_of(request)
    body = parse_completion_request(await read_body(request, settings.max_body_bytes))
    llm = host.open()
    check_model(request, body.model, llm)
    requests = spread(await asyncio.to_thread(prepare_completion, llm, body), body.n)
    prompts = [_echoed(llm, body, prompt) for prompt in body.prompts for _ in range(body.n)]
    answer, top = submit(request, requests, body.priority), head(llm, "cmpl", body.model)
    pieces = Pieces(llm, answer, requests, body.n, settings.stream_keep_alive)
    scored = body.logprobs is not None
    if body.stream:
        stream = CompletionStream(top, body.include_usage, scored, tuple(prompts))
        return EventStream(events(pieces, stream, len(requests)), answer.close)

    async def respond() -> Response:
        done = await whole(pieces, requests)
        return _json(completion_body(top, done, pieces.usage(), scored, prompts))

    return await finish(request, answer, respond())


@router.post("/v1/embeddings", include_in_schema=False)
async def embeddings() -> None:
    """Refused by name."""
    raise BadRequestError(
        "embeddings are not served: the model here generates text", hint="/v1/completions continues it"
    )


def _conversation(llm: LLM, body: ChatCompletionRequest) -> Conversation:
    """What is to be answered. DeepSeek's names ask to think or not, as far as the model can."""
    can_think = llm.template is not None and llm.template.can_think
    chat = body.to_conversation(can_think)
    if chat.thinking is None and llm.template is not None and (can_think or not THINKS.get(body.model)):
        return replace(chat, thinking=THINKS.get(body.model))
    return chat


def _speaks_deepseek(request: Request, model: str) -> bool:
    return model in THINKS or request.url.path.startswith("/beta/")


def prepare_completion(llm: LLM, body: CompletionRequest) -> list[Prepared]:
    """Check and tokenise the prompts. Raises BadRequestError."""
    form = body.guided_format()
    return [llm.with_format(_prepare_prompt(llm, body, prompt), form) for prompt in body.prompts]


def _prepare_prompt(llm: LLM, body: CompletionRequest, prompt: str | list[int]) -> Prepared:
    options = body.to_options()
    if not isinstance(prompt, str):
        return llm.prepare(prompt, options)
    if body.suffix is not None:
        return llm.prepare_middle(prompt, body.suffix, options)
    return llm.prepare_text(prompt, options, allow_special=body.allow_special_tokens)


def _echoed(llm: LLM, body: CompletionRequest, prompt: str | list[int]) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)


def submit(request: Request, requests: Sequence[Prepared], priority: int) -> Answer:
    """Queue the requests behind one HTTP request, or refuse them all."""
    most = settings_of(request).max_waiting
    if len(requests) > most:
        raise BadRequestError(
            f"the request has {len(requests)} choices and the queue holds {most}", param="n", hint="ask for fewer"
        )
    return host_of(request).submit(requests, priority=priority, salt=salt_of(request))


async def finish(request: Request, answer: Answer, work: Coroutine[Any, Any, Response]) -> Response:
    """The whole answer that `work` makes; a client that hangs up cancels it, one that waits long gets empty lines."""

    def refused(error: KvernError) -> Response:
        return refusal(request, error)

    return await patiently(request, work, answer.close, refused, patience(request))


def patience(request: Request) -> float | None:
    """Seconds after which a whole answer begins with empty lines; a row of a batch waits for its true status."""
    return None if OWNER in request.scope else settings_of(request).stream_keep_alive


def _json(body: ChatCompletion | Completion) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def check_model(request: Request, name: str, llm: LLM) -> None:
    """Raise NotFoundError where a name is neither the model's nor an alias of it."""
    aliases: Aliases = request.app.state.aliases
    if aliases.resolve(name, llm.name) != llm.name:
        raise NotFoundError(f"there is no model {name!r}", hint=f"served here: {llm.name}", param="model")


def _model(request: Request) -> wire.Model | AnthropicModel:
    llm = host_of(request).llm
    if speaks_anthropic(request):
        return AnthropicModel.of(llm.name, request.app.state.started, llm.max_context)
    return wire.Model(
        id=llm.name,
        created=request.app.state.started,
        max_model_len=llm.max_context,
        context_length=llm.max_context,
        capabilities=wire.Capabilities(
            chat=llm.template is not None,
            fill_in_the_middle=llm.fim is not None,
            tools=llm.template is not None,
            prefix_caching=settings_of(request).prefix_caching,
        ),
    )
