"""Input items of the Responses API: read, given ids, and folded into the turns of a conversation.

    raw item -> checked, in one shape (what is stored and listed) -> messages

A turn of the assistant is what stands between two turns of others: reasoning, then text, then calls. Fields that are
not read (`status`, `phase`, `annotations` ...) may be there: clients send back whole items that they once received.
Given up: images, files, audio, and items of built-in tools, which are refused by name.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, StringConstraints, Tag

from kvern.errors import BadRequestError
from kvern.text.messages import Message, Role, ToolCall
from kvern.wire.fields import LIST, STRING, Name, Text, string_or_list
from kvern.wire.reading import read

Item: TypeAlias = dict[str, Any]
"""An item in the one shape in which it is stored: JSON, with `id` and `type`."""

Part = TypeVar("Part", bound=BaseModel)
TEXT_PARTS = ("input_text", "output_text", "text")
SEALED = "kvern1."
"""How `encrypted_content` of ours begins: the text follows in base64. It hides nothing that was not shown."""

Id = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.:-]+$")]
CallId = Annotated[Text, StringConstraints(min_length=1, max_length=512)]


class Loose(BaseModel):
    """An object of which only some fields are read; those strictly."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


TextOrParts = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[list[dict[str, Any]], Tag(LIST)], Discriminator(string_or_list)
]


class _Message(Loose):
    role: Literal["user", "assistant", "system", "developer"]
    content: TextOrParts
    id: Id | None = None


class _Call(Loose):
    call_id: CallId
    name: Name
    arguments: Text
    id: Id | None = None


class _CustomCall(Loose):
    call_id: CallId
    name: Name
    input: Text
    id: Id | None = None


class _CallOutput(Loose):
    call_id: CallId
    output: TextOrParts
    id: Id | None = None


class _TextPart(Loose):
    text: Text


class _Refusal(Loose):
    refusal: Text


class _Reasoning(Loose):
    summary: list[_TextPart] = []
    content: list[_TextPart] | None = None
    encrypted_content: Text | None = None
    id: Id | None = None


class _Reference(Loose):
    id: Id


def read_part(kind: type[Part], value: Mapping[str, Any], where: str) -> Part:
    """Check a nested object. Raises BadRequestError whose `param` begins with `where`."""
    try:
        return read(kind, {name: one for name, one in value.items() if one is not None}, {})
    except BadRequestError as error:
        raise BadRequestError(f"{where}.{error.message}", hint=error.hint, param=f"{where}.{error.param}") from error


def parse_items(given: str | Sequence[Any]) -> list[Item]:
    """Check the input and bring it into one shape. Items have no ids yet where none were given.

    Raises BadRequestError that names the item and the field.
    """
    if isinstance(given, str):
        return [_message({"role": "user", "content": given}, "input")]
    return [_parse(item, f"input.{index}") for index, item in enumerate(given)]


def with_ids(items: Iterable[Item], suffix: str) -> list[Item]:
    """The items with ids: their own, or new ones that end in `suffix` and the item's number."""
    return [
        {**item, "id": item.get("id") or item_id(item["type"], f"{suffix}i{index:04x}")}
        for index, item in enumerate(items)
    ]


PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def item_id(kind: str, suffix: str) -> str:
    """The id of an item: OpenAI's prefix for its type, and a suffix."""
    return f"{PREFIXES[kind]}_{suffix}"


def named_response(given: str) -> str | None:
    """The response that an id of ours comes from."""
    found = re.fullmatch(r"[a-z]+_([0-9a-f]{24})[io][0-9a-f]{4,}", given)
    return None if found is None else f"resp_{found[1]}"


def to_messages(items: Iterable[Item], instructions: str | None) -> list[Message]:
    """Fold items into turns; the instructions come first, as a system message.

    Raises BadRequestError for the output of a call that is not there.
    """
    messages = [] if instructions is None else [Message("system", instructions)]
    turn, called = _Turn(), set[str]()
    for item in items:
        kind = item["type"]
        if kind == "function_call":
            called.add(item["call_id"])
        elif kind == "function_call_output" and item["call_id"] not in called:
            raise BadRequestError(
                f"no function call has the call_id {item['call_id']!r} that an output is for", param="input"
            )
        if not turn.takes(item):
            messages += turn.messages()
            turn = _Turn()
        if not turn.add(item):
            messages.append(_of_others(item))
    return [*messages, *turn.messages()]


def seal(text: str) -> str:
    """Reasoning as `encrypted_content`: for clients that send nothing else of it back."""
    return SEALED + base64.b64encode(text.encode()).decode()


def text_of(parts: Iterable[Mapping[str, Any]]) -> str:
    """The text of content parts, joined without anything between them."""
    return "".join(part.get("text", part.get("refusal", "")) for part in parts)


