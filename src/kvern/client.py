"""The calls of `llm.LLM` against any server that speaks OpenAI's Chat Completions.

Options that are left at their defaults are not sent, so vLLM's extensions (top_k, min_p ...) reach only who asked.
It reads only what it needs of an answer, so servers that say more, or less, work. Failures become KvernErrors: the
server's own message with its status and field, or UnreachableError with a hint when nobody answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, Self

import httpx

from kvern.errors import BadRequestError, BusyError, KvernError, NotFoundError, UnreachableError
from kvern.text.conversation import Conversation, ConversationLike, as_conversation
from kvern.text.messages import Completion, NamedTool, Tool, ToolCall
from kvern.text.options import SamplingOptions
from kvern.text.output_format import OutputFormat

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 600.0
DEFAULT_URL = "http://127.0.0.1:8000/v1"


class Client:
    """Calls one server. `url` may end before or after `/v1`; `model` None: the first one that the server lists."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = ANSWER_SECONDS,
    ) -> None:
        self.url = api_root(url)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx.Timeout(timeout, connect=CONNECT_SECONDS)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=limits)
        self._model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @property
    def model(self) -> str:
        """The model that is asked."""
        if self._model is None:
            names = self.models()
            if not names:
                raise NotFoundError(f"{self.url} serves no model", hint="name one")
            self._model = names[0]
        return self._model

    def models(self) -> list[str]:
        """The ids of the models that the server lists."""
        return [str(model["id"]) for model in self._json("GET", "models")["data"]]

    def chat(self, messages: ConversationLike, **sampling: Any) -> Completion:
        """Answer a conversation (or one user message). Options: those of SamplingOptions."""
        answer = self._json("POST", "chat/completions", self._body(messages, sampling))
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            message = choice["message"]
            content = message.get("content") or ""
            return Completion(
                content,
                (),
                choice["finish_reason"],
                usage.get("prompt_tokens", 0),
                usage.get("completion_tokens", 0),
                (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
                content=content,
                reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
                tool_calls=tuple(_call(call) for call in message.get("tool_calls") or ()),
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise KvernError(f"{self.url} sent something else than a chat completion") from error

    def stream(self, messages: ConversationLike, **sampling: Any) -> Iterator[str]:
        """Answer a conversation piece by piece. Closing the iterator makes the server stop."""
        body = {**self._body(messages, sampling), "stream": True}
        with self._errors(), self._http.stream("POST", "chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                _raise(response)
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or not data:
                    continue
                if data == "[DONE]":
                    return
                yield from self._text(data)
        raise KvernError(f"{self.url} ended the stream before the answer was complete")

    def _text(self, data: str) -> Iterator[str]:
        event = _parse(data, self.url)
        if event.get("error"):
            raise KvernError(_message(event))
        for choice in event.get("choices") or ():
            if text := (choice.get("delta") or {}).get("content"):
                yield text

    def _body(self, messages: ConversationLike, sampling: dict[str, Any]) -> dict[str, Any]:
        chosen = SamplingOptions.of(**sampling).changes()
        for name in ("logprobs", "prompt_logprobs"):
            if name in chosen:
                raise BadRequestError(f"{name} is not supported yet by the client", param=name)
        if "logit_bias" in chosen:
            chosen["logit_bias"] = {str(token): bias for token, bias in chosen["logit_bias"]}
        return {"model": self.model, **_conversation(as_conversation(messages)), **chosen}

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._errors():
            response = self._http.request(method, path, json=body)
        if response.is_error:
            _raise(response)
        return _parse(response.text, self.url)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            hint = "is the server running? `kvern serve`"
            raise UnreachableError(f"nobody answers at {self.url}: {error}", hint=hint) from error
        except httpx.TimeoutException as error:
            raise UnreachableError(f"{self.url} did not answer in time") from error
        except httpx.HTTPError as error:
            raise UnreachableError(f"the connection to {self.url} failed: {error}") from error


def api_root(url: str) -> str:
    """The URL up to and with `/v1`. Raises BadRequestError for what is no URL."""
    if not url.startswith(("http://", "https://")):
        raise BadRequestError(f"{url!r} is no URL", hint=f"an example: {DEFAULT_URL}", param="url")
    base = url.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def _conversation(chat: Conversation) -> dict[str, Any]:
    """The fields of a body that say what is to be answered; what is left at its default is not sent."""
    chat.check()
    for name, asked in (("thinking", chat.thinking is not None), ("continues", chat.continues)):
        if asked:
            raise BadRequestError(f"{name} is not supported yet by the client", param=name)
    body: dict[str, Any] = {"messages": [message.as_template_value() for message in chat.messages]}
    if chat.tools:
        body["tools"] = [_tool(tool) for tool in chat.tools]
        choice = chat.tool_choice
        named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedTool) else None
        body["tool_choice"] = named or choice
        if not chat.parallel_tool_calls:
            body["parallel_tool_calls"] = False
    if chat.format is not None:
        body.update(_format(chat.format))
    return body


def _format(form: OutputFormat) -> dict[str, Any]:
    """OpenAI's field for JSON, vLLM's for what OpenAI's chat has none for."""
    if form.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if form.kind == "json_schema":
        schema = {"name": "answer", "schema": dict(form.definition), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    definition = list(form.definition) if form.kind == "choice" else form.definition
    return {"structured_outputs": {form.kind: definition}}


def _tool(tool: Tool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    function = {"name": tool.name, **described, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": {**function, "strict": True} if tool.strict else function}


def _call(call: dict[str, Any]) -> ToolCall:
    return ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])


def _parse(text: str, url: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise KvernError(f"{url} sent something else than JSON: {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise KvernError(f"{url} sent something else than a JSON object: {text[:200]!r}")
    return value


def _message(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message") if isinstance(error, dict) else error)


def _raise(response: httpx.Response) -> NoReturn:
    """Turn an error answer into the KvernError of its status."""
    try:
        body = json.loads(response.text)
        message = _message(body) if isinstance(body, dict) and body.get("error") else response.text[:500]
    except ValueError:
        body, message = {}, response.text[:500]
    message = f"{response.request.url.host} answered {response.status_code}: {message}"
    if response.status_code == 404:
        raise NotFoundError(message)
    if response.status_code == 429:
        raise BusyError(message, retry_after=_seconds(response.headers.get("retry-after")))
    if response.status_code < 500:
        detail = body.get("error") if isinstance(body, dict) else None
        raise BadRequestError(message, param=detail.get("param") if isinstance(detail, dict) else None)
    raise KvernError(message)


def _seconds(retry_after: str | None) -> float:
    try:
        return float(retry_after or 1)
    except ValueError:  # a date
        return 1.0
