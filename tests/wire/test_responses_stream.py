"""Events of /v1/responses, checked by a machine that reads them and by the SDK's own types and accumulator."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai._models import validate_type
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from tests.wire.test_responses import BODY, F

from kvern.errors import BusyError, ContextLengthError, KvernError
from kvern.text.events import CallArguments, CallEnd, CallStart, Content, Event, Piece, Reasoning
from kvern.text.messages import ScoredToken, TokenScore
from kvern.wire.answers import Usage
from kvern.wire.responses import parse_responses_request
from kvern.wire.responses_answer import Response
from kvern.wire.responses_items import parse_items, to_messages
from kvern.wire.responses_stream import ResponseBuilder, encode

USAGE = Usage.of(7, 5, 3, 1)
ENDS: dict[str, Callable[[ResponseBuilder], list[dict[str, Any]]]] = {
    "completed": lambda builder: builder.finish("stop", USAGE),
    "incomplete": lambda builder: builder.finish("length", USAGE),
    "failed": lambda builder: builder.fail(KvernError("broken", param="x")),
    "cancelled": lambda builder: builder.cancel(),
}


def builder(*, summary: bool = False, sealed: bool = False, logprobs: bool = False, **fields: Any) -> ResponseBuilder:
    body, _ = parse_responses_request(json.dumps({**BODY, **fields}).encode())
    response = Response.of(body, f"resp_{'0' * 24}", 1_700_000_000, temperature=1, top_p=1)
    return ResponseBuilder(response, summary=summary, sealed=sealed, logprobs=logprobs)


def run(
    made: ResponseBuilder, parts: Sequence[Event], end: str = "completed", together: int = 1
) -> list[dict[str, Any]]:
    """All events of an answer whose pieces hold `together` parts each."""
    events = [*made.start()]
    for at in range(0, len(parts), together):
        events += made.piece(Piece("", (1,), events=tuple(parts[at : at + together])))
    return events + ENDS[end](made)


def read_back(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The machine: what each event may follow, and what the events add up to. Returns the finished items."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    head = ["created", "queued", "in_progress"] if events[0]["response"]["background"] else ["created", "in_progress"]
    assert kinds[: len(head)] == head
    assert not [kind for kind in kinds[len(head) : -1] if kind in ("created", "queued", "in_progress", "completed")]
    items: dict[int, dict[str, Any]] = {}
    parts: dict[int, dict[str, Any]] = {}
    text: dict[int, str] = {}
    done: dict[int, dict[str, Any]] = {}
    for kind, event in zip(kinds[len(head) : -1], events[len(head) : -1], strict=True):
        if kind == "error":
            assert kinds[-1] == "failed"
            continue
        at = event["output_index"]
        if kind == "output_item.added":
            assert at == len(items)
            items[at], text[at] = event["item"], ""
            assert event["item"]["status"] == "in_progress"
            continue
        assert at in items
        assert at not in done
        if kind == "output_item.done":
            assert event["item"]["id"] == items[at]["id"]
            assert at not in parts
            done[at] = event["item"]
            continue
        assert event["item_id"] == items[at]["id"]
        if kind.endswith("part.added"):
            assert event["part"]["text"] == ""
            parts[at] = event["part"]
        elif kind.endswith(".delta"):
            assert (at in parts) is (items[at]["type"] != "function_call")
            text[at] += event["delta"]
        elif kind.endswith("part.done"):
            assert event["part"] == {**parts.pop(at), "text": text[at], **_logprobs(event["part"])}
        else:
            assert kind.endswith(".done")
            assert event.get("text", event.get("arguments")) == text[at]
    last = events[-1]["response"]
    assert kinds[-1] == {"cancelled": "incomplete"}.get(last["status"], last["status"])
    assert len({item["id"] for item in last["output"]}) == len(last["output"])
    assert [item["id"] for item in last["output"]] == [items[at]["id"] for at in sorted(items)]
    for at, item in enumerate(last["output"]):
        assert item == done.get(at, item)
        assert item["status"] == (done[at]["status"] if at in done else "incomplete")
    if last["status"] in ("completed", "incomplete"):
        assert len(done) == len(items) > 0
    return cast("list[dict[str, Any]]", last["output"])


def _logprobs(part: dict[str, Any]) -> dict[str, Any]:
    return {"logprobs": part["logprobs"]} if "logprobs" in part else {}


def check_types(events: Sequence[dict[str, Any]]) -> None:
    """Strictly, as the SDK does in its own tests."""
    for event in events:
        validate_type(type_=cast("type[Any]", ResponseStreamEvent), value=json.loads(json.dumps(event)))


TEXT = st.text(max_size=4)


@st.composite
def answers(draw: st.DrawFn) -> list[Event]:
    """Events in the order in which a model can write them."""
    parts: list[Event] = [Reasoning(text) for text in draw(st.lists(TEXT, max_size=3))]
    calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "call"]), max_size=5)):
        if kind == "text":
            parts += [Content(text) for text in draw(st.lists(TEXT, min_size=1, max_size=3))]
            continue
        parts.append(CallStart(calls, f"call_{calls}", "f"))
        parts += [CallArguments(calls, text) for text in draw(st.lists(TEXT, max_size=3))]
        parts.append(CallEnd(calls))
        calls += 1
    return parts


@given(
    answers(),
    st.sampled_from(list(ENDS)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(min_value=0, max_value=40),
    st.integers(min_value=1, max_value=9),
)
def test_every_stream_is_in_order(
    parts: list[Event], end: str, summary: bool, sealed: bool, background: bool, cut: int, together: int
) -> None:
    """Also where the answer ends in the middle of an item."""
    made = builder(summary=summary, sealed=sealed, background=background, tools=[F])
    parts = parts[:cut]
    events = run(made, parts, end, together)
    items = read_back(events)
    check_types(events)
    assert made.response() == events[-1]["response"]
    said = "".join(item["content"][0]["text"] for item in items if item["type"] == "message")
    assert said == "".join(part.text for part in parts if isinstance(part, Content))
    calls = [item for item in items if item["type"] == "function_call"]
    assert [item["call_id"] for item in calls] == [part.id for part in parts if isinstance(part, CallStart)]
    assert "".join(item["arguments"] for item in calls) == "".join(
        part.text for part in parts if isinstance(part, CallArguments)
    )
    thoughts = [item for item in items if item["type"] == "reasoning"]
    told = [part["text"] for item in thoughts for part in (item["summary"] if summary else item["content"])]
    assert "".join(told) == "".join(part.text for part in parts if isinstance(part, Reasoning))
    assert not any(item["content"] if summary else item["summary"] for item in thoughts)


@given(answers())
def test_the_sdk_puts_together_the_same_object(parts: list[Event]) -> None:
    events = run(builder(tools=[F]), parts)
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        read = validate_type(type_=cast("type[Any]", ResponseStreamEvent), value=json.loads(json.dumps(event)))
        state.handle_event(read)
    final = state._completed_response
    assert final is not None
    assert final.output_text == "".join(part.text for part in parts if isinstance(part, Content))
    assert final.id == events[0]["response"]["id"]


@given(answers(), st.booleans())
def test_what_goes_out_can_come_back_in(parts: list[Event], summary: bool) -> None:
    """An answer's items are input of the next turn; reasoning comes back in full, also where only the seal is sent."""
    items = read_back(run(builder(summary=summary, sealed=True), parts))
    bare = [{**item, "content": None, "summary": []} if item["type"] == "reasoning" else item for item in items]
    turns = to_messages(parse_items(bare), None)
    assert turns == to_messages(parse_items(items), None)
    assert "".join(turn.content or "" for turn in turns) == "".join(p.text for p in parts if isinstance(p, Content))
    thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
    if any(not isinstance(part, Reasoning) for part in parts):
        assert (turns[0].reasoning_content or "") == thought


