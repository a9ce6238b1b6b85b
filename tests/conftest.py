"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from tests.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `tiny-v3` of a random model: its name is the id under which it is served."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny-v3")


settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
