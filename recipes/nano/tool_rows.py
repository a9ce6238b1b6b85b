"""Rows with tools: one that the question needs among others, several calls at once, and tools that are not needed.

Half of the tools are hand-written (`skills`), half are functions of the corpus with the docstring as their description,
so that names and parameters are new nearly every time.
"""

from __future__ import annotations

import json
import keyword
import random
from collections.abc import Iterator, Sequence
from typing import Any

from recipes.nano.docs_rows import SELF
from recipes.nano.functions import Function
from recipes.nano.rows import Row, seeded
from recipes.nano.skills import SKILLS, Scene, Skill, World

ROWS = 9000
MOST_TOOLS = 4
TWICE = ("get_weather", "get_time", "read_file", "calculate", "get_user", "delete_file")
"""Skills of which one may want two at once."""

VALUES = (
    "red",
    "blue",
    "alpha",
    "beta",
    "main",
    "draft",
    "left",
    "north",
    "monday",
    "xml",
    "utf-8",
    "a.txt",
    "x",
    "ok",
)


def tool_rows(world: World, count: int = ROWS, first: int = 0) -> Iterator[Row]:
    """`count` rows, numbered from `first`: from ROWS on, none was trained on."""
    known = [skill for skill in map(_of_function, world.functions) if skill is not None]
    for number in range(first, first + count):
        rng = seeded("tools", number)
        kind = rng.random()
        if kind < 0.1:
            yield _unneeded(rng, known)
        elif kind < 0.2:
            yield _twice(rng, world, known)
        else:
            yield _once(rng, world, known, again=rng.random() < 0.15)


def _once(rng: random.Random, world: World, known: Sequence[Skill], *, again: bool) -> Row:
    """One call and its answer; with `again`, another question for the same tools."""
    skill = _skill(rng, known)
    others = _others(rng, known, skill)
    messages = _turn(skill, [skill.draw(rng, world)])
    if again:
        second = rng.choice((skill, *others))
        messages += _turn(second, [second.draw(rng, world)], first=len(messages))
    return _row(messages, [skill, *others], rng)


def _twice(rng: random.Random, world: World, known: Sequence[Skill]) -> Row:
    """Two calls of one tool in one answer."""
    skill = rng.choice([one for one in SKILLS if one.name in TWICE])
    scenes = [skill.draw(rng, world), skill.draw(rng, world)]
    return _row(_turn(skill, scenes), [skill, *_others(rng, known, skill)], rng)


def _unneeded(rng: random.Random, known: Sequence[Skill]) -> Row:
    """A question that needs no tool."""
    ask, answer = rng.choice(SELF)
    messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    skill = _skill(rng, known)
    return _row(messages, [skill, *_others(rng, known, skill)], rng)


def _turn(skill: Skill, scenes: Sequence[Scene], first: int = 0) -> list[dict[str, Any]]:
    ask = " ".join(scene.ask for scene in scenes)
    calls = [
        {
            "id": f"call_{first + place}",
            "type": "function",
            "function": {"name": skill.name, "arguments": json.dumps(dict(scene.arguments))},
        }
        for place, scene in enumerate(scenes)
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": scene.result}
        for call, scene in zip(calls, scenes, strict=True)
    ]
    answer = " ".join(scene.answer for scene in scenes)
    called = {"role": "assistant", "content": None, "tool_calls": calls}
    return [{"role": "user", "content": ask}, called, *results, {"role": "assistant", "content": answer}]


def _row(messages: list[dict[str, Any]], skills: Sequence[Skill], rng: random.Random) -> Row:
    shown = list(skills)
    rng.shuffle(shown)
    return {"messages": messages, "tools": [skill.tool for skill in shown]}


def _skill(rng: random.Random, known: Sequence[Skill]) -> Skill:
    return rng.choice(SKILLS) if rng.random() < 0.6 or not known else rng.choice(known)


def _others(rng: random.Random, known: Sequence[Skill], skill: Skill) -> list[Skill]:
    drawn = [_skill(rng, known) for _ in range(rng.randint(0, MOST_TOOLS - 1))]
    return list({one.name: one for one in drawn if one.name != skill.name}.values())


def _of_function(function: Function) -> Skill | None:
    """A function of the corpus as a tool: plain names, some parameters, one sentence."""
    names, summary = function.parameters, function.summary
    plain = all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
    if function.name.startswith("_") or summary is None or len(summary) > 90 or not plain or not 0 < len(names) < 4:
        return None

    def draw(rng: random.Random, world: World) -> Scene:
        values = [rng.choice((rng.choice(VALUES), world.name(rng))) for _ in names]
        given = [f'{name} "{value}"' for name, value in zip(names, values, strict=True)]
        with_them = " and ".join([", ".join(given[:-1]), given[-1]] if len(given) > 1 else given)
        ask = rng.choice(("Call {} with {}.", "Use {} with {}.", "Run {} with {}.", "Please call {} with {}."))
        result = rng.choice(("ok", "true", "done", world.name(rng), str(rng.randint(0, 99))))
        answer = f"`{function.name}` returned `{result}`."
        return Scene(ask.format(function.name, with_them), dict(zip(names, values, strict=True)), result, answer)

    properties = {name: {"type": "string"} for name in names}
    return Skill(function.name, summary, properties, draw)
