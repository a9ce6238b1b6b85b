"""Every client against a model that acts: what it asks for really happens, through Kvern's own request path.

The model knows when to call a tool and what to write, so whole loops run: a call streamed to the client, carried out by
it, its result in the next request, the answer. Everything but the model's part is real: client, HTTP, parser, prompts.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.clients.acting import CONTEXT, MODEL, RESULT, Stage, call, stage
from tests.clients.pages import INSTALLED, Desk, read_page

pytestmark = [pytest.mark.clients, pytest.mark.slow]

CALC = "def add(a, b):\n    return a + b\n"
DOCUMENTED = 'def add(a, b):\n    """Return the sum of a and b."""\n    return a + b\n'


@pytest.fixture(scope="module")
def on_stage(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / MODEL)
    with stage(folder) as made:
        yield made


def needs(command: str) -> None:
    if not (INSTALLED / "bin" / command).exists():
        pytest.skip(f"{command} is not in {INSTALLED}: tests/clients/install.sh")


def run(on_stage: Stage, name: str, plays: Callable[[str], str], parent: Path) -> tuple[Desk, str]:
    """Run the turns of a page; the folder of the client and what it printed."""
    on_stage.actor.plays = plays
    on_stage.actor.prompts.clear()
    page = read_page(name)
    desk = Desk.set_up(parent, page, on_stage.url, CONTEXT)
    printed = []
    for argv, script in page.turns:
        done = desk.run(argv, script, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    return desk, "\n".join(printed)


@pytest.mark.parametrize(
    ("name", "command", "write"),
    [
        ("claude-code", "claude", lambda folder: call("Write", file_path=f"{folder}/hello.txt", content="hi\n")),
        ("codex", "codex", lambda folder: call("exec_command", cmd="echo hi >hello.txt")),
        ("opencode", "opencode", lambda folder: call("write", filePath=f"{folder}/hello.txt", content="hi\n")),
        ("continue", "cn", lambda folder: call("Write", filepath=f"{folder}/hello.txt", content="hi\n")),
    ],
)
def test_an_agent_writes_a_file(
    on_stage: Stage, tmp_path: Path, name: str, command: str, write: Callable[[Path], str]
) -> None:
    needs(command)

    def plays(prompt: str) -> str:
        if "Now say bye" in prompt:
            return "bye bye"
        if RESULT in prompt:
            return "It is written."
        return f"I write it.\n{write(tmp_path / 'work')}" if "<tools>" in prompt else "A file"

    desk, printed = run(on_stage, name, plays, tmp_path)
    assert (desk.folder / "hello.txt").read_text() == "hi\n"
    assert "It is written." in printed
    assert "bye bye" in printed


def test_aider_edits_and_commits(on_stage: Stage, tmp_path: Path) -> None:
    needs("aider")
    work = repository(tmp_path)

    def plays(prompt: str) -> str:
        if "commit message" in prompt:
            return "docs: say what add returns"
        return f"I add it.\n\ncalc.py\n```\n{DOCUMENTED}```\n"

    run(on_stage, "aider", plays, tmp_path)
    assert (work / "calc.py").read_text() == DOCUMENTED
    assert git(work, "log", "-1", "--format=%s") == "docs: say what add returns"
    assert git(work, "status", "--porcelain", "--untracked-files=no") == ""


def repository(parent: Path) -> Path:
    """A git repository with one file, where a client will work."""
    work = parent / "work"
    work.mkdir()
    (work / "calc.py").write_text(CALC)
    git(work, "init", "-q")
    git(work, "add", "calc.py")
    git(work, "-c", "user.name=Test", "-c", "user.email=test@example.com", "commit", "-qm", "begin")
    return work


def git(folder: Path, *argv: str) -> str:
    return subprocess.run(["git", *argv], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(("name", "command"), [("llm", "llm"), ("shell-gpt", "sgpt")])
def test_a_conversation(on_stage: Stage, tmp_path: Path, name: str, command: str) -> None:
    needs(command)
    _, printed = run(on_stage, name, lambda prompt: "bye bye" if "say bye" in prompt else "hi there", tmp_path)
    assert re.fullmatch(r"(hi there\s+)+bye bye\s+", printed), printed
    assert "hi there" in on_stage.actor.prompts[-1], "the second turn tells the first"
