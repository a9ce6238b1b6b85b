"""The events of /v1/responses, beside those that deepseek-recipe makes of the same answer.

Field by field, but for ids, times and these, where the two differ for a reason (`settled` puts them aside, and each is
checked to be as said here):

    phase               of a message: theirs changes between `added` and `done` of one item; OpenAI's is optional
    encrypted_content   of reasoning: theirs is a name made of the id; ours is null until the request asks for it
    content_filters, moderation     of a response: always null in theirs; no filter runs here
    completed_at        of an incomplete response: OpenAI says that it is for completed ones
    cache_write_tokens  of the usage: OpenAI's SDK refuses a usage without it
    reasoning_tokens    of the usage: theirs counts none where the engine hands over text; ours counts tokens
    name                of function_call_arguments.done: OpenAI's SDK refuses one without it
    store               of a response: theirs is never stored
    verbosity, description, strict  of text and tools: where they were not given, theirs says null and ours omits them
                        or says the default
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import deepseek_recipe
import pytest
from tests.wire.test_responses_stream import builder

from kvern.text.events import CallArguments, CallEnd, CallStart, Content, Event, Piece, Reasoning
from kvern.wire.answers import Usage
from kvern.wire.responses_stream import encode

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get",
    "description": "Looks up.",
    "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    "strict": False,
}
CALL = '\n\n<｜DSML｜ calls>\n<｜DSML｜ invoke name="get">\n<｜DSML｜ parameter name="a" string="true">b c</｜DSML｜ parameter>\n</｜DSML｜ invoke>\n</｜DSML｜ calls>'  # noqa: E501, RUF001
CALLED: list[Event] = [CallStart(0, "id", "get"), CallArguments(0, '{"a": '), CallArguments(0, '"b c"}'), CallEnd(0)]
THOUGHT: list[Event] = [Reasoning("thi"), Reasoning("nk")]
ANSWERS: dict[str, tuple[list[Event], list[str]]] = {
    "text": ([Content("Hel"), Content("lo")], ["Hel", "lo"]),
    "reasoning": ([*THOUGHT, Content("o"), Content("k")], ["thi", "nk", "</think>o", "k"]),
    "call": (CALLED, [CALL]),
    "text and call": ([Content("hi"), *CALLED], ["hi", CALL]),
    "all three": ([*THOUGHT, Content("hi"), *CALLED], ["thi", "nk", "</think>hi", CALL]),
    "reasoning alone": (THOUGHT, ["thi", "nk"]),
}


def theirs(texts: Sequence[str], asked: dict[str, Any], length: bool) -> list[dict[str, Any]]:
    request = deepseek_recipe.ResponsesRequest({"model": "DeepSeek-V4.1-Flash", "input": "x", "stream": True, **asked})
    echo = request.echo()
    converted = request.convert(deepseek_recipe.ConversionOptions())
    generator = deepseek_recipe.ResponsesRequest.chunk_generator(converted, "resp_" + "0" * 24, "tiny-v3")
    stage = deepseek_recipe.ThinkingInitialStage.ReasoningStart if "reasoning" in asked else None
    processor = deepseek_recipe.StreamProcessor(
        generator.with_echo(echo), deepseek_recipe.ParsingOptions(thinking_initial_stage=stage)
    )
    usage = deepseek_recipe.PromptUsage(prompt_tokens=10, prompt_cache_hit_tokens=4)
    events = processor.push(deepseek_recipe.InferenceChunk.ready(prompt_usage=usage))
    for text in texts:
        events += processor.push(deepseek_recipe.InferenceChunk.text(text, 1))
    reasons = deepseek_recipe.InferenceFinishReason
    events += processor.push(deepseek_recipe.InferenceChunk.finish(reasons.Length if length else reasons.Stop))
    events += processor.finish()
    assert deepseek_recipe.ResponsesResponse.sse_done_data() is None
    named = [one for one in events if isinstance(one, deepseek_recipe.ResponsesStreamEvent)]
    read = [json.loads(one.to_json()) for one in named]
    assert [deepseek_recipe.ResponsesResponse.sse_event_name(one) for one in named] == [one["type"] for one in read]
    return read


def ours(parts: Sequence[Event], asked: dict[str, Any], length: bool) -> list[dict[str, Any]]:
    made = builder(**asked, model="tiny-v3", input="x")
    events = made.start()
    for part in parts:
        events += made.piece(Piece("", (1,), events=(part,)))
    thought = sum(isinstance(part, Reasoning) for part in parts)
    events += made.finish("length" if length else "stop", Usage.of(10, len(parts), 4, thought))
    blocks = encode(events).decode().split("\n\n")[:-1]
    return [json.loads(block.split("\n")[1].removeprefix("data: ")) for block in blocks]


def settled(events: Sequence[dict[str, Any]], *, mine: bool) -> list[Any]:
    """The events, arguments joined and counted anew, without what differs for a reason."""
    seen: list[dict[str, Any]] = []
    for event in events:
        last = seen[-1] if seen else {"type": ""}
        if event["type"] == last["type"] == "response.function_call_arguments.delta":
            last["delta"] += event["delta"]
            continue
        seen.append({**event, "sequence_number": len(seen)})
    ids: dict[str, str] = {}
    for event in seen:
        for item in (*([event["item"]] if "item" in event else []), *event.get("response", {}).get("output", [])):
            item["id"] = ids.setdefault(item["id"], f"item {len(ids)}")
            _settle_item(item, mine=mine)
        if "item_id" in event:
            event["item_id"] = ids[event["item_id"]]
        if "response" in event:
            _settle_response(event["response"], mine=mine)
        if event["type"] == "response.function_call_arguments.done":
            assert event.pop("name", None) == ("get" if mine else None)
    return seen


def _settle_item(item: dict[str, Any], *, mine: bool) -> None:
    item.pop("call_id", None)
    if item["type"] == "message":
        assert ("phase" in item) is not mine
        item.pop("phase", None)
    if item["type"] == "reasoning":
        assert (item.pop("encrypted_content") is None) is mine


def _settle_response(response: dict[str, Any], *, mine: bool) -> None:
    assert response.pop("created_at") > 0
    assert (response.pop("completed_at") is not None) is (
        response["status"] == "completed" or (response["status"] == "incomplete" and not mine)
    )
    assert [response.pop(name, None) for name in ("content_filters", "moderation")] == [None, None]
    assert response.pop("store") is mine
    assert response["text"].pop("verbosity", None) is None
    if response["usage"] is not None:
        assert response["usage"]["input_tokens_details"].pop("cache_write_tokens", 0) == 0
        del response["usage"]["output_tokens_details"]
        for name in ("output_tokens", "total_tokens"):  # a piece of theirs is not a piece of ours
            del response["usage"][name]


@pytest.mark.parametrize("length", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", ANSWERS)
def test_the_events(name: str, length: bool) -> None:
    """A call that ended before the cut is whole in ours and incomplete in theirs, so the cut comes before its end."""
    parts, texts = ANSWERS[name]
    if length and isinstance(parts[-1], CallEnd):
        parts = parts[:-1]
    asked: dict[str, Any] = {"tools": [TOOL], "temperature": 1, "top_p": 1, "max_output_tokens": 99}
    if isinstance(parts[0], Reasoning):
        asked["reasoning"] = {"effort": "high"}
    expected = settled(theirs(texts, asked, length), mine=False)
    assert settled(ours(parts, asked, length), mine=True) == expected
