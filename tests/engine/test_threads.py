"""torch's threads in steps that the kernels compute and in others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvern.engine.threads import threads_for


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "kernel_rows", "threads"), [(1, 64, 1), (64, 64, 1), (65, 64, 2), (1, 0, 2)])
def test_torch_gets_one_thread_where_the_kernels_compute(rows: int, kernel_rows: int, threads: int) -> None:
    with threads_for(rows, kernel_rows):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="in the step"), threads_for(1, 64):
        raise ValueError("in the step")
    assert torch.get_num_threads() == 2
