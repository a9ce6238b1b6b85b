"""The checkpoint's chat template, and its token ids, with nothing in a message able to act as markup.

`render` gives the text: that of the checkpoint's own template, or ours where it ignores tools (`text.renderer`). Where
the last message is to be continued, the text ends with that message, which a mark behind it finds.

`encode` gives the ids of that text, except that control strings which came out of a message, a tool's definition, the
arguments of a call or its result stay characters. Templates compute with message text (trim it, cut it at `</think>`),
so its place in the result cannot be known beforehand. Instead each control string inside a message, and each end of a
message that could begin one, is marked with a character that Unicode reserves for such inner use, and the template runs
again. If taking the marks out again gives the unmarked text, the marks tell which control strings are text. If not, the
template looked at the marked place itself; marks go to the other side of a string that opens a message, and if that
fails too the request is refused.

The text is then cut at the genuine control tokens, which is what a tokenizer does first in any case, and each part
goes through the plain encoder: merges across the border between markup and message are those of the original.
A conversation without control strings takes the original encoder in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.messages import Message, NamedTool
from kvern.text.parser import Parsing
from kvern.text.renderer import Renderer
from kvern.text.tokenizer import Tokenizer

Marker = Callable[[str], str]
Chat: TypeAlias = Conversation | Sequence[Message]
Values: TypeAlias = tuple[list[Any], list[Any]]
"""Messages and tools, as templates read them."""

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatTemplate:
    """A chat template bound to its tokenizer. `source`: its text."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source = source
        self._tokenizer = tokenizer
        self._renderer = Renderer(source, tokenizer.named_tokens, tokenizer.control)
        self.can_think = self._renderer.can_think
        self.format = self._renderer.format

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Read chat_template.jinja, else `chat_template` of tokenizer_config.json; None when there is neither."""
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else tokenizer.config.get("chat_template")
        if isinstance(source, list):  # several named templates; "default" is the one for chat
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return cls(source, tokenizer) if isinstance(source, str) else None

    def render(self, chat: Chat, add_generation_prompt: bool = True) -> str:
        """Return the prompt text. Raises BadRequestError when the template refuses the conversation."""
        chat = _conversation(chat)
        return self._text(self._renderer.values(chat), chat, add_generation_prompt)

    def encode(self, chat: Chat, add_generation_prompt: bool = True) -> list[int]:
        """Return the prompt's token ids; control strings inside messages stay text. Raises BadRequestError."""
        chat = _conversation(chat)
        values = self._renderer.values(chat)
        return self._encode(values, self._text(values, chat, add_generation_prompt), chat, add_generation_prompt)

    def prompt(self, chat: Conversation) -> tuple[list[int], Parsing]:
        """The ids that ask for an answer, and how to read it. Raises BadRequestError.

        Where a call is forced, its beginning stands in the prompt, so that the answer can be nothing else.
        """
        if chat.thinking and not self.can_think:
            raise BadRequestError("the model cannot think before it answers", param="thinking")
        values = self._renderer.values(chat)
        text = self._text(values, chat, True)
        ids, parsing = self._encode(values, text, chat, True), self._parsing(chat, text)
        return ids + self._tokenizer.encode(parsing.written, allow_special=True), parsing

    def answered(self, chat: Conversation, answer: Message) -> tuple[list[int], list[int]]:
        """(The ids that ask for an answer: those of `prompt`; the ids that answer so, to the end of the turn).

        What serving shows of earlier turns, reasoning left out or not, is what the prompt holds. An answer with
        reasoning is one to a prompt that asks for it (`thinking`). Raises BadRequestError where the template cannot
        show the whole answer behind the prompt.
        """
        asking = replace(chat, thinking=bool(answer.reasoning_content) if self.can_think else None)
        if answer.reasoning_content and not self.can_think:
            raise BadRequestError("the model's chat template has no place for reasoning", param="reasoning_content")
        prompt, parsing = self.prompt(asking)
        whole = replace(asking, messages=(*chat.messages, answer))
        values, before = self._renderer.values(whole), self._renderer.values(asking)

        def render(change: Marker) -> str:
            asked = self._text(_map_strings(before, change), asking, True)
            shown = self._text(_map_strings(values, change), whole, False)
            return self._tail(asked, parsing.written, shown, change(answer.reasoning_content or ""))

        text = render(str)
        missing = [answer.content or "", answer.reasoning_content or "", *(call.name for call in answer.tool_calls)]
        if not all(part.strip() in text for part in missing):
            raise BadRequestError("the chat template does not show the whole of this answer", param="messages")
        if not any(self._suspicious(string) for string in (*_strings(values), answer.reasoning_content or "")):
            return prompt, self._tokenizer.encode(text, allow_special=True)
        return prompt, [token_id for part in self._parts(render, text) for token_id in part]

    def _tail(self, asked: str, written: str, shown: str, reasoning: str) -> str:
        """What of `shown`, which holds the answer as a turn of the past, comes behind the text that asks for it.

        Turns of the past may lack the reasoning, or the mark that opens it: then both are put back.
        """
        if shown.startswith(asked + written):
            return shown[len(asked + written) :]
        opened, closed = self.format.think or ("", "")
        base, found, gap = asked.rpartition(opened) if opened else ("", "", "")
        if not found or gap.strip() or not shown.startswith(base):
            raise BadRequestError("the chat template shows an answer in another way than it asks for one")
        tail = shown[len(base) :]
        if not reasoning:
            return tail
        if tail.startswith(closed):
            return reasoning + tail
        return reasoning + (f"\n{closed}\n\n" if gap else closed) + tail

    def _parsing(self, chat: Conversation, text: str) -> Parsing:
        opened, closed = self.format.think or ("", "")
        end = text.rstrip()
        thinks: Literal["inside", "maybe", "never"] = "maybe" if opened and not end.endswith(closed) else "never"
        written, most = "", None if chat.parallel_tool_calls else 1
        if chat.continues:
            thinks = "never"
        elif opened and end.endswith(opened):
            thinks = "inside"
            written = f"\n{closed}\n\n" if _thinking(chat) is False else ""
        if isinstance(chat.tool_choice, NamedTool):
            written, most = written + self.format.calls.force(chat.tool_choice.name), 1
        elif chat.tool_choice == "required":
            written += self.format.calls.force(chat.tools[0].name if len(chat.tools) == 1 else None)
        tools = frozenset() if chat.tool_choice == "none" else frozenset(tool.name for tool in chat.tools)
        return Parsing(self.format, tools, thinks, written, most)

    def _text(self, values: Values, chat: Conversation, add_generation_prompt: bool) -> str:
        messages, tools = values
        if not chat.continues:
            return self._renderer.render(messages, tools, add_generation_prompt, _thinking(chat))
        mark = _unused_marks("".join(_strings(values)))[0]
        last = {**messages[-1], "content": (messages[-1]["content"] or "") + mark}
        text, found, _ = self._renderer.render([*messages[:-1], last], tools, False, _thinking(chat)).rpartition(mark)
        if not found or mark in text:
            raise BadRequestError("the chat template has no place where this answer could go on", param="messages")
        return text

    def _encode(self, values: Values, text: str, chat: Conversation, add_generation_prompt: bool) -> list[int]:
        if not any(self._suspicious(string) for string in _strings(values)):
            return self._tokenizer.encode(text, allow_special=True)

        def render(change: Marker) -> str:
            messages, tools = _map_strings(values, change)
            return self._text((messages, tools), chat, add_generation_prompt)

        return [token_id for part in self._parts(render, text) for token_id in part]

    def _suspicious(self, text: str) -> bool:
        return self._tokenizer.find_control(text) is not None or self._tokenizer.begun_control(text.rstrip()) > 0

    def _parts(self, render: Callable[[Marker], str], text: str) -> Iterator[list[int]]:
        before, after = _unused_marks(text)
        for marker in self._markers(before, after):
            marked = render(marker)
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
            cut = len(body) - self._tokenizer.begun_control(body)
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


def _conversation(chat: Chat) -> Conversation:
    return chat if isinstance(chat, Conversation) else Conversation(tuple(chat))


def _thinking(chat: Conversation) -> bool | None:
    """A call that is forced comes without thinking."""
    return chat.thinking if chat.tool_choice in ("none", "auto") else False


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Marker) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def _unused_marks(text: str) -> tuple[str, str]:
    unused = [mark for mark in NONCHARACTERS if mark not in text]
    if len(unused) < 2:
        raise BadRequestError("the messages use up Unicode's noncharacters U+FDD0 to U+FDEF", param="messages")
    return unused[0], unused[1]
