"""Every client against coder-0.5b, served by `kvern serve`: what a user of these pages gets, from the first command on.

A model of this size does not always do what it is told, so what counts is that the conversation runs to its end: exit
status 0, something said or, with a tool, written, no error in the server's log, and a second turn that finds the first
in the prefix cache. aider's task is one that the model manages: the file is edited and committed.

Each turn's figures are logged (`pytest --log-cli-level=INFO`): they are the table in docs/clients.md.
"""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.clients.acting import MODEL
from tests.clients.pages import Desk, read_page
from tests.clients.test_acted import git, needs, repository
from tests.pulled import pulled

pytestmark = [pytest.mark.clients, pytest.mark.slow, pytest.mark.weights, pytest.mark.timeout(4000)]

log = logging.getLogger(__name__)

PATIENCE = 1800.0
"""Seconds for one turn: agents send prompts of 12,000 tokens."""

COUNTERS = ("prompt_tokens", "prefix_cache_hits", "generation_tokens")


@dataclass(frozen=True)
class Served:
    """A `kvern serve` process."""

    url: str
    log: Path

    def counts(self) -> dict[str, int]:
        """What the server has counted so far: tokens, and requests that ended well or not."""
        text = httpx.get(f"{self.url}/metrics").text
        ends = re.findall(r'^vllm:request_success_total\{finished_reason="(\w+)".*\} (\S+)$', text, re.MULTILINE)
        tokens = {name: re.search(rf"^vllm:{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE) for name in COUNTERS}
        found = {name: match[1] for name, match in tokens.items() if match}
        return {name: int(float(value)) for name, value in (*found.items(), *ends)}

    def refused(self) -> list[str]:
        """Requests that got a status of 400 or more."""
        return [line for line in self.log.read_text().splitlines() if re.search(r'HTTP/1\.1" [45]\d\d', line)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pulled(MODEL)
    errors = tmp_path_factory.mktemp("served") / "log"
    argv = [sys.executable, "-m", "kvern", "serve", MODEL, "--port", "0", "--access-log"]
    with errors.open("w") as err, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err, text=True) as process:
        try:
            assert process.stdout is not None
            match = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert match is not None, errors.read_text()
            yield Served(match[0], errors)
        finally:
            process.terminate()


@dataclass(frozen=True)
class Turn:
    """What one turn printed, and what the server counted meanwhile."""

    said: str
    counted: dict[str, int]


def converse(served: Served, name: str, parent: Path) -> list[Turn]:
    """Run the turns of a page."""
    page = read_page(name)
    desk = Desk.set_up(parent, page, served.url)
    turns = []
    for number, (argv, script) in enumerate(page.turns, 1):
        before, files, began = served.counts(), desk.written(), time.monotonic()
        done = desk.run(argv, script, timeout=PATIENCE)
        seconds = time.monotonic() - began
        counted = {what: count - before[what] for what, count in served.counts().items()}
        log.info("%s turn %d: %.0f s %s\n%s", name, number, seconds, counted, done.stdout[-300:])
        assert done.returncode == 0, done.stdout + done.stderr
        assert not served.refused()
        assert counted["error"] == counted["abort"] == 0
        assert counted["stop"] + counted["length"] > 0
        assert done.stdout.strip() or desk.written() != files
        turns.append(Turn(done.stdout, counted))
    return turns


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("claude-code", "claude"),
        ("codex", "codex"),
        ("opencode", "opencode"),
        ("continue", "cn"),
        ("llm", "llm"),
        ("shell-gpt", "sgpt"),
    ],
)
def test_two_turns(served: Served, tmp_path: Path, name: str, command: str) -> None:
    needs(command)
    _, second = converse(served, name, tmp_path)
    prompt, cached = second.counted["prompt_tokens"], second.counted["prefix_cache_hits"]
    assert cached >= min(0.9 * prompt, prompt - 300), "the second turn begins with the first"


def test_aider_edits_and_commits(served: Served, tmp_path: Path) -> None:
    needs("aider")
    work = repository(tmp_path)
    converse(served, "aider", tmp_path)
    assert git(work, "rev-list", "--count", "HEAD") == "2"
    assert git(work, "diff", "--name-only", "HEAD~1", "--", "calc.py") == "calc.py"
    (function,) = ast.parse((work / "calc.py").read_text()).body
    assert isinstance(function, ast.FunctionDef)
    assert function.name == "add"
    assert ast.get_docstring(function)


@pytest.mark.parametrize("name", ["langchain", "openai", "anthropic"])
def test_a_library(served: Served, tmp_path: Path, name: str) -> None:
    needs("python")
    (turn,) = converse(served, name, tmp_path)
    assert len(turn.said.splitlines()) >= 3
    if name == "langchain":
        assert "'name': 'get_weather', 'args': {'city': 'Rome" in turn.said
