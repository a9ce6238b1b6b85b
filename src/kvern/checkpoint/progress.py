"""How work on a checkpoint is shown: a bar on a terminal, a plain line every few seconds elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvern.checkpoint.save import Progress

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress_bar(after: float = 0.0) -> Iterator[Progress]:
    """What to call with bytes done, bytes in all, and what is being worked on.

    Calls in the first `after` seconds show nothing, so that work which is done by then stays silent.
    """
    with ExitStack() as stack:
        begin = time.monotonic() + after
        shown: list[Progress] = []

        def show(done: int, total: int, tensor: str) -> None:
            if not shown:
                if time.monotonic() < begin:
                    return
                shown.append(stack.enter_context(_bar()) if sys.stderr.isatty() else _Lines())
            shown[0](done, total, tensor)

        yield show


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, tensor: str) -> None:
            bar.update(task, completed=done, total=total, description=tensor)

        yield show


class _Lines:
    """Progress as lines: the first call, then one every few seconds, then the last."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, done: int, total: int, tensor: str) -> None:
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        percent = 100 * done // total if total else 100
        sys.stderr.write(f"{tensor}: {readable_bytes(done)} of {readable_bytes(total)} ({percent} %)\n")
        sys.stderr.flush()


def readable_bytes(count: int) -> str:
    """491400064 -> 491.4 MB, 1117320768 -> 1.12 GB (decimal, as disks and downloads are sold)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} B" if unit == "B" else f"{size:.{2 if unit == 'GB' else 1}f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
