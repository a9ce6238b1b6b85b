"""The checkpoint's chat template, and its token ids, with nothing in a message able to act as markup.

`render` gives the text that transformers' apply_chat_template gives: Jinja2 in its immutable sandbox, blocks trimmed,
`break` and `continue`, `raise_exception`, `strftime_now`, and a `tojson` that leaves HTML characters alone.

`encode` gives the ids of that text, except that control strings which came out of a message stay characters. Templates
compute with message text (trim it, cut it at `</think>`), so its place in the result cannot be known beforehand.
Instead each control string inside a message, and each end of a message that could begin one, is marked with a
character that Unicode reserves for such inner use, and the template runs again. If taking the marks out again gives
the unmarked text, the marks tell which control strings are text. If not, the template looked at the marked place
itself; marks go to the other side of a string that opens a message, and if that fails too the request is refused.

The text is then cut at the genuine control tokens, which is what a tokenizer does first in any case, and each part
goes through the plain encoder: merges across the border between markup and message are those of the original.
A conversation without control strings takes the original encoder in one call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvern.errors import BadRequestError, CheckpointError
from kvern.text.messages import Message
from kvern.text.stop import held_back
from kvern.text.tokenizer import Tokenizer

Marker = Callable[[str], str]
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatTemplate:
    """A chat template bound to its tokenizer."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is malformed: {error}") from error

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Read chat_template.jinja, else `chat_template` of tokenizer_config.json; None when there is neither."""
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else tokenizer.config.get("chat_template")
        if isinstance(source, list):  # several named templates; "default" is the one for chat
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return cls(source, tokenizer) if isinstance(source, str) else None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return the prompt text. Raises BadRequestError when the template refuses the conversation."""
        return self._render([message.as_template_value() for message in messages], add_generation_prompt)

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Return the prompt's token ids; control strings inside messages stay text. Raises BadRequestError."""
        values = [message.as_template_value() for message in messages]
        text = self._render(values, add_generation_prompt)
        if not any(self._suspicious(string) for string in _strings(values)):
            return self._tokenizer.encode(text, allow_special=True)
        return [token_id for part in self._parts(values, text, add_generation_prompt) for token_id in part]

    def _render(self, values: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        variables = {**self._tokenizer.named_tokens, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(messages=values, tools=None, documents=None, **variables)
        except jinja2.TemplateError as error:
            raise BadRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise BadRequestError(f"the chat template fails on these messages: {error}", param="messages") from error

    def _suspicious(self, text: str) -> bool:
        return self._tokenizer.find_control(text) is not None or held_back(text.rstrip(), self._tokenizer.control) > 0

    def _parts(self, values: list[dict[str, Any]], text: str, add_generation_prompt: bool) -> Iterator[list[int]]:
        before, after = _unused_marks(text)
        for marker in self._markers(before, after):
            marked = self._render([_map_strings(value, marker) for value in values], add_generation_prompt)
            if marked.replace(before, "").replace(after, "") == text:
                return self._encode_marked(marked, before, after)
        raise BadRequestError(
            "a message holds the model's control text in a place that its chat template interprets",
            param="messages",
            hint="put a space into strings like <|im_end|>",
        )

    def _markers(self, before: str, after: str) -> tuple[Marker, ...]:
        pattern = self._tokenizer.control_pattern

        def mark_end(text: str) -> str:
            body = text.rstrip()
            cut = len(body) - held_back(body, self._tokenizer.control)
            return text if cut == len(body) else text[:cut] + before + text[cut:]

        def in_front(text: str) -> str:
            return mark_end(pattern.sub(lambda match: before + match[0], text))

        def outside_in(text: str) -> str:
            return mark_end(pattern.sub(lambda match: before + match[0] if match.start() else match[0] + after, text))

        return outside_in, in_front

    def _encode_marked(self, marked: str, before: str, after: str) -> Iterator[list[int]]:
        start = 0
        for match in self._tokenizer.control_pattern.finditer(marked):
            if marked.endswith(before, 0, match.start()) or marked.startswith(after, match.end()):
                continue
            yield self._encode_plain(marked[start : match.start()], before, after)
            yield [self._tokenizer.control[match[0]]]
            start = match.end()
        yield self._encode_plain(marked[start:], before, after)

    def _encode_plain(self, text: str, before: str, after: str) -> list[int]:
        return self._tokenizer.encode(text.replace(before, "").replace(after, ""))


class _Generation(Extension):
    """Accepts `{% generation %}`, which marks assistant text for training, and renders its body as it stands."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares an instance variable)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Marker) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def _unused_marks(text: str) -> tuple[str, str]:
    unused = [mark for mark in NONCHARACTERS if mark not in text]
    if len(unused) < 2:
        raise BadRequestError("the messages use up Unicode's noncharacters U+FDD0 to U+FDEF", param="messages")
    return unused[0], unused[1]
