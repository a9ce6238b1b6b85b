"""How many threads torch gets in a step: one where the native kernels compute the products, else all.

The kernels have their own pool, which shares the cores politely. torch's OpenMP workers do not: between two small ops
they spin, on the cores that the kernels (and a server's event loop) want. Decoding coder-0.5b beside one busy process
on two cores ran at 1.0 tokens/s with two torch threads and at 9.3 with one. What it gives up: the small ops of such a
step run on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads_for(rows: int, kernel_rows: int) -> Iterator[None]:
    """Set torch's threads for a step of `rows` tokens, of which the kernels take up to `kernel_rows`; then restore."""
    before = torch.get_num_threads()
    if before == 1 or rows > kernel_rows:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
