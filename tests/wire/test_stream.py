from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from kvern.errors import KvernError
from kvern.wire.openai import Usage
from kvern.wire.stream import ChatStream, error_event


def read(events: bytes) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in events.decode().split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.parametrize("include_usage", [True, False])
def test_the_shape_of_a_stream(include_usage: bool) -> None:
    stream = ChatStream("chatcmpl-1", 5, "m", "fp", include_usage)
    events = read(stream.start() + stream.text("é\n\n") + stream.finish("stop", Usage.of(3, 4)))
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
            "prompt_tokens_details": {"cached_tokens": 0},
        }
    assert [chunk["choices"][0]["delta"] for chunk in events] == [
        {"role": "assistant", "content": ""},
        {"content": "é\n\n"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in events] == [None, None, "stop"]


def test_an_error_event_holds_the_envelope() -> None:
    assert read(error_event(KvernError("broken")))[0]["error"]["message"] == "broken"
