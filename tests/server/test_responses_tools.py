"""Tools and reasoning of /v1/responses through the official SDK, with a model that writes what the test says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall
from tests.server import test_tools
from tests.server.test_tools import CALL, SECOND, Writing
from tests.wire.test_responses import CODEX
from tests.wire.test_responses_stream import read_back

model, thinker = test_tools.model, test_tools.thinker
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK: dict[str, Any] = {"type": "function", "name": "clock"}
TOOLS: Any = [WEATHER, {"type": "web_search"}, CLOCK]
ASK = "What's the weather like in Rome?"


def ask(served: Writing, writes: str, given: Any = ASK, **fields: Any) -> Response:
    served.write(writes)
    answer = served.sdk.responses.create(model="tiny-v3", input=given, **{"tools": TOOLS, **fields})
    assert isinstance(answer, Response)
    return answer


def stream(served: Writing, writes: str, given: Any = ASK, **fields: Any) -> list[dict[str, Any]]:
    served.write(writes)
    answer = served.sdk.responses.create(model="tiny-v3", input=given, stream=True, **{"tools": TOOLS, **fields})
    return [event.to_dict() for event in answer]


def calls(items: Sequence[Any]) -> list[tuple[str, str]]:
    return [(item.name, item.arguments) for item in items if isinstance(item, ResponseFunctionToolCall)]


def test_calls_of_a_whole_response(model: Writing) -> None:
    answer = ask(model, f"I look.\n\n{CALL}\n{SECOND}")
    assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
    assert (answer.output_text, answer.status) == ("I look.", "completed")
    assert calls(answer.output) == [("get_weather", '{"city": "Rome"}'), ("clock", "{}")]
    assert [tool.to_dict()["name"] for tool in answer.tools] == ["get_weather", "clock"], "the search is left out"


def test_calls_of_a_stream(model: Writing) -> None:
    events = stream(model, f"{CALL}\n{SECOND}")
    first, second = read_back(events)
    assert [(item["name"], item["arguments"], item["status"]) for item in (first, second)] == [
        ("get_weather", '{"city": "Rome"}', "completed"),
        ("clock", "{}", "completed"),
    ]
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert len([event for event in deltas if event["item_id"] == first["id"]]) > 6, "arguments stream"
    assert first["call_id"] != second["call_id"]


@pytest.mark.parametrize("by_id", [True, False])
def test_there_and_back(model: Writing, by_id: bool) -> None:
    """The prompt of the second turn is the same, whether the server remembers the first or the client sends it."""
    asked = ask(model, CALL)
    (call,) = (item for item in asked.output if isinstance(item, ResponseFunctionToolCall))
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 31}'}
    if by_id:
        answer = ask(model, "31 degrees.", [output], previous_response_id=asked.id)
    else:
        history = [{"role": "user", "content": ASK}, *(item.to_dict() for item in asked.output)]
        answer = ask(model, "31 degrees.", [*history, output])
    assert answer.output_text == "31 degrees."
    assert answer.usage is not None
    assert answer.usage.input_tokens == ask(model, "x", [*HISTORY, RESULT]).usage.input_tokens  # type: ignore[union-attr]


HISTORY: list[Any] = [
    {"role": "user", "content": ASK},
    {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": '{"city": "Rome"}'},
]
RESULT: Any = {"type": "function_call_output", "call_id": "c", "output": '{"degrees": 31}'}


def test_the_choice_of_tools(model: Writing) -> None:
    assert calls(ask(model, CALL, tool_choice="none").output) == []
    assert ask(model, CALL, tool_choice="none").output_text == CALL
    only: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "clock"}]}
    assert calls(ask(model, CALL, tool_choice=only).output) == []
    assert calls(ask(model, SECOND, tool_choice=only).output) == [("clock", "{}")]
    assert ask(model, SECOND, tool_choice=only).to_dict()["tool_choice"] == only
    assert calls(ask(model, f"{CALL}\n{SECOND}", parallel_tool_calls=False).output) == [
        ("get_weather", '{"city": "Rome"}')
    ]
    named = ask(model, '{"city": "Rome"}}\n</tool_call>', tool_choice={"type": "function", "name": "get_weather"})
    assert [name for name, _ in calls(named.output)] == ["get_weather"]


def test_a_call_that_is_cut_is_incomplete(model: Writing) -> None:
    events = stream(model, CALL, max_output_tokens=55)
    (call,) = read_back(events)
    assert (call["type"], events[-1]["type"]) == ("function_call", "response.incomplete")
    assert call["arguments"] in '{"city": "Rome"}'


@pytest.mark.parametrize("summary", [False, True])
def test_reasoning(thinker: Writing, summary: bool) -> None:
    written = "Rome is warm.</think>It is warm."
    asked: Any = {"effort": "high", "summary": "auto" if summary else None}
    sealed: Any = ["reasoning.encrypted_content"]
    events = stream(thinker, written, reasoning=asked, include=sealed)
    thought, said = read_back(events)
    assert said["content"][0]["text"] == "It is warm."
    parts = thought["summary"] if summary else thought["content"]
    assert [part["text"] for part in parts] == ["Rome is warm."]
    assert bool(thought["encrypted_content"])
    usage = events[-1]["response"]["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    whole = ask(thinker, written, reasoning=asked)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output_text == "It is warm."


@pytest.mark.parametrize("stream", [False, True])
def test_open_responses_with_tools(model: Writing, stream: bool) -> None:
    """The cases tool-calling and tool-calling-streaming of its compliance suite."""
    model.write(CALL)
    message = {"type": "message", "role": "user", "content": "What's the weather like in San Francisco?"}
    body = {"model": "tiny-v3", "input": [message], "tools": [WEATHER], "stream": stream}
    answer = httpx.post(f"{model.url}/v1/responses", json=body)
    if not stream:
        assert [item["type"] for item in answer.json()["output"]] == ["function_call"]
        return
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    read_back(events)
    kinds = {event["type"] for event in events}
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds
    for kind in ("response.output_item.added", "response.output_item.done"):
        assert [event["item"]["type"] for event in events if event["type"] == kind] == ["function_call"]


def test_what_codex_sends_is_answered_with_a_call(model: Writing) -> None:
    shell = '<tool_call>\n{"name": "shell", "arguments": {"command": ["ls"]}}\n</tool_call>'
    model.write(shell)
    answer = httpx.post(f"{model.url}/v1/responses", json={**CODEX, "model": "tiny-v3"})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    (call,) = read_back(events)
    assert (call["name"], json.loads(call["arguments"])) == ("shell", {"command": ["ls"]})
    assert events[-1]["type"] == "response.completed"
