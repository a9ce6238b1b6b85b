"""Progress: a bar on a terminal, lines elsewhere, never on stdout."""

from __future__ import annotations

import sys

import pytest

from kvern.cli.progress import progress_bar, readable_bytes


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


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (491_400_064, "491.4 MB"), (1_117_320_768, "1.12 GB"), (688_574_839_360, "688.57 GB")],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert readable_bytes(count) == text
