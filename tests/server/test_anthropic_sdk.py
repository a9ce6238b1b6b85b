"""The SDK of Anthropic, with strict validation of every answer, against a real server and a tiny, random model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from tests.scripted import ScriptedEngine
from tests.server.serving import Serving, serving, wait_until
from tests.tiny import CONTEXT

from kvern.engine import EngineSettings
from kvern.llm import LLM
from kvern.text.conversation import Conversation
from kvern.text.messages import Message
from kvern.text.options import SamplingOptions
from kvern.text.tokenizer import Tokenizer

HI: list[Any] = [{"role": "user", "content": "hi"}]
JSON = {"Content-Type": "application/json"}
EVERYTHING = SamplingOptions()
ASK: dict[str, Any] = {"model": "claude-local", "max_tokens": 9, "messages": HI, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> LLM:
    """The same model offline, with an engine of its own: the served one belongs to the server's thread."""
    return LLM(tiny_folder, dtype="f32", threads=1)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Serving]:
    settings = EngineSettings(step_tokens=64, max_running=16, check_every_step=True)
    with serving(lambda: LLM(tiny_folder, dtype="f32", threads=1, settings=settings)) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(server: Serving) -> Iterator[anthropic.Anthropic]:
    with client(server.url) as made:
        yield made


def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True)


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_whole_answer(sdk: anthropic.Anthropic, expected: LLM) -> None:
    long: list[Any] = [{"role": "user", "content": "the cat sat on the mat " * 6}]
    there = expected.chat(long, max_tokens=9, temperature=0)
    for cached in (0, there.prompt_tokens // 16 * 16):
        answer = sdk.messages.create(**{**ASK, "messages": long})
        assert text_of(answer) == there.text
        assert (answer.role, answer.model, answer.stop_reason) == ("assistant", "claude-local", "max_tokens")
        assert answer.usage.cache_read_input_tokens == cached
        assert answer.usage.input_tokens == there.prompt_tokens - cached
        assert answer.usage.output_tokens == 9


def test_a_stream(sdk: anthropic.Anthropic, expected: LLM) -> None:
    with sdk.messages.stream(**ASK) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    whole = sdk.messages.create(**ASK)
    assert text_of(message) == text_of(whole) == expected.chat("hi", max_tokens=9, temperature=0).text
    assert (message.stop_reason, message.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert (kinds[0], kinds[1], kinds[-1]) == ("message_start", "content_block_start", "message_stop")


def test_system_turns_and_a_beginning(sdk: anthropic.Anthropic, expected: LLM) -> None:
    answer = sdk.messages.create(
        **{**ASK, "messages": [*HI, {"role": "assistant", "content": "def add("}]},
        system=[{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "kind"}],
    )
    turns = (Message("system", "kind"), Message("user", "hi"), Message("assistant", "def add("))
    there = expected.chat(Conversation(turns, continues=True), max_tokens=9, temperature=0)
    assert text_of(answer) == there.text
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == there.prompt_tokens


def test_the_billing_header_does_not_spoil_the_prefix_cache(sdk: anthropic.Anthropic) -> None:
    read = []
    for number in range(2):
        header: Any = {"type": "text", "text": f"x-anthropic-billing-header: cch={number}"}
        answer = sdk.messages.create(**ASK, system=[header, {"type": "text", "text": "be kind " * 9}])
        read.append(answer.usage.cache_read_input_tokens or 0)
    assert read[0] == 0
    assert read[1] >= 16


def test_what_claude_code_sends(sdk: anthropic.Anthropic) -> None:
    """Its query, headers, and the keys that Kvern takes as wishes."""
    answer = sdk.beta.messages.create(
        **{**ASK, "max_tokens": 32000, "stop_sequences": ["zzzzz"]},
        betas=["claude-code-20250219", "context-management-2025-06-27"],
        metadata={"user_id": "user_1"},
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "medium"},
        extra_headers={"x-app": "cli"},
        cache_control={"type": "ephemeral"},
        timeout=60,
    )
    assert answer.context_management is not None
    assert answer.context_management.applied_edits == []
    if answer.stop_reason == "model_context_window_exceeded":
        used = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) + answer.usage.output_tokens
        assert used == CONTEXT


def test_counts(sdk: anthropic.Anthropic, expected: LLM) -> None:
    counted = sdk.messages.count_tokens(model="claude-x", messages=HI, system="kind").input_tokens
    chat = [{"role": "system", "content": "kind"}, *HI]
    assert counted == len(expected.prepare_chat(chat, EVERYTHING).prompt)
    long: list[Any] = [{"role": "user", "content": "x " * 500}]
    assert sdk.messages.count_tokens(model="claude-x", messages=long).input_tokens > CONTEXT


