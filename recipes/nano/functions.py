"""Functions of the corpus's modules, with what can be said about them for certain.

Only what stands alone is taken: some lines of ASCII that parse by themselves, short enough for a row. Methods come with
the name of their class.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from recipes.nano.corpus import Document

LINES = range(3, 41)
CHARACTERS = 1600
SENTENCE = re.compile(r"(.+?[.!?])(?=\s|$)", re.DOTALL)
SENTENCE_LENGTH = range(18, 200)
Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One function or method. source: dedented, with its decorators; owner: the class of a method."""

    module: str
    owner: str | None
    source: str

    @cached_property
    def node(self) -> Definition:
        """The parsed definition; its lines count from the source's first."""
        node = ast.parse(self.source).body[0]
        assert isinstance(node, Definition)
        return node

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def key(self) -> str:
        """Names the function in the whole corpus."""
        return f"{self.module}.{self.owner}.{self.name}" if self.owner else f"{self.module}.{self.name}"

    @property
    def where(self) -> str:
        """How one speaks of it."""
        return f"the method `{self.name}` of the class `{self.owner}`" if self.owner else f"the function `{self.name}`"

    @cached_property
    def signature(self) -> str:
        """`name(a, b=1)`, without annotations of the result."""
        return f"{self.name}({ast.unparse(self.node.args)})"

    @cached_property
    def docstring(self) -> str | None:
        return ast.get_docstring(self.node)

    @cached_property
    def summary(self) -> str | None:
        """The docstring's first sentence on one line, where that is one in plain words."""
        return first_sentence(self.docstring or "")

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Their names, in order, `self` and `cls` left out, stars kept."""
        given = self.node.args
        names = [one.arg for one in (*given.posonlyargs, *given.args)]
        names += [f"*{given.vararg.arg}"] if given.vararg else []
        names += [one.arg for one in given.kwonlyargs]
        names += [f"**{given.kwarg.arg}"] if given.kwarg else []
        return tuple(name for name in names if name not in ("self", "cls"))

    @cached_property
    def bare(self) -> str | None:
        """The source without its docstring; None where nothing else would be left."""
        first = self.node.body[0]
        if self.docstring is None or len(self.node.body) < 2:
            return None
        lines = self.source.splitlines(keepends=True)
        assert first.end_lineno is not None
        after = lines[first.end_lineno :]
        while after and not after[0].strip():
            after = after[1:]
        text = "".join(lines[: first.lineno - 1] + after)
        return text if _parses(text) else None

    @cached_property
    def head(self) -> str:
        """Decorators, signature and docstring, as they stand."""
        first = self.node.body[0]
        last = (first.end_lineno or first.lineno) if self.docstring is not None else first.lineno - 1
        return "".join(self.source.splitlines(keepends=True)[:last])

    @cached_property
    def calls(self) -> tuple[str, ...]:
        """Names of the functions and methods that it calls, in the order in which they stand, each once."""
        found = [node for node in ast.walk(self.node) if isinstance(node, ast.Call)]
        found.sort(key=lambda call: (call.lineno, call.col_offset))
        names = [
            target.id if isinstance(target, ast.Name) else target.attr
            for call in found
            if isinstance(target := call.func, ast.Name | ast.Attribute)
        ]
        return tuple(dict.fromkeys(names))


def functions(documents: Iterable[Document]) -> Iterator[Function]:
    """Those of Python modules, each source once."""
    seen: set[str] = set()
    for document in documents:
        if document.kind == "docs":
            continue
        module = document.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for function in _of_module(module, document.text):
            if function.source not in seen:
                seen.add(function.source)
                yield function


def first_sentence(text: str) -> str | None:
    """The first sentence of the first paragraph, on one line; None where it is no plain sentence."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    found = SENTENCE.match(paragraph)
    sentence = found[1] if found else paragraph + "." if paragraph else ""
    plain = sentence.isascii() and sentence[:1].isupper() and "::" not in sentence and ">>>" not in sentence
    abbreviated = sentence.endswith(("e.g.", "i.e.", "etc.", "vs."))
    return sentence if plain and not abbreviated and len(sentence) in SENTENCE_LENGTH else None


def _of_module(module: str, text: str) -> Iterator[Function]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
        lines = text.splitlines(keepends=True)
        for node, owner in _definitions(tree):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            source = textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip() + "\n"
            if _is_fit(source):
                yield Function(module, owner, source)


def _definitions(tree: ast.Module) -> Iterator[tuple[Definition, str | None]]:
    for node in tree.body:
        if isinstance(node, Definition):
            yield node, None
        elif isinstance(node, ast.ClassDef):
            yield from ((child, node.name) for child in node.body if isinstance(child, Definition))


def _is_fit(source: str) -> bool:
    short = source.count("\n") in LINES and len(source) <= CHARACTERS
    return short and source.isascii() and "\t" not in source and "```" not in source and _parses(source)


def _parses(source: str) -> bool:
    try:
        return isinstance(ast.parse(source).body[0], Definition)
    except SyntaxError:
        return False
