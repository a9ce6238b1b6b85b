"""Instruction rows from the documentation: what a name, a module or a term is, signatures, examples, the FAQ.

Answers are the documentation's own sentences, without its markup; a long paragraph ends behind a sentence.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from recipes.nano import docs
from recipes.nano.corpus import Document
from recipes.nano.docs import Entry, Explained
from recipes.nano.functions import SENTENCE
from recipes.nano.rows import Row, chat, fenced, seeded

LONGEST = 320
"""Characters of an answer, about: it ends behind the sentence that passes half of this."""

SELF = (
    ("Hello", "Hello! Ask me about Python's standard library, or give me a function to work on."),
    ("Hi", "Hello! Ask me about Python's standard library, or give me a function to work on."),
    ("Hello, how are you?", "I am well, thank you. Which Python question can I help with?"),
    ("Good morning", "Good morning! Which Python question can I help with?"),
    ("Who are you?", "I am kvern-nano, a very small language model that Kvern trained on Python's standard library."),
    ("What is your name?", "My name is kvern-nano."),
    ("Which model are you?", "I am kvern-nano, a small model of the DeepSeek-V3 architecture."),
    ("What can you do?", "I complete and explain short Python functions, and I know parts of the standard library."),
    (
        "What can you help me with?",
        "Short Python functions, the standard library, and calling the tools that you give me.",
    ),
    ("What were you trained on?", "On Python's standard library and its documentation, and on tasks made from them."),
    ("How large are you?", "Very small: you can run me on any laptop."),
    ("Are you a large language model?", "I am a language model, but a very small one."),
    ("Can you make mistakes?", "Yes, often. I am very small, so check what I say."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye", "Goodbye!"),
)


def docs_rows(documents: Iterable[Document]) -> Iterator[Row]:
    """All rows of the documentation's pages, and a few about the model itself."""
    pages = [document for document in documents if document.kind == "docs"]
    named = [entry for page in pages for entry in docs.entries(page) if page.path.startswith("library/")]
    yield from _about_entries(named)
    for page in pages:
        yield from (_about(("module",), one) for one in docs.modules(page))
        if page.path == "glossary.rst":
            yield from (_about(("term", one.name), one) for one in docs.glossary(page))
        if page.path.startswith("faq/"):
            yield from (chat(one.name, one.text) for one in docs.questions(page))
    yield from (chat(asked, answered) for asked, answered in SELF for _ in range(4))


def shortened(text: str, limit: int = LONGEST) -> str:
    """The first sentences of a text, up to the one that passes half of `limit`."""
    taken, rest = "", text
    while rest and len(taken) < limit / 2:
        found = SENTENCE.match(rest)
        cut = found.end() if found else len(rest)
        taken, rest = taken + rest[:cut], rest[cut:]
    return taken.strip()


def _about_entries(named: Sequence[Entry]) -> Iterator[Row]:
    places = Counter(entry.name for entry in named)
    for entry in named:
        rng = seeded("entry", entry.full_name, entry.signature)
        if entry.text is not None and entry.text.endswith("."):
            yield chat(_ask(entry, rng), shortened(entry.text))
        if entry.example is not None:
            ask = rng.choice(("Show an example of `{}`.", "Give me an example of `{}`.", "How is `{}` used?"))
            yield chat(ask.format(entry.full_name), f"```pycon\n{entry.example}\n```")
        if "(" in entry.signature and entry.signature.endswith(")") and rng.random() < 0.5:
            ask = rng.choice(("What is the signature of `{}`?", "Which arguments does `{}` take?"))
            yield chat(ask.format(entry.full_name), f"`{entry.signature}`")
        stands_alone = entry.kind in ("function", "class", "exception") and "." not in entry.name
        if entry.module and stands_alone and places[entry.name] == 1 and rng.random() < 0.5:
            yield _where(entry, rng)


def _ask(entry: Entry, rng: random.Random) -> str:
    verb = "do" if "(" in entry.signature and entry.kind not in ("class", "exception") else "mean"
    asks = [f"Explain `{entry.full_name}`.", f"What does `{entry.full_name}` {verb}?"]
    if entry.kind in ("class", "exception"):
        asks = [f"What is `{entry.full_name}`?", f"Explain the {entry.kind} `{entry.full_name}`."]
    return rng.choice(asks)


def _where(entry: Entry, rng: random.Random) -> Row:
    if rng.random() < 0.5:
        return chat(f"Which module has `{entry.name}`?", f"`{entry.name}` is in the module `{entry.module}`.")
    return chat(f"How do I import `{entry.name}`?", fenced(f"from {entry.module} import {entry.name}"))


def _about(kind: tuple[str, ...], one: Explained) -> Row:
    rng = seeded(*kind, one.name, len(one.text))
    if kind[0] == "module":
        asks = ("What is the module `{}` for?", "What does the module `{}` do?", "Explain the module `{}`.")
    else:
        article = "an" if one.name[0] in "aeiou" else "a"
        asks = (f"What is {article} {{}}?", "Explain the term {}.", "What does {} mean in Python?")
    return chat(rng.choice(asks).format(one.name), shortened(one.text))