def test_one_answer_word_by_word() -> None:
    call: list[Event] = [CallStart(0, "call_a", "f"), CallArguments(0, '{"a"'), CallArguments(0, ": 1}"), CallEnd(0)]
    events = run(builder(tools=[F]), [Reasoning("hm"), Content("let "), Content("me"), *call])
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    reasoning, message, asked = events[-1]["response"]["output"]
    assert (reasoning["content"], reasoning["summary"]) == ([{"type": "reasoning_text", "text": "hm"}], [])
    assert message["content"][0]["text"] == "let me"
    assert (asked["call_id"], asked["name"], asked["arguments"]) == ("call_a", "f", '{"a": 1}')
    assert events[-1]["response"]["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 12,
    }


def test_an_answer_that_says_nothing_is_an_empty_message() -> None:
    (message,) = read_back(run(builder(), []))
    assert (message["type"], message["content"][0]["text"], message["status"]) == ("message", "", "completed")


def test_scores_come_with_their_text() -> None:
    made = builder(logprobs=True, include=["message.output_text.logprobs"], top_logprobs=1)
    score = ScoredToken("a", b"a", -0.5, (TokenScore("a", b"a", -0.5),), 0)
    events = made.start() + made.piece(Piece("a", (1,), scores=(score,), events=(Content("a"),)))
    events += made.finish("stop", USAGE)
    check_types(events)
    expected = {"token": "a", "bytes": [97], "logprob": -0.5}
    (delta,) = [event for event in events if event["type"] == "response.output_text.delta"]
    assert delta["logprobs"] == [{**expected, "top_logprobs": [expected]}]
    (message,) = read_back(events)
    assert message["content"][0]["logprobs"] == delta["logprobs"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KvernError("x"), "server_error"),
        (BusyError("try again in 3 s", retry_after=3), "rate_limit_exceeded"),
        (ContextLengthError("too long", tokens=9, limit=8, hint=None, param=None), "context_length_exceeded"),
    ],
)
def test_failures_carry_the_codes_that_clients_act_on(error: KvernError, code: str) -> None:
    *_, event, last = run(builder(), [Content("a")])[:2] + builder().fail(error)
    assert (event["type"], event["code"], event["message"]) == ("error", code, error.message)
    assert last["response"]["error"] == {"code": code, "message": error.message}
    assert "error" not in event, "the SDK would raise instead of passing it on"


def test_the_wire_form() -> None:
    (first, second) = encode([{"type": "a", "text": "é\n"}, {"type": "b"}]).decode().split("\n\n")[:2]
    assert first == 'event: a\ndata: {"type":"a","text":"é\\n"}'
    assert second == 'event: b\ndata: {"type":"b"}'
