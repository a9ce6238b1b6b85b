from __future__ import annotations

import pytest

from kvern.server.aliases import Aliases
from kvern.settings import ServeSettings


@pytest.mark.parametrize(
    ("setting", "name", "meant"),
    [
        ("claude-*", "claude-opus-4-5", "served"),
        ("claude-*", "claude", "claude"),
        ("claude-*", "served", "served"),
        ("", "gpt-4", "gpt-4"),
        ("gpt-4=other, gpt-*", "gpt-4", "other"),
        ("gpt-4=other, gpt-*", "gpt-5", "served"),
        ("*=other", "served", "served"),
        ("a=served", "A", "A"),
    ],
)
def test_the_first_pattern_that_fits_counts(setting: str, name: str, meant: str) -> None:
    assert ServeSettings(model_alias=setting).model_alias == setting
    assert Aliases(setting).resolve(name, "served") == meant