def test_errors_arrive_typed(sdk: anthropic.Anthropic, server: Serving) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 255 maximum"):
        sdk.messages.create(**{**ASK, "messages": [{"role": "user", "content": "x " * 500}]})
    with pytest.raises(anthropic.NotFoundError, match="served here: tiny-v3") as missing:
        sdk.messages.create(**{**ASK, "model": "gpt-4"})
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError, match="unknown field 'seed'"):
        sdk.messages.create(**{**ASK, "extra_body": {"seed": 1}})
    with pytest.raises(anthropic.RequestTooLargeError, match="larger than 4096 bytes"):
        sdk.messages.create(**{**ASK, "messages": [{"role": "user", "content": "x" * 5000}]})


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_refusals_that_no_route_made(server: Serving, path: str) -> None:
    for response, status, kind in (
        (httpx.post(f"{server.url}{path}", content=b"{", headers=JSON), 400, "invalid_request_error"),
        (httpx.post(f"{server.url}{path}", content=b"{}"), 415, "invalid_request_error"),
        (httpx.get(f"{server.url}{path}"), 405, "invalid_request_error"),
        (httpx.post(f"{server.url}{path}/batches", json={}), 404, "not_found_error"),
    ):
        assert response.status_code == status
        assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind)


def test_busy_stopping_and_failing(tiny_folder: Path) -> None:
    engine = ScriptedEngine(pause=0.005, max_waiting=1)
    with (
        serving(lambda: LLM(tiny_folder, engine=engine), settings={"max_waiting": 1}) as running,
        client(running.url) as sdk,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(lambda: list(sdk.messages.create(**{**ASK, "max_tokens": 900}, stream=True)))
        wait_until(lambda: len(engine.live()) == 1)
        with pytest.raises(anthropic.RateLimitError) as busy:
            sdk.messages.create(**ASK)
        assert busy.value.response.headers["retry-after"] == "1"
        engine.fails = True
        with pytest.raises(anthropic.APIStatusError, match="api_error"):
            first.result()
        with pytest.raises(anthropic.APIStatusError) as down:
            sdk.messages.create(**ASK)
        assert (down.value.status_code, down.value.type) == (503, "overloaded_error")
        assert int(down.value.response.headers["retry-after"]) >= 1
        engine.fails = False


TOOL: Any = {"name": "get", "description": "Get it.", "input_schema": {"type": "object"}}
CALL = 'so:\n<tool_call>\n{"name": "get", "arguments": {"a": "b c"}}\n</tool_call>'


def script(folder: Path, text: str) -> ScriptedEngine:
    """An engine that writes a text and ends."""
    tokenizer = Tokenizer.load(folder)
    return ScriptedEngine(script=[*tokenizer.encode(text), tokenizer.control["<|end|>"]])


@pytest.mark.parametrize("choice", ["auto", "any"])
def test_a_call_and_its_result(tiny_folder: Path, choice: str) -> None:
    engine = script(tiny_folder, CALL if choice == "auto" else '{"a": "b c"}}\n</tool_call>')
    with serving(lambda: LLM(tiny_folder, engine=engine)) as running, client(running.url) as sdk:
        options: dict[str, Any] = {**ASK, "max_tokens": 99, "tools": [TOOL], "tool_choice": {"type": choice}}
        whole: Any = sdk.messages.create(**options)
        with sdk.messages.stream(**options) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
        answer: Any
        for answer in (whole, streamed):
            call: Any = answer.content[-1]
            assert call.type == "tool_use"
            assert (call.name, call.input, answer.stop_reason) == ("get", {"a": "b c"}, "tool_use")
            assert text_of(answer).strip() == ("so:" if choice == "auto" else "")
        assert kinds.count("input_json") > 1
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "42"}
        turns = [*HI, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        assert sdk.messages.create(**{**ASK, "messages": turns, "tools": [TOOL]}).type == "message"


def test_a_stop_sequence(tiny_folder: Path) -> None:
    engine = ScriptedEngine(script=[64, 65, 66])
    with serving(lambda: LLM(tiny_folder, engine=engine)) as running, client(running.url) as sdk:
        options: dict[str, Any] = {**ASK, "stop_sequences": ["zz", "bc"]}
        whole = sdk.messages.create(**options)
        with sdk.messages.stream(**options) as stream:
            streamed = stream.get_final_message()
        for answer in (whole, streamed):
            assert (text_of(answer), answer.stop_reason, answer.stop_sequence) == ("a", "stop_sequence", "bc")


def test_models(sdk: anthropic.Anthropic) -> None:
    (model,) = sdk.models.list().data
    assert (model.id, model.max_input_tokens) == ("tiny-v3", CONTEXT)
    assert sdk.models.retrieve("claude-local").id == "tiny-v3"
