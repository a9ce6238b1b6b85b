"""Packs checkpoints in forked processes, to be run by test_packed.py: killed at a point each, or all at once.

    kill POINT=FOLDER ..    POINT: a number of parts written, or "hashed" (the second section), "fsync" (before it),
                            "synced", "renamed"
    race FOLDER COUNT       each child ends with 1 if it wrote the file, with 0 if it found it

Writes what waitpid says of each child.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from kvern.checkpoint import packed as packed_file
from kvern.checkpoint.load import load
from kvern.ops import packed


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(function: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
    def both(*args: Any) -> Any:
        result = function(*args)
        then(*args)
        return result

    return both


def killed_at(point: str, folder: Path) -> int:
    if point == "fsync":
        patch = mock.patch.object(os, "fsync", die)
    elif point == "synced":
        patch = mock.patch.object(os, "fsync", after(os.fsync, die))
    elif point == "hashed":
        packed_file.SECTION = 4096
        sections: list[Any] = []

        def hashed(section: Any) -> None:
            sections.append(section)
            if len(sections) == 2:
                die()

        patch = mock.patch.object(packed, "content_hash", after(packed.content_hash, hashed))
    elif point == "renamed":
        patch = mock.patch.object(Path, "replace", after(Path.replace, die))
    else:
        left = [int(point)]

        def count(writer: Any, tensor: Any) -> None:
            writer.stream.flush()
            left[0] -= 1
            if left[0] <= 0:
                die()

        patch = mock.patch.object(packed_file._Writer, "_put", after(packed_file._Writer._put, count))
    with patch:
        packed_file.packed_transformer(load(folder), folder)
    return 0


def race(folder: Path) -> int:
    wrote = []

    def linger(*_: object) -> None:
        wrote.append(folder)
        time.sleep(0.3)

    with mock.patch.object(packed_file, "_write", after(packed_file._write, linger)):
        packed_file.packed_transformer(load(folder), folder)
    return len(wrote)


def forked(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work())
        finally:
            os._exit(99)
    return pid


def report(pid: int) -> None:
    sys.stdout.write(f"{os.waitpid(pid, 0)[1]}\n")


def main(mode: str, *arguments: str) -> None:
    if mode == "kill":
        for argument in arguments:
            point, _, folder = argument.partition("=")
            report(forked(partial(killed_at, point, Path(folder))))
    else:
        folder, count = arguments
        for pid in [forked(partial(race, Path(folder))) for _ in range(int(count))]:
            report(pid)


if __name__ == "__main__":
    main(*sys.argv[1:])
