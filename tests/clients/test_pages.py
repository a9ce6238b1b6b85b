"""The pages of the clients and the script that installs them agree; without any client installed."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.clients.pages import FOLDER, ROOT, URL, Desk, read_page

NAMES = sorted(page.stem for page in FOLDER.glob("*.md"))
PACKAGES = {
    "aider": "aider-chat",
    "anthropic": "anthropic",
    "claude-code": "@anthropic-ai/claude-code",
    "codex": "@openai/codex",
    "continue": "@continuedev/cli",
    "langchain": "langchain-openai",
    "llm": "llm",
    "openai": "openai",
    "opencode": "opencode-ai",
    "shell-gpt": "shell-gpt",
}
PARSERS: dict[str, Callable[[str], object]] = {".json": json.loads, ".toml": tomllib.loads}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_can_be_run(name: str, tmp_path: Path) -> None:
    page = read_page(name)
    desk = Desk.set_up(tmp_path, page, "http://127.0.0.1:1234")
    everything = "".join([*(text for _, text in page.files), *(script for _, script in page.turns)])
    assert page.turns
    assert URL in everything
    assert URL not in desk.here(everything)
    for path, _ in page.files:
        written = Path(path.replace("~", str(desk.home)))
        PARSERS.get(written.suffix, str)((desk.folder / written).read_text())


def test_versions_are_those_that_are_installed() -> None:
    script = (ROOT / "tests" / "clients" / "install.sh").read_text()
    pinned = dict(re.findall(r"(?<![\w@])(@?[\w/-]+)(?:==|@)([\d.]+)$", script, re.MULTILINE))
    table = (ROOT / "docs" / "clients.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| [^|]+ \| \[([\w-]+)\]", table, re.MULTILINE)
    named = {name: version for version, name in rows}
    assert named == {name: pinned[PACKAGES[name]] for name in NAMES}
