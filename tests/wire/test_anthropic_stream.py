"""Anthropic's events, beside those that deepseek-recipe makes of the same answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import deepseek_recipe
import pytest

from kvern.errors import BusyError, ContextLengthError, KvernError
from kvern.text.events import CallArguments, CallEnd, CallStart, Content, Event, Piece, Reasoning
from kvern.text.messages import Completion, FinishReason, ToolCall
from kvern.wire.answers import Usage
from kvern.wire.anthropic_answers import anthropic_error_body, arguments, message_of
from kvern.wire.anthropic_stream import PING, MessageStream

CALL = '\n\n<｜DSML｜ calls>\n<｜DSML｜ invoke name="get">\n<｜DSML｜ parameter name="a" string="true">b c</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n</｜DSML｜ calls>'  # noqa: E501, RUF001
USAGE = Usage.of(10, 0, 4)


def pieces(events: Sequence[Event], reason: FinishReason = "stop", stopped_by: str | None = None) -> list[Piece]:
    """One token an event, then the end."""
    return [
        *(Piece("", (1,), cached_tokens=4 if index == 0 else 0, events=(one,)) for index, one in enumerate(events)),
        Piece("", finish_reason=reason, stopped_by=stopped_by),
    ]


def stream(given: Sequence[Piece], **options: Any) -> list[tuple[str, dict[str, Any]]]:
    builder = MessageStream(id="msg_1", model="m", prompt_tokens=10, **options)
    data = builder.start(0) + b"".join(builder.piece(0, piece) for piece in given) + builder.finish(USAGE)
    return read(data)


def read(data: bytes) -> list[tuple[str, dict[str, Any]]]:
    events = []
    for block in data.decode().split("\n\n")[:-1]:
        name, text = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(text.removeprefix("data: "))))
    assert all(name == value["type"] for name, value in events)
    return events


def theirs(texts: Sequence[str], *, thinking: bool = False, length: bool = False) -> list[tuple[str, dict[str, Any]]]:
    reasons, stage = deepseek_recipe.InferenceFinishReason, deepseek_recipe.ThinkingInitialStage.ReasoningStart
    processor = deepseek_recipe.StreamProcessor(
        deepseek_recipe.MessagesChunkGenerator("msg_1", "m", thinking),
        deepseek_recipe.ParsingOptions(thinking_initial_stage=stage if thinking else None),
    )
    usage = deepseek_recipe.PromptUsage(prompt_tokens=10, prompt_cache_hit_tokens=4)
    events = processor.push(deepseek_recipe.InferenceChunk.ready(prompt_usage=usage))
    for text in texts:
        events += processor.push(deepseek_recipe.InferenceChunk.text(text, 1))
    events += processor.push(deepseek_recipe.InferenceChunk.finish(reasons.Length if length else reasons.Stop))
    events += processor.finish()
    name = deepseek_recipe.MessagesResponse.sse_event_name
    return [
        (name(one) or "", json.loads(one.to_json()))
        for one in events
        if isinstance(one, deepseek_recipe.MessagesStreamEvent)
    ]


def test_text() -> None:
    assert stream(pieces([Content("Hel"), Content("lo")])) == theirs(["Hel", "lo"])


def test_text_that_was_cut() -> None:
    ours = stream(pieces([Content("Hel"), Content("lo")], "length"))
    assert ours == theirs(["Hel", "lo"], length=True)
    assert ours[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}


def test_thinking() -> None:
    given = pieces([Reasoning("thi"), Reasoning("nk"), Content("o"), Content("k")])
    expected = theirs(["thi", "nk", "</think>o", "k"], thinking=True)
    assert stream(given) == expected


def test_a_call() -> None:
    """Arguments may come in other parts than theirs, and ids differ."""
    given = pieces(
        [Content("hi "), CallStart(0, "id", "get"), CallArguments(0, '{"a": '), CallArguments(0, '"b c"}'), CallEnd(0)],
        "tool_calls",
    )
    assert shape(stream(given)) == shape(theirs(["hi ", CALL]))


def shape(events: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """The events with the arguments joined, and without ids and counts of output."""
    seen: list[Any] = []
    for name, value in events:
        delta = value.get("delta", {})
        if name == "content_block_delta" and seen[-1][:2] == ["arguments", value["index"]] and "partial_json" in delta:
            seen[-1][2] += delta["partial_json"]
        elif "partial_json" in delta:
            seen.append(["arguments", value["index"], delta["partial_json"]])
        else:
            value.get("content_block", {}).pop("id", None)
            value.get("usage", {}).pop("output_tokens", None)
            seen.append([name, value])
    return seen


def test_several_calls_and_text_between() -> None:
    events = stream(
        pieces(
            [
                *(CallStart(0, "a", "f"), CallArguments(0, "{}"), CallEnd(0)),
                *(CallStart(1, "b", "g"), CallArguments(1, ""), CallEnd(1)),
                Content("done"),
            ],
            "tool_calls",
        )
    )
    blocks = [value["content_block"] for name, value in events if name == "content_block_start"]
    assert [(one["type"], one.get("id")) for one in blocks] == [("tool_use", "a"), ("tool_use", "b"), ("text", None)]
    indexes = [value["index"] for name, value in events if name.startswith("content_block")]
    assert indexes == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("reason", "stopped_by", "room", "why"),
    [
        ("stop", None, None, "end_turn"),
        ("stop", "END", None, "stop_sequence"),
        ("length", None, None, "max_tokens"),
        ("length", None, 1, "model_context_window_exceeded"),
        ("tool_calls", None, None, "tool_use"),
    ],
)
def test_stop_reasons(reason: FinishReason, stopped_by: str | None, room: int | None, why: str) -> None:
    name, value = stream(pieces([Content("x")], reason, stopped_by), room=room)[-2]
    assert (name, value["delta"]) == ("message_delta", {"stop_reason": why, "stop_sequence": stopped_by})
    answer = Completion("x", (1,), reason, 10, 1, content="x", stopped_by=stopped_by)
    message = message_of(answer, id="i", model="m", room=room, omit_thinking=False)
    assert (message.stop_reason, message.stop_sequence) == (why, stopped_by)


def test_an_answer_without_anything() -> None:
    assert [name for name, _ in stream(pieces([]))] == ["message_start", "message_delta", "message_stop"]


def test_thinking_is_left_out_where_that_was_asked_for() -> None:
    events = stream(pieces([Reasoning("secret"), Content("x")]), omit_thinking=True, edited=True)
    assert "secret" not in str(events)
    assert [value["delta"]["type"] for name, value in events if name == "content_block_delta"] == [
        "signature_delta",
        "text_delta",
    ]
    assert events[-2][1]["context_management"] == {"applied_edits": []}


def test_waiting_and_failing() -> None:
    builder = MessageStream(id="msg_1", model="m", prompt_tokens=10)
    assert builder.keep_alive().startswith(b": ")
    builder.piece(0, Piece("", (1,), events=(Content("x"),)))
    assert builder.keep_alive() == PING
    assert read(builder.error(KvernError("it broke"))) == [
        ("error", {"type": "error", "error": {"type": "api_error", "message": "it broke"}})
    ]


def test_a_whole_message() -> None:
    calls = (ToolCall("a", "f", '{"x": 1}'), ToolCall("b", "g", ""))
    answer = Completion("", (1,) * 7, "tool_calls", 10, 7, 4, content="hi", reasoning="hm", tool_calls=calls)
    message = message_of(answer, id="msg_1", model="m", room=None, omit_thinking=False).model_dump()
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "msg_1"},
        {"type": "text", "text": "hi"},
        {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "b", "name": "g", "input": {}},
    ]
    assert message["usage"]["input_tokens"] == 6
    omitted = message_of(replace(answer, tool_calls=()), id="msg_1", model="m", room=None, omit_thinking=True)
    assert omitted.model_dump()["content"][0]["thinking"] == ""


def test_arguments_that_were_cut_are_kept_as_text() -> None:
    assert arguments('{"a": 1') == {"arguments": '{"a": 1'}
    assert arguments("[1]") == {"arguments": "[1]"}


def test_errors() -> None:
    busy = anthropic_error_body(BusyError("full", retry_after=1), "req-1").model_dump()
    assert busy == {"type": "error", "error": {"type": "rate_limit_error", "message": "full"}, "request_id": "req-1"}
    long = ContextLengthError("long", tokens=5, limit=4, hint=None, param="messages")
    assert anthropic_error_body(long).error.message == "prompt is too long: 5 tokens > 4 maximum"
