"""What Python's documentation says, read from its reStructuredText: entries, modules, terms, questions.

    .. function:: name(signature)          an entry: its first paragraph and its first doctest
    .. module:: name / :synopsis: ...      a module, with the first paragraph of its page
    .. glossary::                          terms and what they mean
    Title?  /  -------                     a question of the FAQ, and its answer

Markup is turned into plain text with `code`; a paragraph in which markup is left is dropped.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipes.nano.corpus import Document

DIRECTIVE = re.compile(
    r"^(?P<indent> *)\.\. (?P<kind>function|method|classmethod|staticmethod|class|attribute|data|exception|decorator"
    r"|coroutinefunction|coroutinemethod|awaitablefunction|abstractmethod|property):: +(?P<signature>[^ \n].*)$"
)
MODULE = re.compile(r"^\.\. (?:current)?module:: +([\w.]+)")
SYNOPSIS = re.compile(r"^ +:synopsis: +(.+)$", re.MULTILINE)
NAME = re.compile(r"[A-Za-z_][\w.]*")
METHODS = ("method", "classmethod", "staticmethod", "attribute", "coroutinemethod", "abstractmethod", "property")
LEFT_OVER = re.compile(r"[`*]{2}|:\w+:|\|\w+\||::|`_|\]_|\\|^\.\. |^[-=~^\"]{3,}$|Source code:", re.MULTILINE)
PARAGRAPH = range(25, 601)
EXAMPLE_LINES = range(2, 16)


@dataclass(frozen=True)
class Entry:
    """A documented name. name: with its class, without its module; example: a doctest session."""

    module: str
    kind: str
    name: str
    signature: str
    text: str | None
    example: str | None

    @property
    def full_name(self) -> str:
        """With the module, but for built-ins."""
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class Explained:
    """Something with a text: a module, a term of the glossary, a question."""

    name: str
    text: str


def entries(document: Document) -> Iterator[Entry]:
    """The documented names of one page, in order."""
    lines = document.text.splitlines()
    module, owners = "", list[tuple[int, str]]()
    for place, line in enumerate(lines):
        if found := MODULE.match(line):
            module = found[1]
        if (found := DIRECTIVE.match(line)) is None:
            continue
        indent, kind, signature = len(found["indent"]), found["kind"], found["signature"].replace("\\", "").strip()
        owners = [owner for owner in owners if owner[0] < indent]
        name = NAME.match(signature)
        if name is None:
            continue
        called = name[0].removeprefix(f"{module}.")
        if kind in METHODS and "." not in called and owners:
            called = f"{owners[-1][1]}.{called}"
        if kind in ("class", "exception"):
            owners.append((indent, called))
        body = _body(lines[place + 1 :], indent)
        yield Entry(module, kind, called, signature, first_paragraph(body), first_example(body))


def modules(document: Document) -> Iterator[Explained]:
    """The module that a page is about, with its synopsis or the first paragraph."""
    found = re.search(r"^\.\. module:: +([\w.]+)", document.text, re.MULTILINE)
    if found is None:
        return
    rest = document.text[found.end() :]
    synopsis = SYNOPSIS.search(rest[:400])
    if synopsis:
        text = plain(synopsis[1].strip())
        if text is not None:
            yield Explained(found[1], text if text.endswith(".") else f"{text}.")
    for block in rest.split("\n\n")[1:8]:
        if not block.startswith((" ", "..")) and (text := paragraph(block)) is not None:
            yield Explained(found[1], text)
            break


def glossary(document: Document) -> Iterator[Explained]:
    """The terms of a glossary page."""
    lines = document.text.splitlines()
    for place, line in enumerate(lines):
        if re.match(r"^   \S", line) and not line.strip().startswith((".", "`", ":")):
            text = first_paragraph(_body(lines[place + 1 :], 3))
            if text is not None and len(line) < 50:
                yield Explained(line.strip(), text)


def questions(document: Document) -> Iterator[Explained]:
    """Titles that are questions, and what follows."""
    parts = re.split(r"^(\S[^\n]*\?)\n[-=]{3,}\n", document.text, flags=re.MULTILINE)
    for title, rest in zip(parts[1::2], parts[2::2], strict=True):
        section = re.split(r"^\S[^\n]*\n[-=*]{4,}$", rest, maxsplit=1, flags=re.MULTILINE)[0]
        asked, answer = plain(title), list[str]()
        for block in section.strip().split("\n\n"):
            text = paragraph(block)
            if text is None or block.startswith((" ", "*", "..")) or sum(map(len, answer)) + len(text) > PARAGRAPH.stop:
                break
            answer.append(text)
        if asked and answer and not answer[-1].endswith(":"):
            yield Explained(asked, "\n\n".join(answer))


def plain(text: str) -> str | None:
    """Markup turned into plain text on one line; None where some is left."""
    text = " ".join(text.split())
    text = re.sub(r":(?:pep|rfc):`(\d+)`", lambda found: f"{found[0][1:4].upper()} {found[1]}", text)
    text = re.sub(r":(?:ref|doc|term):`([^`<]+?)(?: <[^`]*>)?`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`[~!]?([^`<]+?) <[^`]*>`", r"`\1`", text)
    text = re.sub(r":[\w:+-]+:`~(?:[^`]*\.)?([^`.]+)`", r"`\1`", text)
    text = re.sub(r":[\w:+-]+:`!?([^`]+)`", r"`\1`", text)
    text = re.sub(r"`([^`<]+?) ?<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*`])\*([\w .,]+)\*(?!\w)", r"`\1`", text)
    text = re.sub(r" \[\w+\]_", "", text)
    return None if LEFT_OVER.search(text) or "[#" in text or not text.isascii() else text


def paragraph(block: str) -> str | None:
    """A block as plain text, where it is a whole paragraph of it."""
    text = plain(block)
    if text is None or len(text) not in PARAGRAPH or text.startswith((">>>", "+", "|", "-", "*", "#", "..", "(")):
        return None
    return text if text[0].isupper() or text[0] == "`" else None


def first_paragraph(body: Sequence[str]) -> str | None:
    """Of an entry's body, where it begins with one. Long ones are cut behind a sentence by whoever shows them."""
    blocks = "\n".join(body).strip("\n").split("\n\n")
    block = next((one for one in blocks if not one.strip().startswith((".. ", ":"))), "")
    text = paragraph(block)
    return None if text is None or text.endswith(":") else text


def first_example(body: Sequence[str]) -> str | None:
    """The first doctest of an entry's body."""
    start = next((place for place, line in enumerate(body) if line.strip().startswith(">>>")), None)
    if start is None:
        return None
    indent = len(body[start]) - len(body[start].lstrip())
    lines = []
    if any(DIRECTIVE.match(line) for line in body[:start]):
        return None  # it belongs to a name inside
    for line in body[start:]:
        if not line.strip() or len(line) - len(line.lstrip()) < indent:
            break
        lines.append(line)
    text = textwrap.dedent("\n".join(lines))
    return text if len(lines) in EXAMPLE_LINES and text.isascii() else None


def _body(lines: Sequence[str], indent: int) -> list[str]:
    """The lines of a directive's body, dedented; further signatures and options left out."""
    body = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        body.append(line)
    if body and body[0].strip() and indent != 3:
        body = _after_signatures(body)
    return textwrap.dedent("\n".join(body)).splitlines()


def _after_signatures(body: list[str]) -> list[str]:
    first = next((place for place, line in enumerate(body) if not line.strip()), len(body))
    return body[first:]
