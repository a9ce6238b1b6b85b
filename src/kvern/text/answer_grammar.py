"""The grammar of a whole answer: reasoning first, then text of a form, or calls whose arguments match their schemas.

    answer = thought? (form | calls)       where the request gives a form
           | calls                         where a call is required; it goes on where the prompt ends
           | thought? (text? calls | text) where a tool is strict

Without any of these there is none, and the model writes as it likes. Calls are written as the model's `CallFormat`
says. Text and reasoning can hold everything but the markup that would end them. The arguments of a tool that is not
strict match its schema where that can be enforced, else they are any object.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.formats import CallFormat
from kvern.text.grammar import CompiledGrammar, Grammars, GrammarSyntaxError
from kvern.text.messages import NamedTool, Tool
from kvern.text.output_format import OutputFormat
from kvern.text.parser import Parsing
from kvern.text.schemas import ANY_OBJECT, Schema, check_schema, json_rule, schema_fault
from kvern.text.tokenizer import Tokenizer

ANYTHING = "/(?s:.*)/"
BARE_BEGIN = r"\s*(```(json)?\s*)?\{\s*\"(name|type|function|arguments|parameters)\"\s*:"
"""How a text begins that would be read as a call without markup."""


class AnswerGrammars:
    """Makes the grammars of answers, for a tokenizer's ids below `ids`. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, ids: int) -> None:
        self._tokenizer = tokenizer
        self._grammars = Grammars(tokenizer, ids)

    def of(self, chat: Conversation, parsing: Parsing) -> CompiledGrammar | None:
        """The grammar of an answer that is read as `parsing` says; None where there is nothing to enforce.

        Raises BadRequestError, naming the field, and the path within a schema.
        """
        tools = () if chat.tool_choice == "none" else chat.tools
        called = bool(tools) and chat.tool_choice != "auto"
        strict = any(tool.strict for tool in tools)
        if chat.format is None and not called and not strict:
            return None
        rules = _Rules(self._tokenizer)
        calls = _Calls(rules, parsing.format.calls, tools, parsing.most_calls != 1)
        if called:
            name = chat.tool_choice.name if isinstance(chat.tool_choice, NamedTool) else None
            body = calls.forced(name or (tools[0].name if len(tools) == 1 else None))
        else:
            body = self._free(chat.format, rules, calls)
            body = body if parsing.written else rules.thought(parsing) + body
        return self._compile(rules, body, chat.format)

    def of_format(self, form: OutputFormat) -> CompiledGrammar:
        """The grammar of a text that has a form from its beginning on. Raises BadRequestError."""
        rules = _Rules(self._tokenizer)
        return self._compile(rules, rules.form(form), form)

    def _free(self, form: OutputFormat | None, rules: _Rules, calls: _Calls) -> str:
        """What may be written where no call must be."""
        if not calls.tools:
            assert form is not None
            return rules.form(form)
        if form is not None:
            return f"({rules.form(form)} | {calls.whole()})"
        text = rules.text(calls.format)
        return f"({text} | {text}? {calls.whole()})"

    def _compile(self, rules: _Rules, start: str, form: OutputFormat | None) -> CompiledGrammar:
        try:
            return self._grammars.compile(rules.grammar(start))
        except GrammarSyntaxError as error:
            param = "tools" if form is None else form.param
            raise BadRequestError(f"{param} can not be enforced: {error}", param=param) from error