@dataclass
class _Turn:
    """A turn of the assistant, as it fills."""

    reasoning: list[str] = field(default_factory=list)
    content: str | None = None
    calls: list[ToolCall] = field(default_factory=list)

    def takes(self, item: Item) -> bool:
        """Whether the item still belongs to this turn."""
        if item["type"] == "reasoning":
            return self.content is None and not self.calls
        if item["type"] == "message":
            return item["role"] == "assistant" and self.content is None and not self.calls
        return bool(item["type"] == "function_call")

    def add(self, item: Item) -> bool:
        """Take the item, if it is the assistant's at all."""
        if item["type"] == "reasoning":
            self.reasoning.append(_reasoning_of(item))
        elif item["type"] == "function_call":
            self.calls.append(ToolCall(item["call_id"], item["name"], item["arguments"]))
        elif item["type"] == "message" and item["role"] == "assistant":
            self.content = text_of(item["content"])
        else:
            return False
        return True

    def messages(self) -> Iterator[Message]:
        """The turn, or nothing where it holds neither text nor calls."""
        if self.content is None and not self.calls:
            return
        thought = "".join(self.reasoning) or None
        yield Message("assistant", self.content, tool_calls=tuple(self.calls), reasoning_content=thought)


def _of_others(item: Item) -> Message:
    if item["type"] == "function_call_output":
        output = item["output"]
        return Message("tool", output if isinstance(output, str) else text_of(output), tool_call_id=item["call_id"])
    role: Role = "user" if item["role"] == "user" else "system"
    return Message(role, text_of(item["content"]))


def _reasoning_of(item: Item) -> str:
    """The reasoning in full, where we can read it: as text, sealed by us, or else its summary."""
    if item.get("content"):
        return text_of(item["content"])
    sealed: str = item.get("encrypted_content") or ""
    if sealed.startswith(SEALED):
        try:
            return base64.b64decode(sealed.removeprefix(SEALED), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            pass
    return text_of(item["summary"])


def _parse(item: Any, where: str) -> Item:
    if not isinstance(item, dict):
        raise BadRequestError(f"{where}: must be an object", param=where)
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item or "content" in item else "item_reference"
    reader = READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        shown = str(kind)[:64]
        known = ", ".join(READERS)
        raise BadRequestError(
            f"{where}: items of type {shown!r} are not supported", hint=f"known: {known}", param=f"{where}.type"
        )
    return reader(item, where)


def _message(item: dict[str, Any], where: str) -> Item:
    found = read_part(_Message, item, where)
    if isinstance(found.content, str):
        parts = [_text_part(found.content, found.role)]
    else:
        parts = [_content_part(one, found.role, f"{where}.content.{at}") for at, one in enumerate(found.content)]
    return {"id": found.id, "type": "message", "role": found.role, "status": "completed", "content": parts}


def _content_part(part: dict[str, Any], role: str, where: str) -> Item:
    kind = part.get("type")
    if kind == "refusal" and role == "assistant":
        return {"type": "refusal", "refusal": read_part(_Refusal, part, where).refusal}
    _check_text_part(kind, where)
    return _text_part(read_part(_TextPart, part, where).text, role)


def _check_text_part(kind: Any, where: str) -> None:
    if kind not in TEXT_PARTS:
        raise BadRequestError(
            f"{where}: parts of type {str(kind)[:64]!r} are not supported: the model reads text", param=f"{where}.type"
        )


def _text_part(text: str, role: str) -> Item:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}


def _call(item: dict[str, Any], where: str) -> Item:
    found = read_part(_Call, item, where)
    return _called(found.id, found.call_id, found.name, found.arguments)


def _custom_call(item: dict[str, Any], where: str) -> Item:
    """A call of a free-form tool, made by another model: shown to ours as a call of a function with one argument."""
    found = read_part(_CustomCall, item, where)
    return _called(found.id, found.call_id, found.name, json.dumps({"input": found.input}, ensure_ascii=False))


def _called(given: str | None, call_id: str, name: str, arguments: str) -> Item:
    return {
        "id": given,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": "completed",
    }


def _call_output(item: dict[str, Any], where: str) -> Item:
    found = read_part(_CallOutput, item, where)
    output: str | list[Item] = found.output if isinstance(found.output, str) else []
    if not isinstance(found.output, str):
        for at, part in enumerate(found.output):
            _check_text_part(part.get("type"), f"{where}.output.{at}")
        output = [
            _text_part(read_part(_TextPart, part, f"{where}.output.{at}").text, "tool")
            for at, part in enumerate(found.output)
        ]
    return {
        "id": found.id,
        "type": "function_call_output",
        "call_id": found.call_id,
        "output": output,
        "status": "completed",
    }


def _reasoning(item: dict[str, Any], where: str) -> Item:
    found = read_part(_Reasoning, item, where)
    kept: Item = {
        "id": found.id,
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": part.text} for part in found.summary],
    }
    if found.content is not None:
        kept["content"] = [{"type": "reasoning_text", "text": part.text} for part in found.content]
    if found.encrypted_content is not None:
        kept["encrypted_content"] = found.encrypted_content
    return kept


def _reference(item: dict[str, Any], where: str) -> Item:
    return {"id": read_part(_Reference, item, where).id, "type": "item_reference"}


READERS = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _call_output,
    "custom_tool_call": _custom_call,
    "custom_tool_call_output": _call_output,
    "reasoning": _reasoning,
    "item_reference": _reference,
}
