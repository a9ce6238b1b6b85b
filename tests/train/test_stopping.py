"""What a signal does to a run before its first step, and what a second one does."""

from __future__ import annotations

import signal

import pytest

from kvern.train import stopping
from kvern.train.stopping import SIGNALS, Stopping


def interrupt(number: signal.Signals) -> None:
    with Stopping() as heard:
        heard.at_once()
        signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_steps_it_ends_the_run_at_once(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(SystemExit) as ended:
        interrupt(number)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name} at once; --resume auto goes on\n"
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_between_steps_it_waits_and_so_does_its_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping, "monotonic", lambda: now)
    with Stopping() as heard:
        heard.at_once()
        heard.after_step()
        signal.raise_signal(signal.SIGTERM)
        now += stopping.SAME - 0.1
        signal.raise_signal(signal.SIGINT)
        assert heard.signal == signal.SIGTERM


def test_a_later_second_one_acts_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([100.0, 100.0 + stopping.SAME])
    monkeypatch.setattr(stopping, "monotonic", lambda: next(times))
    with pytest.raises(SystemExit) as ended:
        interrupt_twice()
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at once" in capsys.readouterr().err


def interrupt_twice() -> None:
    with Stopping() as heard:
        heard.after_step()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_other_errors_pass_and_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="mine"):
        fail_after_a_signal()
    assert capsys.readouterr().err == ""


def fail_after_a_signal() -> None:
    with Stopping() as heard:
        heard.after_step()
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("mine")