class _Rules:
    """The rules of a grammar under construction."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: dict[str, str] = {}
        self._others: list[dict[str, str]] = []

    def grammar(self, start: str) -> str:
        """The whole, in the syntax that llguidance reads."""
        lark = "\n".join([f"start: {start}", *(f"{name}: {body}" for name, body in self._rules.items())])
        return json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *self._others]})

    def add(self, name: str, body: str) -> str:
        """Add a rule; its name."""
        self._rules[name] = body
        return name

    def literal(self, text: str) -> str:
        """This text, control tokens as their ids."""
        parts, start = [], 0
        for found in self._tokenizer.control_pattern.finditer(text):
            parts += [_quoted(text[start : found.start()]), f"<[{self._tokenizer.control[found[0]]}]>"]
            start = found.end()
        return " ".join(part for part in [*parts, _quoted(text[start:])] if part)

    def thought(self, parsing: Parsing) -> str:
        """The reasoning that comes first, as far as the prompt does not hold it; "" where there is none."""
        if parsing.thinks == "never" or parsing.format.think is None:
            return ""
        opened, closed = parsing.format.think
        self.add("THOUGHT", f"{ANYTHING} & ~/(?s:.*){_escaped(closed)}(?s:.*)/")
        thought = f"THOUGHT {self.literal(closed)}"
        if parsing.thinks == "maybe":
            thought = f"({self.literal(opened)} {thought})?"
        return f"{thought} {self.gap()} "

    def gap(self) -> str:
        """White space, or none."""
        return self.add("GAP", "/[ \\r\\n\\t]{1,8}/") + "?"

    def text(self, format: CallFormat) -> str:
        """Text that holds no beginning of a call."""
        opener = format.section[0] or format.call[0]
        markup = f"(?s:.*){_escaped(opener)}" if opener else BARE_BEGIN
        return self.add("TEXT", f"/(?s:.+)/ & ~/{markup}(?s:.*)/")

    def form(self, form: OutputFormat) -> str:
        """Text of the form that the request gives. Raises BadRequestError."""
        if form.kind == "json_object":
            return json_rule(ANY_OBJECT)
        if form.kind == "json_schema":
            check_schema(form.definition, form.param)
            return json_rule(form.definition)
        if form.kind == "regex":
            return f"/{llguidance.regex_to_lark(form.definition, 'dws')}/"
        if form.kind == "choice":
            if not form.definition or not all(form.definition):
                raise BadRequestError("there must be texts to choose from, none of them empty", param=form.param)
            return "(" + " | ".join(_quoted(text) for text in form.definition) + ")"
        self._others.append({"name": "form", "lark_grammar": _lark(form)})
        return "@form"


@dataclass(frozen=True)
class _Calls:
    """The calls of an answer. several: more than one may come."""

    rules: _Rules
    format: CallFormat
    tools: Sequence[Tool]
    several: bool

    def forced(self, name: str | None) -> str:
        """What follows where the prompt ends with the beginning of a call: of this tool, or of any."""
        return self._from(self._named() if name is None else self._arguments(name))

    def whole(self) -> str:
        """All calls, from the first markup on."""
        return f"{self.rules.literal(self.format.opening[0])} {self.forced(None)}"

    def _from(self, first: str) -> str:
        """With white space at the end where more could come: a model that begins a line may still stop."""
        end = self.rules.literal(self.format.section[1])
        if not self.several:
            return f"{first} {end}"
        return f"{first} ({self.rules.literal(self.format.again)} {self._named()})* {end} {self.rules.gap()}"

    def _named(self) -> str:
        """A call from its tool's name on."""
        calls = (f"{self.rules.literal(t.name + self.format.opening[1])} {self._arguments(t.name)}" for t in self.tools)
        return self.rules.add("call", " | ".join(calls))

    def _arguments(self, name: str) -> str:
        """A call from its arguments on."""
        index = next(index for index, tool in enumerate(self.tools) if tool.name == name)
        rule = self.rules.add(f"arguments_{index}", json_rule(_enforced(index, self.tools[index])))
        return f"{self.rules.gap()} {rule} {self.rules.literal(self.format.closing)}"


def _enforced(index: int, tool: Tool) -> Schema:
    """The schema of a tool's arguments, which are an object in any case. Raises BadRequestError for a strict one."""
    schema = tool.parameters or {"additionalProperties": False}
    param = f"tools.{index}.function.parameters"
    if schema.get("type", "object") != "object":
        if tool.strict:
            raise BadRequestError("the arguments of a function are an object", param=f"{param}/type")
        return ANY_OBJECT
    schema = {**schema, "type": "object"}
    if tool.strict:
        check_schema(schema, param)
        return schema
    return ANY_OBJECT if schema_fault(schema) else schema


def _lark(form: OutputFormat) -> str:
    """A request's own grammar in Lark's syntax."""
    try:
        return str(any_to_lark(form.definition))
    except Exception as error:  # the converter's own, which share no base
        says = str(error).split("\n", 1)[0][:300]
        raise BadRequestError(f"{form.param} is no grammar: {says}", param=form.param) from error


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _escaped(text: str) -> str:
    """A text as a part of a regular expression between slashes."""
    return str(llguidance.regex_to_lark("".join(_plain(text))))


def _plain(text: str) -> Iterator[str]:
    for character in text:
        yield character if character.isalnum() or ord(character) > 127 else f"\\x{ord(character):02x}"
