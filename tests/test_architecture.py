"""ARCHITECTURE.md names real things, and the code keeps the house rules that no linter knows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kvern"
STEPS = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "ARCHITECTURE.md").read_text())))
FILES = sorted(SOURCE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}


def defined(tree: ast.Module, dotted: str) -> bool:
    """Whether the module defines the function or class, or the class the method, of this dotted name."""
    body: list[ast.stmt] = tree.body
    for part in dotted.split("."):
        nodes = [
            n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and n.name == part
        ]
        if not nodes:
            return False
        body = nodes[-1].body
    return True


@pytest.mark.parametrize(("file", "name"), STEPS, ids=str)
def test_every_step_of_the_architecture_page_exists(file: str, name: str) -> None:
    assert defined(ast.parse((SOURCE / file).read_text()), name)


def test_the_page_has_steps() -> None:
    assert len(STEPS) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_house_rules(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert path.name not in FORBIDDEN_NAMES
    assert ast.get_docstring(tree), "a module opens with what it does"
    assert len(text.splitlines()) <= 400, "split it"
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)], "no globals"
