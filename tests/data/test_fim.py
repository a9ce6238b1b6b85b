"""Texts are cut at characters, as often as the rate says, and always in the same way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvern.data import fim

TEXTS = [f"def f{number}(x):\n    return x + {number}\n" for number in range(4000)]


@given(text=st.text(min_size=1))
def test_the_parts_are_the_text(text: str) -> None:
    cut = fim.cut(text, 1.0)
    assert cut is not None
    assert "".join(cut) == text
    assert cut == fim.cut(text, 1.0)
    assert fim.cut(text, 0.0) is None


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate(rate: float) -> None:
    share = sum(fim.cut(text, rate) is not None for text in TEXTS) / len(TEXTS)
    assert share == pytest.approx(rate, abs=0.02)


def test_cuts_are_anywhere() -> None:
    cuts = [cut for text in TEXTS if (cut := fim.cut(text, 1.0)) is not None]
    for part in range(3):  # two points, evenly drawn: each part has a third on average
        mean = sum(len(cut[part]) / len("".join(cut)) for cut in cuts) / len(cuts)
        assert mean == pytest.approx(1 / 3, abs=0.02)
    assert any(not prefix for prefix, _, _ in cuts)
    assert any(not suffix for _, _, suffix in cuts)


def test_cuts_are_the_same_for_ever() -> None:
    """Token files depend on them: change them only with `kvern.data.build.MEANING`."""
    assert [number for number, text in enumerate(TEXTS[:60]) if fim.cut(text, 0.1)] == [26, 41, 58]
    assert fim.cut("héllo wörld", 1.0) == ("héllo ", "wörld", "")
