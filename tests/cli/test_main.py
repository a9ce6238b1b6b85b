from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kvern.cli import COMMANDS, main

HEAVY = ("torch", "pydantic", "rich", "fastapi", "httpx", "jinja2", "tokenizers")


def kvern(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvern", *argv], input=stdin, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_the_overview_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert "examples:\n  kvern pull coder-0.5b" in out


def test_help_needs_nothing_heavy() -> None:
    heavy = f"set(sys.modules) & set({HEAVY})"
    script = f"import sys; from kvern.cli import main; main(['--help']); sys.exit(bool({heavy}))"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0
    assert time.monotonic() - started < 10  # 0.1 s on an idle machine


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvern 0.")


@pytest.mark.parametrize(
    ("argv", "error", "hint"),
    [
        (["srve"], "unknown command 'srve'", "did you mean `kvern serve`?"),
        (["xyzzy"], "unknown command 'xyzzy'", "kvern --help lists the commands"),
        (["chat", "--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'", "kvern chat --help"),
        (["serve", "--prot", "1"], "unrecognized arguments: --prot", "kvern serve --help"),
    ],
)
def test_wrong_calls_exit_with_2(argv: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {error}\n\nhint: {hint}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*name.split(), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: kvern {name}" in out
    assert f"examples:\n  kvern {name}" in out


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "kvern"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvern.cli.chat.run", interrupt)
    assert main(["chat"]) == 130
    assert capsys.readouterr() == ("", "")
