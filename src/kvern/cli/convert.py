"""`kvern convert`: a checkpoint, a Hugging Face folder or a GGUF file becomes a V3 checkpoint in another folder."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvern.checkpoint.progress import progress_bar, readable_bytes
from kvern.errors import NotFoundError

if TYPE_CHECKING:
    from kvern.checkpoint.convert import Conversion

HELP = "convert a checkpoint between FP8, 4-bit, BF16 and F32, or import a Llama or Qwen2 model"
EXAMPLES = """\
kvern convert DeepSeek-V3 DeepSeek-V3-BF16 --dtype bf16
kvern convert Qwen2.5-Coder-7B-Instruct coder-7b --dtype fp8
kvern convert Moonlight-16B-A3B moonlight-int4 --dtype int4 --group-size 128
kvern convert model.Q4_K_M.gguf my-model --dtype bf16
kvern convert coder-0.5b coder-0.5b-fp8 --dtype fp8        (a model that `kvern pull` fetched)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("source", metavar="SRC", help="folder, .gguf file, or the name of a pulled model")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write; it resumes if interrupted")
    parser.add_argument(
        "--dtype", choices=["fp8", "bf16", "f32", "int4"], help="storage of the weights (default: as they are)"
    )
    parser.add_argument("--head-fp8", action="store_true", help="the head in FP8 too (the official layout keeps BF16)")
    parser.add_argument(
        "--group-size", type=int, choices=[32, 128], help="columns that share a scale with int4 (default: 32)"
    )
    parser.add_argument("--ue8m0", action="store_true", help="new scales are powers of two, as in DeepSeek-V3.1")
    parser.add_argument("--force", action="store_true", help="start again instead of resuming in DST")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was written and what an import costs. Returns the exit code."""
    from kvern.checkpoint.convert import convert

    started = time.monotonic()
    with progress_bar() as progress:
        done = convert(
            _source(args.source),
            args.destination,
            dtype=args.dtype,
            head_fp8=args.head_fp8,
            ue8m0=args.ue8m0,
            group_size=args.group_size,
            progress=progress,
            force=args.force,
        )
    for line in summary(done, args.destination, time.monotonic() - started):
        print(line)
    return 0


def summary(done: Conversion, destination: Path, seconds: float) -> Iterator[str]:
    """What a person wants to know afterwards."""
    tensors = sum(len(shard) for shard in done.shards)
    files = "1 file" if len(done.shards) == 1 else f"{len(done.shards)} files"
    yield f"{destination}: {tensors:,} tensors, {readable_bytes(done.nbytes)} in {files}, {seconds:.1f} s"
    if done.cost is not None:
        yield "cost of the import      source        as V3"
        imported, source = readable_bytes(done.cost.imported_bytes), readable_bytes(done.cost.source_bytes)
        yield f"  read for a token  {source:>10}   {imported:>10}   {done.cost.ratio:.2f}x (BF16)"


def _source(source: str) -> Path:
    """A path that exists, or else what `kvern pull` keeps under that name."""
    path = Path(source)
    if path.exists():
        return path
    from kvern.checkpoint.bundled import BUNDLED, bundled_folder
    from kvern.checkpoint.known_models import KNOWN
    from kvern.checkpoint.local import pulled_path

    if source in BUNDLED:
        return bundled_folder(source)
    if source not in KNOWN:
        return path
    pulled = pulled_path(KNOWN[source])
    if pulled is None:
        raise NotFoundError(f"{source} has not been pulled", hint=f"run `kvern pull {source}`")
    return pulled
