"""The rows that kvern-nano is taught with say what is so, come out the same every time, and read as they were meant."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path
from typing import Any

import pytest
from recipes.nano import docs, rows
from recipes.nano.code_rows import TASKS, code_rows
from recipes.nano.corpus import Document
from recipes.nano.docs_rows import docs_rows, shortened
from recipes.nano.functions import Function, first_sentence, functions
from recipes.nano.gaps import SIZES, pieces
from recipes.nano.renaming import rename, renameable, without_comments
from recipes.nano.skills import SKILLS, World
from recipes.nano.tool_rows import tool_rows

from kvern.text.conversation import Conversation
from kvern.text.events import CallArguments, CallStart, Content
from kvern.text.messages import Message, Tool, ToolCall
from kvern.text.parser import AnswerParser
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer

MODULE = '''
import os

def find(name, paths, limit=3):
    """Return the first path that holds `name`. Others are ignored.

    More about it.
    """
    # look everywhere
    for path in paths:  # in order
        if os.path.exists(os.path.join(path, name)):
            return path
    return call(name, paths=paths)

class Box:
    def __len__(self):
        """Return how many there are."""
        return len(self.items)

    def grow(self, *sizes, step=1, **more):
        total = sum(sizes)
        self.total = total
        return total
'''
PAGE = """
.. module:: shelf
   :synopsis: Things on shelves.

The :mod:`shelf` module keeps *things* in order, and ``None`` where there are none.

.. function:: put(thing, place=0)

   Put *thing* at :attr:`place`, see :func:`~shelf.take` and `the web <https://x.org>`_.  It stays there.

   >>> put(1)
   True

.. class:: Shelf(size)

   A shelf of *size* places for things.

   .. method:: clear()

      Take everything away from this shelf.

.. function:: odd()

   Broken ``markup`` |here| and ::
"""


@pytest.fixture(scope="module")
def known() -> list[Function]:
    return list(functions([Document("library", "m/box.py", MODULE)]))


def test_functions_stand_alone(known: list[Function]) -> None:
    assert [one.key for one in known] == ["m.box.find", "m.box.Box.__len__", "m.box.Box.grow"]
    find, _, grow = known
    assert find.summary == "Return the first path that holds `name`."
    assert find.signature == "find(name, paths, limit=3)"
    assert grow.parameters == ("*sizes", "step", "**more")
    assert find.calls == ("exists", "join", "call")
    assert find.bare is not None
    assert find.bare.startswith("def find(name, paths, limit=3):\n    # look everywhere\n")
    assert find.head.endswith('More about it.\n    """\n')
    for one in known:
        ast.parse(one.source)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Do a thing to it, e.g. this. And more.", None),
        ("Return the number of\nthings. More.", "Return the number of things."),
        ("return the number of things", None),
        ("Short.", None),
        ("Return the version 1.2 of a thing", "Return the version 1.2 of a thing."),
    ],
)
def test_first_sentences(text: str, sentence: str | None) -> None:
    assert first_sentence(text) == sentence


def test_renaming_touches_a_variable_and_nothing_else(known: list[Function]) -> None:
    find, _, grow = known
    assert renameable(find) == ("paths",)  # the docstring speaks of the others; `limit` stands once
    renamed = rename(find, "paths", "folders")
    assert renamed is not None
    assert "def find(name, folders, limit=3)" in renamed
    assert "call(name, paths=folders)" in renamed
    assert "os.path.exists(os.path.join(path" in renamed
    assert rename(find, "path", "limit") is None
    assert (rename(grow, "total", "amount") or "").count("self.total = amount") == 1


def test_comments_go_and_code_stays(known: list[Function]) -> None:
    text = without_comments(known[0].source)
    assert text is not None
    assert "#" not in text
    assert "    for path in paths:\n" in text
    assert without_comments("x = '# no comment'\n") is None


def test_code_rows_are_the_same_every_time(known: list[Function]) -> None:
    first = list(code_rows(known))
    assert first == list(code_rows(known))
    assert len(first) > 10
    one_alone = list(code_rows(known[:1]))
    assert all(row in first for row in one_alone)
    for name in TASKS:
        for one in known:
            row = TASKS[name](one, random.Random(0))
            assert row is None or row["messages"][-1]["content"].strip()


