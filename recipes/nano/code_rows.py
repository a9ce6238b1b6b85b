"""Instruction rows from the functions of the corpus: write, complete, explain, document, rewrite, name.

Each task's answer is in the corpus or follows from the syntax tree, so no row teaches anything that is not so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from recipes.nano.functions import Function
from recipes.nano.renaming import rename, renameable, without_comments
from recipes.nano.rows import Row, chat, fenced, listed, seeded

Task = Callable[[Function, random.Random], Row | None]
NEW_NAMES = (
    *("item", "items", "value", "values", "result", "total", "count", "index", "name", "text", "line", "lines", "path"),
    *("data", "entry", "key", "node", "current", "previous", "first", "last", "width", "height", "size", "limit"),
    *("start", "stop", "source", "target", "buffer", "message", "record", "records", "offset", "position", "options"),
)
NEW_FUNCTIONS = ("compute", "process", "build", "load", "collect", "convert", "update", "apply_changes", "make_result")
MOST_NAMES = 8


def write_it(function: Function, rng: random.Random) -> Row | None:
    """Summary and signature -> the function."""
    if function.summary is None or function.name.startswith("test"):
        return None
    ask = rng.choice(
        (
            f"Write {_kind(function)} `{function.signature}`. {function.summary}",
            f"Implement `{function.signature}` in Python: {function.summary}",
            f"{function.summary}\n\nWrite this as the Python function `{function.name}`.",
            f"Write {_kind(function)} named `{function.name}` with this docstring: {function.summary}",
        )
    )
    return chat(ask, fenced(function.source))


def complete_it(function: Function, rng: random.Random) -> Row | None:
    """Signature and docstring -> the whole function."""
    if function.docstring is None or function.bare is None:
        return None
    ask = rng.choice(("Complete this function.", "Finish this Python function.", "Write the body of this function."))
    return chat(f"{ask}\n\n{fenced(function.head)}", fenced(function.source))


def explain_it(function: Function, rng: random.Random) -> Row | None:
    """Code without docstring -> its summary."""
    if function.summary is None or function.bare is None:
        return None
    ask = rng.choice(
        (
            "What does this function do?",
            "Explain this function in one sentence.",
            "Summarise this code in one line.",
            f"What does `{function.name}` do?",
        )
    )
    return chat(f"{ask}\n\n{fenced(function.bare)}", function.summary)


def document_it(function: Function, rng: random.Random) -> Row | None:
    """Code without docstring -> with it."""
    if function.summary is None or function.bare is None:
        return None
    if rng.random() < 0.5:
        ask = rng.choice(("Add a docstring to this function.", "Document this function."))
        return chat(f"{ask}\n\n{fenced(function.bare)}", fenced(function.source))
    ask = rng.choice(("Write a docstring for this function.", "Suggest a docstring for this function."))
    return chat(f"{ask}\n\n{fenced(function.bare)}", f'"""{function.summary}"""')


def rename_it(function: Function, rng: random.Random) -> Row | None:
    """A variable renamed, and nothing else."""
    names = renameable(function)
    if not names:
        return None
    old = rng.choice(names)
    new = rng.choice([name for name in NEW_NAMES if name != old])
    renamed = rename(function, old, new)
    if renamed is None:
        return None
    ask = rng.choice(
        (
            f"Rename the variable `{old}` to `{new}`.",
            f"Rename `{old}` to `{new}` in this code and change nothing else.",
            f"Return this code with `{old}` renamed to `{new}`.",
        )
    )
    return chat(_about(ask, function.source, rng), fenced(renamed))


def rename_function(function: Function, rng: random.Random) -> Row | None:
    """The function renamed where it names itself once, and nothing else."""
    if function.source.count(function.name) != 1:
        return None
    new = rng.choice(NEW_FUNCTIONS)
    ask = rng.choice(
        (
            f"Return this code with the function {function.name} renamed to {new}, and nothing else changed.",
            f"Rename the function `{function.name}` to `{new}`.",
        )
    )
    return chat(_about(ask, function.source, rng), fenced(function.source.replace(function.name, new)))


def strip_it(function: Function, rng: random.Random) -> Row | None:
    """Comments or docstring removed."""
    bare, uncommented = function.bare, without_comments(function.source)
    if bare is not None and (uncommented is None or rng.random() < 0.5):
        return chat(_about("Remove the docstring.", function.source, rng), fenced(bare))
    if uncommented is not None:
        ask = rng.choice(("Remove the comments from this code.", "Return this code without its comments."))
        return chat(_about(ask, function.source, rng), fenced(uncommented))
    return None


def name_it(function: Function, rng: random.Random) -> Row | None:
    """A question about the code whose answer the syntax tree knows."""
    shown = fenced(function.bare or function.source)
    asks: list[tuple[str, str]] = [
        ("What is the name of this function?", f"It is called `{function.name}`."),
    ]
    if 0 < len(function.parameters) <= MOST_NAMES:
        asks.append(("What are the parameters of this function?", f"{listed(function.parameters)}."))
    if 0 < len(function.calls) <= MOST_NAMES:
        asks += 2 * [("Which functions does this code call?", f"It calls {listed(function.calls)}.")]
    ask, answer = rng.choice(asks)
    return chat(f"{ask}\n\n{shown}", answer)


def talk_about_it(function: Function, rng: random.Random) -> Row | None:
    """Two turns: the function, then a question about it or a change to it."""
    first = write_it(function, rng)
    if first is None or function.bare is None:
        return None
    follow = rng.choice((("Now remove the docstring.", fenced(function.bare)), (_parameters_of(function))))
    asked, answered = (message["content"] for message in first["messages"])
    return chat(asked, answered, *follow)


TASKS: dict[str, Task] = {
    "write": write_it,
    "complete": complete_it,
    "explain": explain_it,
    "document": document_it,
    "rename": rename_it,
    "rename function": rename_function,
    "strip": strip_it,
    "name": name_it,
    "talk": talk_about_it,
}

SHARES = {"talk": 0.3, "name": 0.3, "rename function": 0.5, "strip": 0.5}
"""How many of the functions get a row of a task, where not all do."""

OF_TESTS = ("rename", "rename function", "name", "strip")
"""Tasks that test functions are good for."""


def code_rows(functions: Sequence[Function]) -> Iterator[Row]:
    """Every task for every function that it fits, task by task."""
    for name, task in TASKS.items():
        for function in functions:
            rng = seeded(name, function.key, len(function.source))
            tested = function.name.startswith("test") or ".test" in f".{function.module}"
            if tested and (name not in OF_TESTS or rng.random() < 0.9):
                continue
            if rng.random() < SHARES.get(name, 1.0) and (row := task(function, rng)) is not None:
                yield row


def _kind(function: Function) -> str:
    return f"a method of a class `{function.owner}`" if function.owner else "a Python function"


def _about(ask: str, source: str, rng: random.Random) -> str:
    return f"{fenced(source)}\n\n{ask}" if rng.random() < 0.5 else f"{ask}\n\n{fenced(source)}"


def _parameters_of(function: Function) -> tuple[str, str]:
    names = function.parameters
    answer = f"{listed(names)}." if names else "It has no parameters."
    return "What are its parameters?", answer
