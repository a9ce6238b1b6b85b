"""Rewrites of a function that can be proved right: a variable or the function renamed, comments or docstring gone.

A variable is renamed where its name is a Name or a parameter in the syntax tree, by position: strings, attributes and
keywords of calls stay. The result is parsed again and must be the original tree but for that name.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Sequence

from recipes.nano.functions import Function

SHORTEST = 3
"""Letters of a name that is worth renaming."""


def renameable(function: Function) -> tuple[str, ...]:
    """Parameters and local variables, where every occurrence is a plain one."""
    node = function.node
    inner = [child for child in ast.walk(node) if child is not node]
    if any(isinstance(child, ast.JoinedStr | ast.Global | ast.Nonlocal | ast.Lambda) for child in inner):
        return ()
    if any(isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for child in inner):
        return ()
    stored = {child.id for child in inner if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)}
    arguments = {child.arg for child in inner if isinstance(child, ast.arg)} - {"self", "cls"}
    mentioned = set(re.findall(r"\w+", function.docstring or ""))
    names = [name for name in sorted(stored | arguments) if len(name) >= SHORTEST and name not in mentioned]
    return tuple(name for name in names if len(_places(function, name)) > 1)


def rename(function: Function, old: str, new: str) -> str | None:
    """The source with the variable renamed; None where that is not certainly right."""
    if new in function.source:
        return None
    lines = function.source.splitlines(keepends=True)
    for line, column in sorted(_places(function, old), reverse=True):
        text = lines[line - 1]
        if text[column : column + len(old)] != old:
            return None
        lines[line - 1] = text[:column] + new + text[column + len(old) :]
    renamed = "".join(lines)
    return renamed if _same(renamed, function.source, old, new) else None


def without_comments(source: str) -> str | None:
    """The source without its comments, and without lines that held nothing else; None where there are none."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    if not comments:
        return None
    lines: list[str | None] = list(source.splitlines(keepends=True))
    for comment in comments:
        line = lines[comment.start[0] - 1]
        assert line is not None
        kept = line[: comment.start[1]].rstrip()
        lines[comment.start[0] - 1] = kept + "\n" if kept else None
    text = "".join(line for line in lines if line is not None)
    return text if ast.dump(ast.parse(text)) == ast.dump(ast.parse(source)) else None


def _places(function: Function, name: str) -> Sequence[tuple[int, int]]:
    """(line, column) of each occurrence as a variable; `except ... as NAME` has none of its own."""
    found = []
    for node in ast.walk(function.node):
        if isinstance(node, ast.ExceptHandler) and node.name == name:
            return ()
        if isinstance(node, ast.MatchAs | ast.MatchStar | ast.MatchMapping | ast.alias):
            return ()
        if (isinstance(node, ast.Name) and node.id == name) or (isinstance(node, ast.arg) and node.arg == name):
            found.append((node.lineno, node.col_offset))
    return found


class _Renamer(ast.NodeTransformer):
    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.new, node.ctx) if node.id == self.old else node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        self.generic_visit(node)
        return ast.arg(self.new, node.annotation) if node.arg == self.old else node


def _same(renamed: str, source: str, old: str, new: str) -> bool:
    try:
        expected = _Renamer(old, new).visit(ast.parse(source))
        return ast.dump(ast.parse(renamed)) == ast.dump(expected)
    except SyntaxError:
        return False
