"""How many threads compute, on which cores, and how many of them torch gets in a step: one where the native kernels
compute the products, else all.

The kernels have their own pool, which shares the cores politely. torch's OpenMP workers do not: between two small ops
they spin, on the cores that the kernels (and a server's event loop) want. Decoding coder-0.5b beside one busy process
on two cores ran at 1.0 tokens/s with two torch threads and at 9.3 with one. What it gives up: the small ops of such a
step run on one core.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from kvern.errors import ConfigError
from kvern.ops import library
from kvern.plan.hardware import default_threads


def use_threads(count: int | None) -> None:
    """Compute with `count` threads, the kernels' and torch's; None: what affinity, cgroups and OMP_NUM_THREADS allow.

    torch knows nothing of a cgroup's quota, so None also cuts its threads; it never raises them. Raises ConfigError.
    """
    if count is not None and not 1 <= count <= 1024:
        raise ConfigError(f"{count} threads are not possible", hint="give a number from 1 to 1024", param="threads")
    if count is not None:
        library.set_threads(count)
    torch.set_num_threads(count or min(torch.get_num_threads(), default_threads()))


def pin_workers(cores: Sequence[int]) -> int:
    """Keep each worker of the kernels' pool on a core of its own; returns how many were pinned.

    Worker i gets cores[i]. The first core stays without one: the thread that calls the kernels computes as well, and
    the system finds it the core that is free. Holds until the number of threads changes. Raises ConfigError where the
    system has no such call or refuses it.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("threads cannot be pinned on this system", param="pin_threads")
    library.start_workers()
    pinned = 0
    for thread, number in _workers():
        if number < len(cores):
            try:
                os.sched_setaffinity(thread, {cores[number]})
            except OSError as error:
                raise ConfigError(
                    f"core {cores[number]} cannot be used: {error.strerror}", param="pin_threads"
                ) from error
            pinned += 1
    return pinned


def _workers() -> Iterator[tuple[int, int]]:
    """(thread id, number) of the pool's workers, by the names that they give themselves."""
    for folder in Path("/proc/self/task").iterdir():
        try:
            name = (folder / "comm").read_text().strip()
        except OSError:  # ended meanwhile
            continue
        if name.startswith("kvern-") and name.removeprefix("kvern-").isdigit():
            yield int(folder.name), int(name.removeprefix("kvern-"))


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
