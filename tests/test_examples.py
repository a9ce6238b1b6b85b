"""Every example runs, with a tiny model or against a server of it, and stays short."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.server.serving import serving

from kvern.llm import LLM

EXAMPLES = Path(__file__).parents[1] / "examples"
OFFLINE = ["generate", "chat", "stream"]
ONLINE = ["any_server", "openai_sdk"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, str], str]:
    """Run an example as a script; return what it prints."""

    def run(name: str, argument: str) -> str:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, argument])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_all_are_tested_and_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert sorted(file.stem for file in files) == sorted(OFFLINE + ONLINE)
    assert all(len(file.read_text(encoding="utf-8").splitlines()) < 40 for file in files)


@pytest.mark.parametrize("name", OFFLINE)
def test_offline(run: Callable[[str, str], str], name: str, tiny_folder: Path) -> None:
    assert run(name, str(tiny_folder)).strip()


@pytest.mark.parametrize("name", ONLINE)
def test_online(run: Callable[[str, str], str], name: str, tiny_folder: Path) -> None:
    with serving(lambda: LLM(tiny_folder, threads=1)) as server:
        assert ("models: tiny-v3" if name == "any_server" else " tokens\n") in run(name, server.url)
