"""Renders a conversation as the text of a prompt: with the checkpoint's own chat template, or with ours.

The checkpoint's template gives the text that transformers' apply_chat_template gives: Jinja2 in its immutable sandbox,
blocks trimmed, `break` and `continue`, `raise_exception`, `strftime_now`, and a `tojson` that leaves HTML characters
alone. What it can do is found out once, by rendering a small conversation: whether it shows the definitions of tools,
calls and results, whether it wants arguments as text or as an object, whether it can switch thinking on and off.

A conversation with tools goes through it where it shows all of them. Otherwise DeepSeek's models get one of our own
templates (text/templates), and all others get plain turns (`text.tool_prompt`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvern.errors import BadRequestError, CheckpointError
from kvern.text.conversation import Conversation
from kvern.text.formats import THINK, AnswerFormat, choose_calls
from kvern.text.messages import Message, Tool, ToolCall
from kvern.text.tool_prompt import Value, add_definitions, as_plain_turns

ARGUMENTS = '{"probe": 1}'
PROBE_TOOL = Tool("probe_tool", "a probe", {"type": "object", "properties": {}})
PROBE = (
    Message("user", "probe_user"),
    Message("assistant", tool_calls=(ToolCall("probe00id", "probe_tool", ARGUMENTS),)),
    Message("tool", "probe_result", tool_call_id="probe00id"),
)
MAX_DEPTH = 64
"""Of arguments that are read as an object."""

NO_PARAMETERS = {"type": "object", "properties": {}}


class Renderer:
    """A checkpoint's chat template and what it can do. `format`: how the model writes its answers."""

    def __init__(self, source: str, variables: Mapping[str, str], control: Mapping[str, int]) -> None:
        self._variables = variables
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is malformed: {error}") from error
        as_text, as_object = (self._try(_values(PROBE, objects), []) for objects in (False, True))
        self._wants_objects = ARGUMENTS not in as_text and bool(as_object)
        calls = as_object if self._wants_objects else as_text
        shows_tools = PROBE_TOOL.name in self._try(_values(PROBE[:1], False), [tool_value(PROBE_TOOL)])
        self._shows_all = shows_tools and PROBE_TOOL.name in calls and "probe_result" in calls
        thinks = all(mark in control for mark in THINK)
        self.format = AnswerFormat(choose_calls(calls if self._shows_all else "", control), THINK if thinks else None)
        if self.format.calls.section[0]:
            self.format = AnswerFormat(choose_calls(calls, control), self.format.think)
            self._ours = _environment().from_string(_own_template(self.format.calls.name))
        self.opening, on, off = (self._opening(thinking) for thinking in (None, True, False))
        self.switches_thinking = on != off
        self.can_think = thinks and (self.switches_thinking or self.opening.rstrip().endswith(THINK[0]))

    def values(self, chat: Conversation) -> tuple[list[Value], list[Value]]:
        """The messages and tools, as templates read them."""
        tools = [] if chat.tool_choice == "none" else [tool_value(tool) for tool in chat.tools]
        own = self._shows_all or not _about_tools(chat.messages, tools)
        return _values(chat.messages, self._wants_objects and own), tools

    def render(
        self, messages: list[Value], tools: list[Value], add_generation_prompt: bool, thinking: bool | None
    ) -> str:
        """Return the prompt's text. Raises BadRequestError when the template refuses the conversation."""
        template, variables = self._template, dict[str, Any](self._switches(thinking))
        if not self._shows_all and _about_tools(messages, tools):
            messages = add_definitions(messages, tools, self.format.calls)
            if self.format.calls.section[0]:
                template, variables = self._ours, {"opening": self._opening(thinking)}
            else:
                messages = as_plain_turns(messages)
            tools = []
        try:
            return self._render(template, messages, tools, add_generation_prompt, variables)
        except jinja2.TemplateError as error:
            raise BadRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise BadRequestError(f"the chat template fails on these messages: {error}", param="messages") from error

    def _render(
        self,
        template: jinja2.Template,
        messages: list[Value],
        tools: list[Value],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        given = {**self._variables, **variables, "add_generation_prompt": add_generation_prompt}
        return template.render(messages=messages, tools=tools or None, documents=None, **given)

    def _try(
        self, messages: list[Value], tools: list[Value], *, generate: bool = False, thinking: bool | None = None
    ) -> str:
        """The text, or "" where the template fails, for whatever reason."""
        try:
            return self._render(self._template, messages, tools, generate, self._switches(thinking))
        except Exception:
            return ""

    def _opening(self, thinking: bool | None) -> str:
        """What a prompt ends with after the last user turn."""
        user = _values(PROBE[:1], False)
        whole = self._try(user, [], generate=True, thinking=thinking)
        return whole.removeprefix(self._try(user, [], thinking=thinking)) if whole else ""

    def _switches(self, thinking: bool | None) -> dict[str, bool]:
        """DeepSeek's templates read `thinking`, others `enable_thinking`."""
        return {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}


def tool_value(tool: Tool) -> Value:
    """The dictionary that chat templates read."""
    described = {} if tool.description is None else {"description": tool.description}
    parameters = dict(tool.parameters) or NO_PARAMETERS
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": parameters}}


def _values(messages: Sequence[Message], objects: bool) -> list[Value]:
    values = [message.as_template_value() for message in _in_call_order(messages)]
    for value in values:
        if "tool_calls" in value:
            value["content"] = value["content"] or None
            for call in value["tool_calls"] if objects else ():
                call["function"]["arguments"] = _as_object(call["function"]["arguments"])
    return values


def _in_call_order(messages: Sequence[Message]) -> list[Message]:
    """Results in the order of their calls: most formats do not say which result belongs to which call."""
    ordered: list[Message] = []
    places: dict[str | None, int] = {}
    for is_result, run in itertools.groupby(messages, key=lambda message: message.role == "tool"):
        turns = list(run)
        if is_result:
            turns.sort(key=lambda result: places.get(result.tool_call_id, len(places)))
        else:
            places = {call.id: place for place, call in enumerate(turns[-1].tool_calls)}
        ordered += turns
    return ordered


def _as_object(arguments: str) -> Any:
    """What models write is not always JSON; then it stays text."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if _depth(value) <= MAX_DEPTH else arguments


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [
        part
        for one in level
        if isinstance(one, dict | list)
        for part in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
    return depth


def _about_tools(messages: Sequence[Message | Value], tools: Sequence[Value]) -> bool:
    if tools:
        return True
    values = (one.as_template_value() if isinstance(one, Message) else one for one in messages)
    return any(value["role"] == "tool" or "tool_calls" in value for value in values)


def _own_template(name: str) -> str:
    return (resources.files("kvern.text") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


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
