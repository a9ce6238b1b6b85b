"""The steps of kvern-nano, in their order: data, train, then `kvern train export`, measure, bundle."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kvern.errors import KvernError

OUT = Path("build/nano")
CONFIG = Path("configs/nano.toml")


def main() -> int:
    """Run one step of the recipe."""
    args = _parser().parse_args()
    try:
        code: int = {"data": _data, "shape": _shape, "train": _train, "measure": _measure, "bundle": _bundle}[
            args.command
        ](args)
    except KvernError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.nano", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="make corpus, tokenizer and rows")
    data.add_argument("--out", type=Path, default=OUT, help="folder (default: %(default)s)")
    data.add_argument("--docs", type=Path, help="html/_sources of Python's documentation (default: Debian's package)")
    data.add_argument("--no-tests", action="store_true", help="leave out the library's own tests")
    commands.add_parser("shape", help="parameters and bytes of nano and of the dense models beside it")
    train = commands.add_parser("train", help="train nano, or a dense model on the same rows")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--dense", choices=("active", "total"), help="a dense model with as many parameters")
    train.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    train.add_argument("--resume", choices=("auto",), help="go on where it stopped")
    measure = commands.add_parser("measure", help="bits per byte, tasks, drafts and samples of a checkpoint folder")
    measure.add_argument("folder", type=Path)
    measure.add_argument("--data", type=Path, default=OUT, help="what `data` made (default: %(default)s)")
    measure.add_argument("--count", type=int, default=50, help="questions a task (default: %(default)s)")
    measure.add_argument("--pairs", type=int, default=3, help="pairs of runs with drafts off and on")
    measure.add_argument("--json", type=Path, help="write the figures there, too")
    bundle = commands.add_parser("bundle", help="put an exported checkpoint into the package")
    bundle.add_argument("folder", type=Path)
    return parser


def _data(args: argparse.Namespace) -> int:
    from recipes.nano.build import build

    build(args.out, docs_folder=args.docs, tests=not args.no_tests)
    return 0


def _shape(args: argparse.Namespace) -> int:
    import tomllib

    from recipes.nano.shapes import dense, weigh

    model = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["model"]
    shapes = {"nano": model, "dense, active": dense(model, "active"), "dense, total": dense(model, "total")}
    for name, table in shapes.items():
        weight = weigh(table)
        print(
            f"{name:14} {weight.total:11,} parameters, {weight.active:10,} active, {weight.with_mtp:11,} with MTP, "
            f"{weight.checkpoint_bytes:11,} bytes in FP8"
        )
    return 0


def _train(args: argparse.Namespace) -> int:
    from recipes.nano.train import train

    return train(args.out, like=args.dense, overrides=args.overrides, resume=args.resume is not None).exit_code


def _measure(args: argparse.Namespace) -> int:
    from recipes.nano.measure import as_markdown, measure

    figures = measure(args.folder, args.data, pairs=args.pairs, count=args.count)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(as_markdown(figures))
    return 0


def _bundle(args: argparse.Namespace) -> int:
    from recipes.nano.bundle import bundle

    print(bundle(args.folder, CONFIG))
    return 0


if __name__ == "__main__":
    sys.exit(main())
