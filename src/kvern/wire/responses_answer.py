"""OpenAI's response object, with every field that its SDK and the Open Responses schema demand, and its items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel

from kvern.errors import BusyError, ContextLengthError, KvernError
from kvern.wire.answers import Usage, error_body
from kvern.wire.responses import ResponsesRequest

Status: TypeAlias = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[dict[str, Any]] = []


class OutputMessage(BaseModel):
    """What the model says."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus = "in_progress"
    content: list[OutputText] = []


class FunctionCall(BaseModel):
    """A call that the model asks for; `arguments` is JSON text as the model wrote it."""

    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "in_progress"


class ReasoningText(BaseModel):
    """Reasoning in full."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class SummaryText(BaseModel):
    """Reasoning where a summary was asked for."""

    type: Literal["summary_text"] = "summary_text"
    text: str = ""


class ReasoningItem(BaseModel):
    """What the model thinks before it speaks."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[SummaryText] = []
    content: list[ReasoningText] = []
    encrypted_content: str | None = None
    status: ItemStatus = "in_progress"


OutputItem: TypeAlias = OutputMessage | FunctionCall | ReasoningItem


class InputTokensDetails(BaseModel):
    """Of the input: what the prefix cache held. Writing into it costs nothing and is not counted."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """Of the output: what was thought."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        """The counts of the request path under this dialect's names."""
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_cache_hit_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(
                reasoning_tokens=usage.completion_tokens_details.reasoning_tokens
            ),
            total_tokens=usage.total_tokens,
        )


class ResponseError(BaseModel):
    """Why a response failed."""

    code: str
    message: str

    @classmethod
    def of(cls, error: KvernError) -> ResponseError:
        """Under the codes that clients act on: Codex compacts a conversation that is too long."""
        known = isinstance(error, BusyError | ContextLengthError)
        code = error.code if known else "server_error" if error.status >= 500 else "invalid_prompt"
        return cls(code=code, message=error_body(error).error.message)


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class Response(BaseModel):
    """A response, at any point of its life."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: None = None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]

    @classmethod
    def of(
        cls, request: ResponsesRequest, response_id: str, created_at: int, *, temperature: float, top_p: float
    ) -> Response:
        """A response that has nothing yet. `temperature` and `top_p`: those that are used."""
        return cls(
            id=response_id,
            created_at=created_at,
            background=request.background,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            max_tool_calls=request.max_tool_calls,
            model=request.model,
            parallel_tool_calls=request.parallel_tool_calls,
            previous_response_id=request.previous_response_id,
            prompt_cache_key=request.prompt_cache_key,
            reasoning={"effort": request.reasoning.effort, "summary": request.reasoning.summary},
            safety_identifier=request.safety_identifier,
            store=request.store,
            temperature=temperature,
            text=request.text.model_dump(exclude_none=True, by_alias=True),
            tool_choice=_choice(request.tool_choice),
            tools=[tool.echo() for tool in request.functions],
            top_logprobs=request.top_logprobs,
            top_p=top_p,
            presence_penalty=float(request.presence_penalty),
            frequency_penalty=float(request.frequency_penalty),
            user=request.user,
            metadata=request.metadata,
        )


class Deleted(BaseModel):
    """The answer to DELETE."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(BaseModel):
    """A page of the items that a response was made from."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def _choice(given: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """The choice as it is repeated: only the fields that were read."""
    if isinstance(given, str):
        return given
    kept = ("type", "name") if given["type"] == "function" else ("type", "mode", "tools")
    return {name: given[name] for name in kept}


def failed_since(response: dict[str, Any]) -> dict[str, Any]:
    """A stored response that still says it runs, though nothing runs it: the server stopped in the middle."""
    if response["status"] not in ("queued", "in_progress"):
        return response
    error = ResponseError(code="server_error", message="the server stopped before the answer was complete")
    return {**response, "status": "failed", "error": error.model_dump()}
