"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tests.tiny import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `tiny-v3` of a random model: its name is the id under which it is served."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny-v3")


@pytest.fixture(scope="session", autouse=True)
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that are given no store keep theirs in a folder of this run."""
    before, os.environ["XDG_DATA_HOME"] = os.environ.get("XDG_DATA_HOME"), str(tmp_path_factory.mktemp("data"))
    yield
    if before is None:
        del os.environ["XDG_DATA_HOME"]
    else:
        os.environ["XDG_DATA_HOME"] = before


settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
