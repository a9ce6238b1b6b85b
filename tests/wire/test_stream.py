from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from kvern.errors import KvernError
from kvern.text.events import CallArguments, CallEnd, CallStart, Content, Piece, Reasoning
from kvern.text.messages import FinishReason, ScoredToken
from kvern.wire.answers import Usage
from kvern.wire.stream import ChatStream, CompletionStream, Head, error_event

HEAD = Head("id-1", 5, "m", "fp")


def piece(
    text: str,
    scores: tuple[ScoredToken, ...] = (),
    reason: FinishReason | None = None,
    prompt: tuple[ScoredToken, ...] = (),
) -> Piece:
    return Piece(text, (), reason, scores, 0, prompt, (Content(text),) if text else ())


def read(events: bytes) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in events.decode().split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize("include_usage", [True, False])
def test_the_shape_of_a_stream(include_usage: bool) -> None:
    stream = ChatStream(HEAD, include_usage, logprobs=False)
    events = read(
        stream.start(0)
        + stream.piece(0, piece(""))
        + stream.piece(0, piece("é\n\n", (), "stop"))
        + stream.finish(Usage.of(3, 4, 2))
    )
    assert events.pop() == "[DONE]"
    for chunk in events:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert ("usage" in chunk) is include_usage
    if include_usage:
        last = events.pop()
        assert last["choices"] == []
        assert last["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "prompt_cache_hit_tokens": 2,
            "prompt_cache_miss_tokens": 1,
        }
    assert [chunk["choices"][0]["delta"] for chunk in events] == [
        {"role": "assistant", "content": ""},
        {"content": "é\n\n"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in events] == [None, None, "stop"]


def deltas(events: bytes) -> list[Any]:
    chunks = read(events)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    return [chunk["choices"][0]["delta"] for chunk in chunks]


def test_calls_have_openais_shape() -> None:
    events = (
        *(Content("x"), CallStart(0, "id0", "f"), CallArguments(0, '{"a"'), CallArguments(0, ":1}"), CallEnd(0)),
        *(CallStart(1, "id1", "g"), CallEnd(1)),
    )
    stream = ChatStream(HEAD, False, logprobs=False)
    assert deltas(stream.start(0) + stream.piece(0, Piece("", (), "tool_calls", events=events))) == [
        {"role": "assistant", "content": ""},
        {"content": "x"},
        {"tool_calls": [{"index": 0, "id": "id0", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
        {"tool_calls": [{"index": 1, "id": "id1", "type": "function", "function": {"name": "g", "arguments": ""}}]},
        {},
    ]


def test_reasoning_has_deepseeks_shape_and_both_names() -> None:
    stream = ChatStream(HEAD, False, logprobs=False, thinks=True)
    assert deltas(stream.start(0) + stream.piece(0, Piece("", events=(Reasoning("hm"), Content("4"))))) == [
        {"role": "assistant", "content": None, "reasoning_content": ""},
        {"content": None, "reasoning_content": "hm", "reasoning": "hm"},
        {"content": "4", "reasoning_content": None},
    ]


def test_scores_travel_with_their_text() -> None:
    scores = (ScoredToken("a", b"a", -1.0, (), 0),)
    events = read(ChatStream(HEAD, False, logprobs=True).piece(1, piece("a", scores, "length")))
    assert [chunk["choices"][0]["index"] for chunk in events] == [1, 1]
    assert events[0]["choices"][0]["logprobs"]["content"][0]["token"] == "a"
    ChatCompletionChunk.model_validate(events[0], strict=True)
    silent = read(ChatStream(HEAD, False, logprobs=True).piece(0, Piece("a", (1,), None, scores)))
    assert silent[0]["choices"][0]["delta"] == {"content": ""}
    assert silent[0]["choices"][0]["logprobs"]["content"][0]["token"] == "a"


def test_an_echo_comes_first() -> None:
    plain = CompletionStream(HEAD, False, logprobs=False, prompts=("pq",))
    assert [chunk["choices"][0]["text"] for chunk in read(plain.start(0) + plain.piece(0, piece("a")))] == [
        "pq",
        "a",
    ]
    scored = CompletionStream(HEAD, False, logprobs=True, prompts=("pq",))
    prompt, answer = (ScoredToken("pq", b"pq", None, (), 0),), (ScoredToken("a", b"a", -1.0, (), 0),)
    first, second = read(scored.start(0) + scored.piece(0, piece("a", answer, "stop", prompt)))
    assert (first["choices"][0]["text"], first["choices"][0]["finish_reason"]) == ("pq", None)
    assert second["choices"][0]["logprobs"]["text_offset"] == [2]
    assert second["choices"][0]["finish_reason"] == "stop"


def test_an_error_event_holds_the_envelope() -> None:
    assert read(error_event(KvernError("broken")))[0]["error"]["message"] == "broken"
