"""Real models for tests that are marked `weights`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvern.checkpoint.known_models import find_model
from kvern.checkpoint.local import pulled_path


def pulled(name: str) -> Path:
    """Where the download of a known model lies; skips the test where it is missing."""
    path = pulled_path(find_model(name))
    if path is None:
        pytest.skip(f"{name} is not here: kvern pull {name}")
    return path
