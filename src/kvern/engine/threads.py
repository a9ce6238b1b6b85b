"""How many threads torch gets in a step: one beside the native kernels when the step is small, else all.

The kernels have their own pool, which shares the cores politely. torch's OpenMP workers do not: between two small ops
they spin, on the cores that the kernels (and a server's event loop) want. Decoding coder-0.5b beside one busy process
on two cores ran at 1.0 tokens/s with two torch threads and at 9.3 with one. What it gives up: attention over a context
up to `LONG` runs on one core; past that, torch's threads are worth their price.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvern.ops import native

FEW_ROWS = 16
LONG = 1 << 16
"""Rows times context from which attention is worth several threads."""


@contextmanager
def threads_for(rows: int, context: int) -> Iterator[None]:
    """Set torch's threads for a step of `rows` tokens whose longest context is `context`; restores them after."""
    before = torch.get_num_threads()
    if before == 1 or native.library() is None or rows > FEW_ROWS or rows * context > LONG:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
