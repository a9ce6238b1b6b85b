from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_main import kvern

from kvern.cli import chat, main
from kvern.text.messages import Message


class Recorder:
    """Answers with the number of messages it was sent."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], dict[str, Any]]] = []

    def stream(self, messages: list[Message], **sampling: Any) -> Iterator[str]:
        self.asked.append((list(messages), sampling))
        yield "seen "
        yield str(len(messages))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(chat, "_speaker", lambda _: recorder)
    return recorder


def test_several_turns(speaker: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("one\n\ntwo\n/what\n/reset\nthree\n/exit\nfour\n"))
    assert main(["chat", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.replace("> ", "").splitlines() if line] == ["seen 2", "seen 4", "seen 2"]
    assert "unknown command '/what'" in err
    assert speaker.asked[1][0][2] == Message("assistant", "seen 2")
    assert speaker.asked[0][1] == {"max_tokens": 9, "temperature": 0.0}


def test_the_end_of_input_ends_it(speaker: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("one\n"))
    assert main(["chat"]) == 0
    assert len(speaker.asked) == 1


def test_a_pipe_is_one_message(
    speaker: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert main(["chat"]) == 0
    assert capsys.readouterr() == ("seen 1\n", "")
    assert speaker.asked[0][0] == [Message("user", "a\nb")]


def test_a_real_model_answers_a_pipe(tiny_folder: Path) -> None:
    done = kvern("chat", str(tiny_folder), "--max-tokens", "5", "--temperature", "0", stdin="hi")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 1


@pytest.mark.parametrize(
    ("argv", "stdin", "error"),
    [
        (["http://127.0.0.1:9"], "hi", "error: nobody answers at http://127.0.0.1:9/v1"),
        (["m", "--url", "http://127.0.0.1:9"], "hi", "error: name a model or a URL, not both"),
        (["m", "--model", "n"], "hi", "error: two models are named"),
        (["--url", "127.0.0.1:9"], "hi", "error: '127.0.0.1:9' is no URL"),
        (["--url", "http://127.0.0.1:9"], " ", "error: there is no message on standard input"),
        (["no-such-model"], "hi", "error: "),
    ],
)
def test_errors(
    argv: list[str], stdin: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    assert main(["chat", *argv]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(error)
