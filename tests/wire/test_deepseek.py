"""DeepSeek's stream, beside the one that deepseek-recipe makes of the same answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import deepseek_recipe
import pytest

from kvern.text.events import Content, Event, Piece, Reasoning
from kvern.wire.answers import Usage
from kvern.wire.deepseek import DeepSeekStream
from kvern.wire.stream import Head

HEAD = Head("id", 1, "deepseek-chat", "fp")


def theirs(texts: Sequence[str], thinking: bool, include_usage: bool) -> list[Any]:
    body: dict[str, Any] = {
        "model": "DeepSeek-V4.1-Flash",
        "messages": [{"role": "user", "content": "x"}],
        "stream": True,
    }
    options = {"include_usage": include_usage}
    switch = {"type": "enabled" if thinking else "disabled"}
    request = deepseek_recipe.ChatCompletionRequest({**body, "stream_options": options, "thinking": switch})
    converted = request.convert(deepseek_recipe.ConversionOptions())
    stage = deepseek_recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    processor = deepseek_recipe.StreamProcessor(
        deepseek_recipe.ChatCompletionRequest.chunk_generator(converted, "id", "deepseek-chat"),
        deepseek_recipe.ParsingOptions(thinking_initial_stage=stage),
    )
    usage = deepseek_recipe.PromptUsage(prompt_tokens=10, prompt_cache_hit_tokens=4)
    chunks = processor.push(deepseek_recipe.InferenceChunk.ready(prompt_usage=usage, system_fingerprint="fp"))
    for text in texts:
        chunks += processor.push(deepseek_recipe.InferenceChunk.text(text, 1))
    chunks += processor.push(deepseek_recipe.InferenceChunk.finish(deepseek_recipe.InferenceFinishReason.Stop))
    chunks += processor.finish()
    shown = [json.loads(one.to_json()) for one in chunks if isinstance(one, deepseek_recipe.ChatCompletionChunk)]
    return [{**one, "created": 1} for one in shown]


def ours(events: Sequence[Event], thinking: bool, include_usage: bool, usage: Usage) -> list[Any]:
    stream = DeepSeekStream(HEAD, include_usage, False, thinking)
    data = stream.start(0) + b"".join(stream.piece(0, Piece("", (1,), events=(one,))) for one in events)
    data += stream.piece(0, Piece("", finish_reason="stop")) + stream.finish(usage)
    *blocks, done = data.decode().split("\n\n")[:-1]
    assert done == "data: [DONE]"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks]
    for chunk in chunks:  # the other name of reasoning_content, which Kvern sends as well
        chunk["choices"][0]["delta"].pop("reasoning", None)
    assert chunks[-1]["usage"].pop("completion_tokens_details") == {"reasoning_tokens": int(thinking)}  # not in theirs
    return chunks


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("thinking", [True, False])
def test_the_stream(thinking: bool, include_usage: bool) -> None:
    texts = ["hm", "</think>so", " on"] if thinking else ["so", " on"]
    events: list[Event] = [*([Reasoning("hm")] if thinking else []), Content("so"), Content(" on")]
    usage = Usage.of(10, len(events), 4, 1 if thinking else 0)
    assert ours(events, thinking, include_usage, usage) == theirs(texts, thinking, include_usage)


def test_several_choices() -> None:
    stream = DeepSeekStream(HEAD, False, False, False)
    for index in (1, 0):
        assert b'finish_reason":"' not in stream.piece(index, Piece("", (1,), "stop", events=(Content("x"),)))
    first, last = (json.loads(one[6:]) for one in stream.finish(Usage.of(1, 2, 0)).decode().split("\n\n")[:2])
    assert (first["choices"][0]["index"], last["choices"][0]["index"]) == (0, 1)
    assert "usage" not in first
    assert last["usage"]["completion_tokens"] == 2
