# ruff: noqa: RUF001 (DeepSeek's tokens contain full-width bars)
"""How models write tool calls and reasoning: one row a format, which prompt, parser and forced calls all read.

    V3, V3-0324, R1  [CALLS][CALL]function[SEP]NAME\\n```json\\nARGUMENTS\\n```[END]\\n[CALL]...[END][CALLS END]
    V3.1             [CALLS][CALL]NAME[SEP]ARGUMENTS[END][CALL]...[END][CALLS END]
    Hermes, Qwen     <tool_call>\\n{"name": "NAME", "arguments": ARGUMENTS}\\n</tool_call>
    bare JSON        {"name": "NAME", "parameters": ARGUMENTS}    (Llama 3; others forget their markup)

What stands in brackets are DeepSeek's control tokens, below. Sources: the chat templates of the models, and the model
card of DeepSeek-V3.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvern.text.patterns import Lit, Maybe, Part, Space, Word

THINK = ("<think>", "</think>")
FENCED = re.compile(r"\s*```[a-z]*\s*\n(.*?)\s*```\s*", re.DOTALL)
ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True)
class CallFormat:
    """How calls are written.

    section: what stands around all calls of an answer, ("", "") where nothing does. call: what stands around one.
    head: what comes between the call's opening and the arguments, its Word being the name. tail: the characters that
    may stand between the arguments and the call's end. closes_anywhere: the call's end is a control token of its own,
    so it ends a call even in the middle of a string. opening: the texts before and after a name, to force a call;
    closing: the text behind its arguments; between: what stands between two calls.
    """

    name: str
    section: tuple[str, str]
    call: tuple[str, str]
    head: tuple[Part, ...]
    tail: str
    closes_anywhere: bool
    opening: tuple[str, str]
    closing: str
    between: str

    @property
    def markup(self) -> tuple[str, ...]:
        """The texts that a parser must see, also where they are special tokens."""
        return tuple(text for text in (*self.section, *self.call, SEPARATOR) if text)

    def force(self, name: str | None) -> str:
        """The beginning of a call of this tool, or (None) of any: the answer goes on with the arguments or the name."""
        return self.opening[0] if name is None else self.opening[0] + name + self.opening[1]

    @property
    def again(self) -> str:
        """The text between the end of a call and the name of the next one."""
        return self.between + self.opening[0].removeprefix(self.section[0])

    def read_loosely(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of a whole call that is not written quite as it should be; None if it is no call."""
        if SEPARATOR in text:
            name, _, rest = text.partition(SEPARATOR)
            if name.strip() in ("", "function"):  # as V3 writes
                name, _, rest = rest.partition("\n")
            return _checked(name.strip(), unfence(rest))
        return read_object(text)


SEPARATOR = "<｜tool▁sep｜>"
SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")

V3 = CallFormat(
    "deepseek_v3",
    SECTION,
    CALL,
    (Space(), Maybe("function"), Lit(SEPARATOR), Word(), Lit("\n"), Space(), Lit("```json"), Space()),
    " \t\r\n`",
    True,
    (f"{SECTION[0]}{CALL[0]}function{SEPARATOR}", "\n```json\n"),
    f"\n```{CALL[1]}",
    "\n",
)
V31 = CallFormat(
    "deepseek_v31",
    SECTION,
    CALL,
    (Space(), Word(), Lit(SEPARATOR), Space()),
    " \t\r\n",
    True,
    (SECTION[0] + CALL[0], SEPARATOR),
    CALL[1],
    "",
)
HERMES = CallFormat(
    "hermes",
    ("", ""),
    ("<tool_call>", "</tool_call>"),
    (
        *(Space(), Lit("{"), Space(), Lit('"name"'), Space(), Lit(":"), Space(), Lit('"'), Word(), Lit('"'), Space()),
        *(Lit(","), Space(), Lit('"arguments"'), Space(), Lit(":"), Space()),
    ),
    " \t\r\n}",
    False,
    ('<tool_call>\n{"name": "', '", "arguments":'),
    "}\n</tool_call>",
    "\n",
)
BARE = CallFormat("bare_json", ("", ""), ("", ""), (), "", False, ('{"name": "', '", "parameters":'), "}", "\n")

BARE_HEAD: tuple[Part, ...] = (
    *(Space(), Lit("{"), Space(), Lit('"'), Word(("name", "type", "function", *ARGUMENT_KEYS)), Lit('"')),
    *(Space(), Lit(":")),
)
"""How an object begins that may turn out to be a call without markup."""


@dataclass(frozen=True)
class AnswerFormat:
    """What a model's answers may hold besides text. think: the texts around reasoning, None for a model without."""

    calls: CallFormat
    think: tuple[str, str] | None

    @property
    def markup(self) -> tuple[str, ...]:
        """All texts that a parser must see."""
        return (*self.calls.markup, *(self.think or ()))


def choose_calls(probe: str, control: Iterable[str]) -> CallFormat:
    """The format of a model: `probe` is its template's rendering of a call of `probe_tool`, "" where it has none."""
    known = set(control)
    if SECTION[0] in known:
        return V31 if f"{CALL[0]}probe_tool{SEPARATOR}" in probe else V3
    return BARE if probe and HERMES.call[0] not in probe else HERMES


def read_object(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call written as a JSON object, perhaps in a fence; None if it is none."""
    value = _parse(unfence(text))
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    keys = [key for key in ARGUMENT_KEYS if key in value]
    given = value[keys[0]] if keys else {}
    return _checked(value["name"], given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False))


def unfence(text: str) -> str:
    """The text within ``` and ```, or all of it."""
    fenced = FENCED.fullmatch(text)
    return fenced[1] if fenced else text.strip()


def _checked(name: str, arguments: str) -> tuple[str, str] | None:
    return (name, arguments) if isinstance(_parse(arguments), dict) else None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
