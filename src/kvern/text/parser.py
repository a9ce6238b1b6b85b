"""Reads an answer while it comes: text, reasoning, tool calls. One parser for all formats, which are rows of a table.

The rules:
- Events depend on the text alone, not on how it was cut into pieces: nothing is decided on a text that could still
  become something else.
- A call begins (CallStart) once its name is known to be a tool's and its arguments have begun; these stream as they
  come. Before that nothing is given away, and what turns out to be no call is text, its markup included.
- A call that is written loosely (keys in another order, a missing fence) is read when it is complete.
- White space next to markup belongs to the markup.
- Reasoning begins at the answer's beginning or not at all, and the first closing tag ends it.
- Calls are looked for only where tools were given. Without markup, see `text.bare_calls`.

What it gives up: once a call has begun, arguments that are broken JSON are passed on as the model wrote them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvern.text.bare_calls import FENCE, find_begin, read_bare_calls
from kvern.text.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from kvern.text.formats import BARE, AnswerFormat
from kvern.text.json_object import ObjectScanner
from kvern.text.patterns import Lit, Match, Maybe, Part, Space, match
from kvern.text.stop import held_back


def new_call_id(index: int) -> str:
    """An id of DeepSeek's form: `call_00_` and 24 characters."""
    return f"call_{index:02d}_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Parsing:
    """How one answer is to be read.

    tools: the names that may be called; none: what looks like a call is text. thinks: the prompt ends inside the
    reasoning, or the model may begin it, or it cannot come. written: the beginning of the answer that stands in the
    prompt already. most_calls: the answer ends after that many.
    """

    format: AnswerFormat
    tools: frozenset[str] = frozenset()
    thinks: Literal["inside", "maybe", "never"] = "never"
    written: str = ""
    most_calls: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the answer can be nothing but text."""
        return not self.tools and self.thinks == "never"


PLAIN = Parsing(AnswerFormat(BARE, None))


class AnswerParser:
    """Turns the text of one answer into events. `done`: it has all the calls that it may have; push nothing more."""

    def __init__(self, parsing: Parsing, new_id: Callable[[int], str] = new_call_id) -> None:
        self.calls = 0
        self.done = False
        self._parsing = parsing
        self._format = parsing.format.calls
        self._open, self._close = parsing.format.think or ("", "")
        self._new_id = new_id
        self._buffer = ""
        self._final = False
        self._events: list[Event] = []
        self._in_call = False
        self._line_start = True
        self._skips_space = False
        self._wait_for = 0  # characters that the buffer must hold before it pays to look again
        self._scanner = ObjectScanner()
        self._step: Callable[[], bool] = self._begin if parsing.thinks != "never" else self._text
        self._openers = tuple(mark for mark in (self._format.section[0], self._format.call[0]) if mark)
        if parsing.written:
            self._feed(parsing.written)

    @property
    def reasons(self) -> bool:
        """Whether the text so far ends within the reasoning."""
        return self._step == self._reasoning

    def push(self, text: str) -> tuple[Event, ...]:
        """Add a piece of the answer; return what became certain."""
        self._feed(text)
        return self._take_events()

    def finish(self) -> tuple[Event, ...]:
        """The answer has ended: return the rest."""
        self._final = True
        self._feed("")
        return self._take_events()

    def _feed(self, text: str) -> None:
        self._buffer += text
        while not self.done and self._buffer and (self._final or len(self._buffer) >= self._wait_for):
            self._wait_for = 0
            if not self._step():
                break
        if self._final and self._in_call:
            self._end_call()

    def _take_events(self) -> tuple[Event, ...]:
        events, self._events = tuple(self._events), []
        return events

    # The states. Each takes something from the buffer, or changes the state, and returns whether it did.

    def _begin(self) -> bool:
        """The answer begins: with an opening tag, or as the prompt left it."""
        found = match((Space(), Lit(self._open), Space()), self._buffer, final=self._final)
        if found == "partial":
            return False
        inside = self._parsing.thinks == "inside"
        if isinstance(found, Match):
            self._drop(found.end)
        elif inside:
            self._drop(len(self._buffer) - len(self._buffer.lstrip()))
        return self._go(self._reasoning if found or inside else self._text)

    def _reasoning(self) -> bool:
        at = self._buffer.find(self._close)
        if at >= 0:
            self._emit(Reasoning(self._cut(len(self._buffer[:at].rstrip()))))
            self._drop(self._buffer.index(self._close) + len(self._close))
            self._skips_space = True
            return self._go(self._text)
        self._emit(Reasoning(self._cut(self._certain((self._close,)))))
        return False

    def _text(self) -> bool:
        if self._parsing.plain:
            self._emit_content(self._cut(len(self._buffer)))
            return False
        if self._skips_space and not self._skip_space():
            return False
        if not self._parsing.tools:
            self._emit_content(self._cut(len(self._buffer)))
            return False
        begins = [(at, self._call) for mark in self._openers if (at := self._buffer.find(mark)) >= 0]
        if not self.calls and (bare := find_begin(self._buffer, self._line_start)) is not None:
            begins.append((bare, self._bare))
        if begins:
            at, state = min(begins, key=lambda begin: begin[0])
            self._emit_content(self._cut(len(self._buffer[:at].rstrip())))
            return self._go(state)
        self._emit_content(self._cut(self._certain((*self._openers, FENCE))))
        return False

    def _call(self) -> bool:
        """The buffer begins with white space and an opener."""
        opening = self._match((Space(), *self._opening_parts()))
        if opening == "partial":
            return False
        if opening is None:
            return self._reject()
        head = match(self._format.head, self._buffer, opening.end, final=self._final)
        if isinstance(head, Match) and head.words[0] in self._parsing.tools and self._buffer.startswith("{", head.end):
            self._drop(head.end)
            self._start_call(head.words[0])
            self._scanner = ObjectScanner(self._format.call[1], self._format.closes_anywhere)
            return self._go(self._arguments)
        return False if head == "partial" else self._loose_call(opening.end)

    def _loose_call(self, start: int) -> bool:
        """A call that does not begin as it should; it is read as a whole, if it can be one."""
        begin = self._buffer[start:].lstrip()[: len(FENCE)]
        if not self._format.closes_anywhere and not begin.startswith(("{", FENCE)):
            return False if begin and FENCE.startswith(begin) and not self._final else self._reject()
        end = self._buffer.find(self._format.call[1], start)
        if end < 0 and not self._final:
            return False
        call = self._format.read_loosely(self._buffer[start : end if end >= 0 else None])
        if call is None or call[0] not in self._parsing.tools:
            return self._reject()
        self._drop(len(self._buffer) if end < 0 else end + len(self._format.call[1]))
        self._whole_call(*call)
        return self._go(self._after_call)

    def _arguments(self) -> bool:
        taken, ending = self._scanner.scan(self._buffer, final=self._final)
        if taken:
            self._emit(CallArguments(self.calls - 1, self._cut(taken)))
        return self._go(self._tail) if ending else False

    def _tail(self) -> bool:
        """Between the arguments and the call's end, which may be missing."""
        rest = self._buffer.lstrip(self._format.tail)
        close = self._format.call[1]
        unfinished = close.startswith(rest) and rest != close
        if unfinished and not self._final:
            return False
        behind = "" if unfinished else rest.removeprefix(close)
        self._drop(len(self._buffer) - len(behind))
        self._end_call()
        return self._go(self._after_call)

    def _after_call(self) -> bool:
        """Another call, the end of all, or text."""
        section = self._format.section[1]
        rest = self._buffer.lstrip()
        if section.startswith(rest) and rest != section:
            if not self._final:
                return False
            rest = ""
        self._drop(len(self._buffer) - len(rest.removeprefix(section)))
        self._skips_space = True
        return self._go(self._text)

    def _bare(self) -> bool:
        calls = read_bare_calls(self._buffer, self._parsing.tools, final=self._final)
        if calls == "partial":
            self._wait_for = len(self._buffer) + len(self._buffer) // 8
            return False
        if calls is None:
            return self._reject()
        self._drop(len(self._buffer))
        for name, arguments in calls:
            if not self.done:
                self._whole_call(name, arguments)
        return True

    # What the states share.

    def _go(self, state: Callable[[], bool]) -> bool:
        self._step = state
        return True

    def _opening_parts(self) -> tuple[Part, ...]:
        section = self._format.section[0]
        return (Maybe(section), Space(), Lit(self._format.call[0])) if section else (Lit(self._format.call[0]),)

    def _match(self, parts: tuple[Part, ...]) -> Match | Literal["partial"] | None:
        return match(parts, self._buffer, final=self._final)

    def _certain(self, marks: tuple[str, ...]) -> int:
        """How much of the buffer can be neither the beginning of markup nor the white space before it."""
        if self._final:
            return len(self._buffer)
        return len(self._buffer[: len(self._buffer) - held_back(self._buffer, marks)].rstrip())

    def _reject(self) -> bool:
        """It is no call: its first character is text, and the rest is looked at again."""
        space = len(self._buffer) - len(self._buffer.lstrip())
        mark = next((one for one in self._openers if self._buffer.startswith(one, space)), "")
        self._emit_content(self._cut(space + max(1, len(mark))))
        return self._go(self._text)

    def _skip_space(self) -> bool:
        self._buffer = self._buffer.lstrip()
        self._skips_space = not self._buffer
        self._line_start = True
        return bool(self._buffer)

    def _cut(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _drop(self, length: int) -> None:
        self._buffer = self._buffer[length:]

    def _emit(self, event: Content | Reasoning | CallArguments) -> None:
        if event.text:
            self._events.append(event)

    def _emit_content(self, text: str) -> None:
        if text:
            self._line_start = text.endswith("\n")
            self._events.append(Content(text))

    def _start_call(self, name: str) -> None:
        self._events.append(CallStart(self.calls, self._new_id(self.calls), name))
        self.calls += 1
        self._in_call = True

    def _end_call(self) -> None:
        self._events.append(CallEnd(self.calls - 1))
        self._in_call = False
        self.done = self.calls == self._parsing.most_calls

    def _whole_call(self, name: str, arguments: str) -> None:
        self._start_call(name)
        self._emit(CallArguments(self.calls - 1, arguments))
        self._end_call()
