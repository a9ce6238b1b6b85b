"""An answer as OpenAI's Responses have it: one builder makes the stream's events and, by the same steps, the object.

    created (queued) in_progress
      output_item.added
        message:        content_part.added  output_text.delta*  output_text.done  content_part.done
        reasoning:      content_part.added  reasoning_text.delta*  reasoning_text.done  content_part.done, or
                        reasoning_summary_part.added  reasoning_summary_text.delta* .done  reasoning_summary_part.done
        function_call:  function_call_arguments.delta*  function_call_arguments.done
      output_item.done
    completed | incomplete | (error) failed

Every event has a `sequence_number`, from 0. An item has one id in all of them and in the object. Items that were open
when an answer failed or was cancelled get no `done`, so no client acts on half a call; the object shows them as
incomplete. A cancelled answer ends with `response.incomplete`, whose status is `cancelled`: there is no event for it.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from kvern.errors import KvernError
from kvern.text.events import CallArguments, CallStart, Content, Piece, Reasoning
from kvern.text.events import Event as Part
from kvern.text.messages import FinishReason, ScoredToken
from kvern.wire.answers import Usage, error_body
from kvern.wire.chat import ChoiceLogprobs
from kvern.wire.responses_answer import (
    FunctionCall,
    IncompleteDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    ResponseUsage,
    Status,
    SummaryText,
)
from kvern.wire.responses_items import item_id, seal

Event: TypeAlias = dict[str, Any]
AnyItem = TypeVar("AnyItem", bound=OutputItem)


def encode(events: Iterable[Event]) -> bytes:
    """Events as server-sent events: the type as the event's name, then the JSON."""
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
        for event in events
    )


class _Open(ABC, Generic[AnyItem]):
    """An item that still grows."""

    def __init__(self, item: AnyItem, output_index: int) -> None:
        self.item = item
        self.at = {"item_id": item.id, "output_index": output_index}
        self._text: list[str] = []

    def opened(self) -> list[Event]:
        """The events that announce it."""
        index = self.at["output_index"]
        return [{"type": "response.output_item.added", "output_index": index, "item": self.item.model_dump()}]

    def add(self, text: str, scores: Sequence[ScoredToken] = ()) -> list[Event]:
        """More text."""
        self._text.append(text)
        return [self._delta(text, scores)]

    def close(self, status: ItemStatus) -> list[Event]:
        """The events that end it."""
        self.settle(status)
        done = {"type": "response.output_item.done", "output_index": self.at["output_index"]}
        return [*self._closed(), {**done, "item": self.item.model_dump()}]

    def settle(self, status: ItemStatus) -> None:
        """Put into the item what it has so far."""
        self.item.status = status
        self._settle("".join(self._text))

    @abstractmethod
    def _delta(self, text: str, scores: Sequence[ScoredToken]) -> Event: ...

    @abstractmethod
    def _closed(self) -> list[Event]: ...

    @abstractmethod
    def _settle(self, text: str) -> None: ...


class _OpenMessage(_Open[OutputMessage]):
    def __init__(self, item: OutputMessage, output_index: int) -> None:
        super().__init__(item, output_index)
        self.at["content_index"] = 0
        self._logprobs: list[dict[str, Any]] = []

    def opened(self) -> list[Event]:
        events, part = super().opened(), OutputText()
        self.item.content = [part]
        return [*events, {"type": "response.content_part.added", **self.at, "part": part.model_dump()}]

    def _delta(self, text: str, scores: Sequence[ScoredToken]) -> Event:
        logprobs = [one.model_dump() for one in ChoiceLogprobs.of(tuple(scores)).content] if scores else []
        self._logprobs += logprobs
        return {"type": "response.output_text.delta", **self.at, "delta": text, "logprobs": logprobs}

    def _settle(self, text: str) -> None:
        self.item.content = [OutputText(text=text, logprobs=self._logprobs)]

    def _closed(self) -> list[Event]:
        part = self.item.content[0]
        text = {"type": "response.output_text.done", **self.at, "text": part.text, "logprobs": part.logprobs}
        return [text, {"type": "response.content_part.done", **self.at, "part": part.model_dump()}]


class _OpenReasoning(_Open[ReasoningItem]):
    """Reasoning, as text or as its summary; `sealed`: also as encrypted_content."""

    def __init__(self, item: ReasoningItem, output_index: int, *, summary: bool, sealed: bool) -> None:
        super().__init__(item, output_index)
        self._summary, self._sealed = summary, sealed
        self.at["summary_index" if summary else "content_index"] = 0
        self._part = "response.reasoning_summary_part" if summary else "response.content_part"
        self._name = "response.reasoning_summary_text" if summary else "response.reasoning_text"

    def opened(self) -> list[Event]:
        return [*super().opened(), {"type": f"{self._part}.added", **self.at, "part": self._as_part("")}]

    def _delta(self, text: str, scores: Sequence[ScoredToken]) -> Event:
        return {"type": f"{self._name}.delta", **self.at, "delta": text}

    def _settle(self, text: str) -> None:
        if self._summary:
            self.item.summary = [SummaryText(text=text)]
        else:
            self.item.content = [ReasoningText(text=text)]
        if self._sealed:
            self.item.encrypted_content = seal(text)

    def _closed(self) -> list[Event]:
        text = "".join(self._text)
        done = {"type": f"{self._name}.done", **self.at, "text": text}
        return [done, {"type": f"{self._part}.done", **self.at, "part": self._as_part(text)}]

    def _as_part(self, text: str) -> dict[str, Any]:
        return (SummaryText(text=text) if self._summary else ReasoningText(text=text)).model_dump()


