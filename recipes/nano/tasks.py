"""Tasks with one right answer, and how often the model gives it, greedily, through `LLM.chat`.

Functions come from held-out files, tools from scenes that were never trained on. Right is right to the letter: the
whole code, or the name of the tool and its arguments as JSON values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvern.llm import LLM
from kvern.text.conversation import Conversation
from kvern.text.messages import Completion, Message, Tool, ToolCall
from recipes.nano.code_rows import name_it, rename_function, rename_it, strip_it
from recipes.nano.functions import Function
from recipes.nano.rows import Row, seeded
from recipes.nano.skills import World
from recipes.nano.tool_rows import ROWS, tool_rows

CODE = {
    "rename a variable": rename_it,
    "rename the function": rename_function,
    "remove comments or docstring": strip_it,
    "name, parameters, calls": name_it,
}
ANSWER = 600


@dataclass(frozen=True)
class Score:
    """Right answers of one task. first: the one that the model gave to the first question, to look at."""

    task: str
    asked: int
    right: int
    first: str


def scores(llm: LLM, functions: Sequence[Function], world: World, count: int = 50) -> list[Score]:
    """Every task, with up to `count` questions each."""
    found = []
    for name, task in CODE.items():
        rows = (task(function, seeded("measure", name, function.key)) for function in functions)
        found.append(_code(llm, name, islice((row for row in rows if row is not None), count)))
    return [*found, *_tools(llm, tool_rows(world, count, ROWS))]


def _code(llm: LLM, name: str, rows: Iterable[Row]) -> Score:
    asked, right, first = 0, 0, ""
    for row in rows:
        ask, expected = (message["content"] for message in row["messages"])
        answer = _answer(llm, Conversation((Message("user", ask),)))
        if answer is None:
            continue
        first = first or answer.content
        asked, right = asked + 1, right + (answer.content.strip() == expected.strip())
    return Score(name, asked, right, first)


def _tools(llm: LLM, rows: Iterable[Row]) -> list[Score]:
    """Whether the call is right, and whether the answer puts its result into words as in the row."""
    called, told, asked = 0, 0, 0
    first = ["", ""]
    for row in rows:
        messages, tools = row["messages"], tuple(_tool(one["function"]) for one in row["tools"])
        answer = _answer(llm, Conversation((Message("user", messages[0]["content"]),), tools))
        expected = [
            (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in messages[1].get("tool_calls", ())
        ]
        if answer is None or len(messages) > 5 or not expected:
            continue
        given = [(call.name, _parsed(call.arguments)) for call in answer.tool_calls]
        asked, called = asked + 1, called + (given == expected)
        place = next(i for i, one in enumerate(messages) if i > 1 and one["role"] == "assistant")
        chat = Conversation(tuple(_message(one) for one in messages[:place]), tools)
        reply = _answer(llm, chat)
        told += reply is not None and reply.content.strip() == messages[place]["content"]
        first = [first[0] or answer.text, first[1] or (reply.content if reply else "")]
    return [Score("call the right tool", asked, called, first[0]), Score("tell its result", asked, told, first[1])]


def _answer(llm: LLM, chat: Conversation) -> Completion | None:
    """None where the question does not fit into the window."""
    room = llm.max_context - len(llm.encode_chat(chat)[0])
    return llm.chat(chat, temperature=0.0, max_tokens=min(ANSWER, room)) if room > 0 else None


def _tool(value: dict[str, Any]) -> Tool:
    return Tool(value["name"], value["description"], value["parameters"])


def _message(value: dict[str, Any]) -> Message:
    calls = tuple(
        ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in value.get("tool_calls", ())
    )
    return Message(value["role"], value["content"], tool_calls=calls, tool_call_id=value.get("tool_call_id"))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
