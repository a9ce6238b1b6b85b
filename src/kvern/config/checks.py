"""Checks of single JSON values, with the key in the message."""

from __future__ import annotations

from typing import Any

from kvern.errors import ConfigError


def is_whole(value: Any) -> bool:
    """Whether a JSON value is a whole number (true and false are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def positive(key: str, value: Any, zero: bool = False) -> float:
    """`value` as a float, finite and positive (or 0 where `zero` allows it)."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not 0 <= value < 1e300 or (value == 0 and not zero):
        raise ConfigError(f"{key} must be a positive number, not {value!r}")
    return float(value)