class _OpenCall(_Open[FunctionCall]):
    def _delta(self, text: str, scores: Sequence[ScoredToken]) -> Event:
        return {"type": "response.function_call_arguments.delta", **self.at, "delta": text}

    def _settle(self, text: str) -> None:
        self.item.arguments = text

    def _closed(self) -> list[Event]:
        done = {"type": "response.function_call_arguments.done", **self.at, "name": self.item.name}
        return [{**done, "arguments": self.item.arguments}]


class ResponseBuilder:
    """Builds one response. Each method returns the events of what it took, in order.

    summary: reasoning goes out as a summary; sealed: also as encrypted_content; logprobs: text comes with scores.
    """

    def __init__(self, response: Response, *, summary: bool, sealed: bool, logprobs: bool) -> None:
        self._response = response
        self._summary, self._sealed, self._logprobs = summary, sealed, logprobs
        self._suffix = response.id.removeprefix("resp_")
        self._text: _OpenMessage | _OpenReasoning | None = None
        self._calls: dict[int, _OpenCall] = {}
        self._scores: list[ScoredToken] = []
        self._number = 0

    def start(self) -> list[Event]:
        """The first events."""
        if not self._response.background:
            return self._stamped([self._state("created"), self._state("in_progress")])
        self._response.status = "queued"
        events = [self._state("created"), self._state("queued")]
        self._response.status = "in_progress"
        return self._stamped([*events, self._state("in_progress")])

    def piece(self, piece: Piece) -> list[Event]:
        """The events of a piece; those of its end come with `finish`."""
        if self._logprobs:
            self._scores += piece.scores
        return self._stamped([event for part in piece.events for event in self._take(part)])

    def finish(self, reason: FinishReason, usage: Usage) -> list[Event]:
        """The model ended, or had to."""
        cut = reason == "length"
        empty = [] if self._response.output else self._message_events("")
        closed = [*self._close_calls("incomplete"), *self._close_text("incomplete" if cut else "completed")]
        self._response.usage = ResponseUsage.of(usage)
        if cut:
            self._response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        return self._stamped([*empty, *closed, self._end("incomplete" if cut else "completed")])

    def fail(self, error: KvernError) -> list[Event]:
        """Something went wrong after the answer had begun."""
        self._response.error = found = ResponseError.of(error)
        param = error_body(error).error.param
        event = {"type": "error", "code": found.code, "message": found.message, "param": param}
        return self._stamped([event, self._end("failed")])

    def cancel(self) -> list[Event]:
        """Somebody asked for the end."""
        return self._stamped([self._end("cancelled")])

    def response(self) -> dict[str, Any]:
        """The object as it is now, with what open items have so far."""
        self._settle("in_progress")
        return self._response.model_dump()

    def not_stored(self) -> dict[str, Any]:
        """The object, which could not be stored after all."""
        self._response.store = False
        return self.response()

    def _take(self, part: Part) -> list[Event]:
        if isinstance(part, Content):
            return self._message_events(part.text)
        self._scores.clear()  # those of reasoning and calls, which have no place
        if isinstance(part, Reasoning):
            return self._reasoning_events(part.text)
        if isinstance(part, CallStart):
            return [*self._close_text("completed"), *self._open_call(part)]
        if isinstance(part, CallArguments):
            return self._calls[part.index].add(part.text)
        return self._calls.pop(part.index).close("completed")

    def _message_events(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not isinstance(self._text, _OpenMessage):
            events = self._close_text("completed")
            self._text = _OpenMessage(OutputMessage(id=self._new_id("message")), len(self._response.output))
            self._response.output.append(self._text.item)
            events += self._text.opened()
        scores, self._scores = self._scores, []
        return [*events, *self._text.add(text, scores)] if text else events

    def _reasoning_events(self, text: str) -> list[Event]:
        events: list[Event] = []
        if not isinstance(self._text, _OpenReasoning):
            events = self._close_text("completed")
            item = ReasoningItem(id=self._new_id("reasoning"))
            at = len(self._response.output)
            self._text = _OpenReasoning(item, at, summary=self._summary, sealed=self._sealed)
            self._response.output.append(item)
            events += self._text.opened()
        return [*events, *self._text.add(text)] if text else events

    def _open_call(self, start: CallStart) -> list[Event]:
        item = FunctionCall(id=self._new_id("function_call"), call_id=start.id, name=start.name)
        self._calls[start.index] = call = _OpenCall(item, len(self._response.output))
        self._response.output.append(item)
        return call.opened()

    def _close_text(self, status: ItemStatus) -> list[Event]:
        closed, self._text = self._text, None
        return [] if closed is None else closed.close(status)

    def _close_calls(self, status: ItemStatus) -> list[Event]:
        closed, self._calls = self._calls, {}
        return [event for call in closed.values() for event in call.close(status)]

    def _settle(self, status: ItemStatus) -> None:
        for item in (*self._calls.values(), self._text):
            if item is not None:
                item.settle(status)

    def _end(self, status: Status) -> Event:
        """The last event."""
        self._settle("incomplete")
        self._calls, self._text = {}, None
        self._response.status = status
        if status == "completed":
            self._response.completed_at = int(time.time())
        return self._state("incomplete" if status == "cancelled" else status)

    def _state(self, name: str) -> Event:
        return {"type": f"response.{name}", "response": self._response.model_dump()}

    def _new_id(self, kind: str) -> str:
        return item_id(kind, f"{self._suffix}o{len(self._response.output):04x}")

    def _stamped(self, events: list[Event]) -> list[Event]:
        for event in events:
            event["sequence_number"] = self._number
            self._number += 1
        return events
