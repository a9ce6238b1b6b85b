from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvern.text.bare_calls import read_bare_calls
from kvern.text.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from kvern.text.formats import BARE, HERMES, THINK, V3, V31, AnswerFormat, CallFormat
from kvern.text.parser import PLAIN, AnswerParser, Parsing
from kvern.text.patterns import Match, match

FORMATS = {row.name: row for row in (V3, V31, HERMES, BARE)}
FOLDER = Path(__file__).parent / "transcripts"
CASES: list[tuple[str, dict[str, Any]]] = [
    (path.stem, case) for path in sorted(FOLDER.glob("*.json")) for case in json.loads(path.read_text(encoding="utf-8"))
]


def parsing(name: str, case: dict[str, Any]) -> Parsing:
    return Parsing(
        AnswerFormat(FORMATS[name], THINK),
        frozenset(case["tools"]),
        case["thinks"],
        case["written"],
        case["most_calls"],
    )


def read(how: Parsing, pieces: list[str]) -> list[Event]:
    parser = AnswerParser(how, lambda index: f"id{index}")
    events: list[Event] = []
    for piece in pieces:
        if not parser.done:
            events += parser.push(piece)
    return events if parser.done else [*events, *parser.finish()]


def joined(events: list[Event]) -> list[list[str]]:
    """The events as transcripts have them: pieces of one kind joined, a call as its name and arguments."""
    found: list[list[str]] = []
    open_call: int | None = None
    for event in events:
        match event:
            case Content(text) | Reasoning(text):
                assert open_call is None
                assert text
                kind = "content" if isinstance(event, Content) else "reasoning"
                if found and found[-1][0] == kind:
                    found[-1][1] += text
                else:
                    found.append([kind, text])
            case CallStart(index, identity, name):
                assert (open_call, identity) == (None, f"id{index}")
                open_call = index
                found.append(["call", name, ""])
            case CallArguments(index, text):
                assert index == open_call
                assert text
                found[-1][2] += text
            case CallEnd(index):
                assert index == open_call
                open_call = None
    assert open_call is None
    return found


def cut(text: str, places: list[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *sorted(places), len(text)])]


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}: {case['name']}" for name, case in CASES])
def test_every_cut_of_a_transcript_gives_the_same_events(name: str, case: dict[str, Any]) -> None:
    how, text = parsing(name, case), case["text"]
    assert joined(read(how, [text])) == case["events"]
    assert joined(read(how, list(text))) == case["events"]
    for place in range(1, len(text)):
        assert joined(read(how, cut(text, [place]))) == case["events"], place


@given(data=st.data())
def test_any_cuts_give_the_same_events(data: st.DataObject) -> None:
    name, case = data.draw(st.sampled_from(CASES))
    places = data.draw(st.lists(st.integers(0, len(case["text"])), max_size=12))
    assert joined(read(parsing(name, case), cut(case["text"], places))) == case["events"]


MARKUP = [*V3.markup, *THINK, *HERMES.call, "{", "}", '"', "\\", "```", "```json\n", "\n", " ", ",", ":", "function"]
WORDS = ['"name"', '"arguments"', '"name": "get_weather"', "get_weather", "get_weather\n", "x", "{}", '{"a": "b"}']
SOUP = st.lists(st.sampled_from([*MARKUP, *WORDS]), max_size=25).map("".join)


class Accounting(AnswerParser):
    """Keeps what is dropped as markup, in the order of the text."""

    def __init__(self, parsing: Parsing) -> None:
        self.parts: list[tuple[str, str]] = []
        super().__init__(parsing)

    def _drop(self, length: int) -> None:
        self.parts.append(("markup", self._buffer[:length]))
        super()._drop(length)

    def _cut(self, length: int) -> str:
        self.parts.append(("text", self._buffer[:length]))
        return super()._cut(length)


def may_be_dropped(text: str, format: CallFormat, tools: frozenset[str]) -> bool:
    """White space, tags of reasoning, or the markup of a call."""
    rest = text.strip()
    if not rest or rest in THINK or isinstance(read_bare_calls(text, tools, final=True), list):
        return True
    for mark in (*format.section, *format.call):
        rest = rest.removeprefix(mark).lstrip()
    whole = rest.partition(format.call[1] or "\0")[0]
    loose = format.read_loosely(whole)
    head = match((*format.head,), rest, final=True) if format.head else None
    closing = [mark for mark in (format.section[1], format.call[1]) if mark]
    ends = any(mark.startswith(text.strip().lstrip(format.tail)) for mark in closing)
    return ends or not rest or bool(loose) or (isinstance(head, Match) and head.end == len(rest))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("thinks", ["inside", "maybe", "never"])
@given(text=SOUP, data=st.data())
def test_nothing_is_lost_and_cuts_do_not_matter(name: str, thinks: Any, text: str, data: st.DataObject) -> None:
    how = Parsing(AnswerFormat(FORMATS[name], THINK), frozenset({"get_weather"}), thinks)
    events = joined(read(how, [text]))
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert joined(read(how, cut(text, places))) == events
    accounting = Accounting(how)
    accounting.push(text)
    accounting.finish()
    assert "".join("".join(part for _, part in accounting.parts).split()) == "".join(text.split())
    for kind, part in accounting.parts:
        assert kind == "text" or may_be_dropped(part, how.format.calls, how.tools), part
    if not any(event[0] == "call" for event in events) and thinks == "never":
        assert "".join(event[-1] for event in events) == text


@given(text=SOUP)
def test_without_tools_and_reasoning_all_is_text_at_once(text: str) -> None:
    parser = AnswerParser(PLAIN)
    assert parser.push(text) == ((Content(text),) if text else ())
    assert parser.finish() == ()


def test_arguments_stream_as_they_come() -> None:
    how = Parsing(AnswerFormat(HERMES, None), frozenset({"f"}))
    parser = AnswerParser(how, lambda index: f"id{index}")
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == ()
    assert parser.push('{"a') == (CallStart(0, "id0", "f"), CallArguments(0, '{"a'))
    assert parser.push('": [1') == (CallArguments(0, '": [1'),)
    assert parser.push("]}}") == (CallArguments(0, "]}"),)
    assert parser.push("\n</tool_call>") == (CallEnd(0),)


def test_text_streams_as_it_comes() -> None:
    parser = AnswerParser(Parsing(AnswerFormat(V3, THINK), frozenset({"f"}), "maybe"))
    assert parser.push("a") == (Content("a"),)
    assert parser.push(" b <") == (Content(" b"),)
    assert parser.push("c") == (Content(" <c"),)


@pytest.mark.parametrize(
    "text", ['{"name": "f", "arguments": {"a": "' + "x\\n" * 20_000, "<tool_call>{" * 3000, "\n{" * 20_000]
)
def test_long_answers_take_linear_time(text: str) -> None:
    begun = time.process_time()
    read(Parsing(AnswerFormat(HERMES, None), frozenset({"f"})), cut(text, list(range(0, len(text), 7))))
    assert time.process_time() - begun < 3


def test_ids_have_deepseeks_form() -> None:
    parser = AnswerParser(Parsing(AnswerFormat(V31, None), frozenset({"f"})))
    start = parser.push(f"{V31.force('f')}{{")[0]
    assert isinstance(start, CallStart)
    assert len(start.id.removeprefix("call_00_")) == 24
