"""How far a command is that works through rows: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def count_bar(noun: str) -> Iterator[Callable[[int, int], None]]:
    """What to call with how many are done, and how many there are (0: not known yet)."""
    if not sys.stderr.isatty():
        yield _Lines(noun)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(noun), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


class _Lines:
    """A line every few seconds, and the last."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._next = time.monotonic() + SECONDS_BETWEEN_LINES

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if total and (now >= self._next or done == total):
            self._next = float("inf") if done == total else now + SECONDS_BETWEEN_LINES
            print(f"{self._noun}: {done} of {total} ({100 * done // total} %)", file=sys.stderr, flush=True)
