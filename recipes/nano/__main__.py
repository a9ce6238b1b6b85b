"""`python -m recipes.nano COMMAND`: see each command's --help."""

from __future__ import annotations

import argparse
from pathlib import Path

OUT = Path("build/nano")


def main() -> None:
    """Run one step of the recipe."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="make corpus, tokenizer and rows")
    data.add_argument("--out", type=Path, default=OUT, help="folder (default: %(default)s)")
    data.add_argument("--docs", type=Path, help="html/_sources of Python's documentation (default: Debian's package)")
    data.add_argument("--no-tests", action="store_true", help="leave out the library's own tests")
    args = parser.parse_args()
    if args.command == "data":
        from recipes.nano.build import build

        build(args.out, docs_folder=args.docs, tests=not args.no_tests)


if __name__ == "__main__":
    main()
