"""torch's threads in small and in large steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvern.engine.threads import threads_for
from kvern.ops import native


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(native, "library", object)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "context", "threads"), [(1, 100, 1), (16, 4096, 1), (17, 17, 2), (1, 100_000, 2)])
def test_small_steps_run_torch_on_one_thread(rows: int, context: int, threads: int) -> None:
    with threads_for(rows, context):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="in the step"), threads_for(1, 1):
        raise ValueError("in the step")
    assert torch.get_num_threads() == 2


def test_without_kernels_torch_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with threads_for(1, 1):
        assert torch.get_num_threads() == 2
