"""Progress: a bar on a terminal, lines elsewhere, never on stdout."""

from __future__ import annotations

import sys
import time

import pytest

from kvern.checkpoint.progress import progress_bar, readable_bytes


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar() as progress:
        progress(500, 1000, "model.norm.weight")
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.norm.weight" in err
    assert "0.5/1.0 kB" in err


def test_a_file_gets_the_first_and_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        for done in range(0, 1001, 100):
            progress(done, 1000, f"tensor {done}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["tensor 0: 0 B of 1.0 kB (0 %)", "tensor 1000: 1.0 kB of 1.0 kB (100 %)"]


@pytest.mark.parametrize("terminal", [True, False])
def test_work_that_is_soon_done_stays_silent(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar(after=1.0) as progress:
        progress(1000, 1000, "early")
    assert capsys.readouterr() == ("", "")
    with progress_bar(after=1.0) as progress:
        progress(100, 1000, "early")
        now[0] += 1.5
        progress(500, 1000, "late")
    _, err = capsys.readouterr()
    assert "late" in err
    assert "early" not in err


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (491_400_064, "491.4 MB"), (1_117_320_768, "1.12 GB"), (688_574_839_360, "688.57 GB")],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text