def test_documentation_is_read_without_its_markup() -> None:
    page = Document("docs", "library/shelf.rst", PAGE)
    put, shelf, clear, odd = docs.entries(page)
    assert put.text == "Put `thing` at `place`, see `take` and the web. It stays there."
    assert put.example == ">>> put(1)\nTrue"
    assert (shelf.full_name, clear.full_name) == ("shelf.Shelf", "shelf.Shelf.clear")
    assert odd.text is None
    assert [one.text for one in docs.modules(page)] == [
        "Things on shelves.",
        "The `shelf` module keeps `things` in order, and `None` where there are none.",
    ]
    written = [row["messages"] for row in docs_rows([page])]
    assert any(answer["content"] == put.text for _, answer in written)
    assert any(answer["content"] == "Take everything away from this shelf." for _, answer in written)


def test_glossary_and_questions() -> None:
    terms = ".. glossary::\n\n   thing\n      Something that one can hold or at least name.\n\n   ``..``\n      Dots.\n"
    assert [(one.name, one.text) for one in docs.glossary(Document("docs", "glossary.rst", terms))] == [
        ("thing", "Something that one can hold or at least name.")
    ]
    asked = "Why is it so?\n-------------\n\nBecause it always was like that.\n\nx\n\nNext\n----\n\nNo answer.\n"
    assert [(one.name, one.text) for one in docs.questions(Document("docs", "faq/a.rst", asked))] == [
        ("Why is it so?", "Because it always was like that.")
    ]


def test_long_texts_end_behind_a_sentence() -> None:
    text = "A sentence of some length. " * 30
    assert shortened(text.strip(), 100) == ("A sentence of some length. " * 2).strip()


def test_pieces_are_the_module_in_order() -> None:
    text = "".join(f"def number_{number}():\n    return {'x' * 60}\n\n\n" for number in range(200))
    found = list(pieces(Document("library", "m.py", text)))
    assert len(found) > 3
    assert all(piece in text and piece.startswith("def ") and len(piece) <= 2 * SIZES[1] for piece in found)


def test_tool_rows_are_read_back_by_the_parser(
    known: list[Function], tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    template = ChatTemplate.load(tokenizer_folder, tokenizer)
    assert template is not None
    entries = [one for one in docs.entries(Document("docs", "library/shelf.rst", PAGE)) if one.text]
    made = list(tool_rows(World(known, entries), 60))
    assert made == list(tool_rows(World(known, entries), 60))
    assert {len(row["messages"]) for row in made} >= {2, 4, 5}
    for row in made:
        chat = conversation(row)
        for place, message in enumerate(chat.messages):
            if message.role == "assistant":
                asked = Conversation(chat.messages[:place], chat.tools)
                prompt, parsing = template.prompt(asked)
                whole = template.render(Conversation(chat.messages[: place + 1], chat.tools), False)
                written = whole[len(template.render(asked)) :].removesuffix(tokenizer.named_tokens["eos_token"])
                assert prompt == tokenizer.encode(template.render(asked), allow_special=True)
                assert read(AnswerParser(parsing), written) == (
                    message.content or "",
                    [(call.name, call.arguments) for call in message.tool_calls],
                )


def test_every_skill_is_asked_with_its_own_arguments(known: list[Function]) -> None:
    entries = [one for one in docs.entries(Document("docs", "library/shelf.rst", PAGE)) if one.text]
    for skill in SKILLS:
        for seed in range(20):
            scene = skill.draw(random.Random(seed), World(known, entries))
            assert set(scene.arguments) == set(skill.properties)
            for name, value in scene.arguments.items():
                kind = {"string": str, "integer": int}[skill.properties[name]["type"]]
                assert isinstance(value, kind)
                assert skill.name == "calculate" or str(value) in scene.ask
            assert scene.answer.strip()


def test_rows_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    long = rows.chat("Say it.", "x" * rows.LONGEST)
    short = rows.chat("Say it.", "é")
    path = tmp_path / "rows" / "some.jsonl"
    assert rows.write([long, short], path) == 1
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [short]


def conversation(row: dict[str, Any]) -> Conversation:
    messages = []
    for one in row["messages"]:
        calls = tuple(
            ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in one.get("tool_calls", ())
        )
        messages.append(Message(one["role"], one["content"], tool_calls=calls, tool_call_id=one.get("tool_call_id")))
    tools = [tool["function"] for tool in row["tools"]]
    return Conversation(tuple(messages), tuple(Tool(t["name"], t["description"], t["parameters"]) for t in tools))


def read(parser: AnswerParser, text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text of an answer, and its calls as (name, arguments)."""
    events = (*parser.push(text), *parser.finish())
    names = [event.name for event in events if isinstance(event, CallStart)]
    arguments = ["" for _ in names]
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] += event.text
    content = "".join(event.text for event in events if isinstance(event, Content))
    return content, list(zip(names, arguments, strict=True))
