"""`kvern bench engine` and `kvern bench serve`: rows as a table, as JSON, as a chart.

Rows go to stdout; what was measured on, and every case that was left out with the reason, to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvern.errors import BadRequestError, KvernError, NotEnoughMemoryError

if TYPE_CHECKING:
    from kvern.bench.engine import Case
    from kvern.bench.load import RateRow, Target
    from kvern.engine.settings import CacheDtype
    from kvern.model import Model

HELP = "measure the engine in this process, or a server through raw sockets"
EXAMPLES = """\
kvern bench engine coder-0.5b
kvern bench engine ./my-model --prompt 512 --depth 0,4096 --batch 1,8 --stages
kvern bench engine coder-0.5b --json > rows.json
kvern bench serve http://127.0.0.1:8000 --rates 0.5,1,2,4 --png serve.png
"""
ENGINE_EXAMPLES = """\
examples:
  kvern bench engine coder-0.5b --prompt 512,4096 --decode 64 --depth 0,4096,16384 --batch 1,8,16,32
  kvern bench engine ./my-model --batch 1 --stages --png engine.png
"""
SERVE_EXAMPLES = """\
examples:
  kvern bench serve http://127.0.0.1:8000
  kvern bench serve http://127.0.0.1:8000 --rates inf --requests 32    (32 streams at once)
  KVERN_API_KEY=... kvern bench serve https://models.example.org --allow-remote
"""
KEY_VARIABLE = "KVERN_API_KEY"
DTYPES = ("auto", "bf16", "f32")
CACHE_DTYPES = ("auto", "fp8")
BUSY = 1.0
"""Load of the machine, before the measurement, from which its figures are marked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare both commands."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="engine|serve")
    _engine_arguments(_command(commands, "engine", "the engine in this process", ENGINE_EXAMPLES))
    _serve_arguments(_command(commands, "serve", "a server, at given request rates", SERVE_EXAMPLES))


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.png is not None:
        from kvern.bench import charts

        charts.check(args.png)
    return _engine(args) if args.what == "engine" else _serve(args)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_line: str, examples: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help_line,
        description=f"Measure {help_line}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a pulled model's name, or a checkpoint folder")
    parser.add_argument(
        "--prompt", type=_positive, default=[512, 4096], metavar="N,..", help="prompt lengths (512,4096)"
    )
    parser.add_argument("--decode", type=_count, default=64, metavar="N", help="tokens to draw a sequence (64)")
    parser.add_argument(
        "--depth",
        type=_from_zero,
        default=[0, 4096, 16384],
        metavar="N,..",
        help="tokens already in the cache (0,4096,16384)",
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        default=[1, 8, 16, 32],
        metavar="N,..",
        help="sequences that decode together (1,8,16,32)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the activations; auto suits this machine")
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, default="auto", help="of the latent cache")
    parser.add_argument("--unpacked", action="store_true", help="run the layers from the checkpoint's own files")
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="threads to compute with (default: every usable core)"
    )
    parser.add_argument(
        "--stages", action="store_true", help="seconds a step in each part of it, from a pass of its own"
    )
    _output_arguments(parser)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="an OpenAI-compatible server")
    parser.add_argument("--model", metavar="NAME", help="the model to ask for (default: the first that it lists)")
    parser.add_argument(
        "--rates",
        type=_rates,
        default=[0.5, 1.0, 2.0, 4.0],
        metavar="R,..",
        help="requests a second (0.5,1,2,4); inf: all at once",
    )
    parser.add_argument("--requests", type=_count, default=32, metavar="N", help="requests at each rate (32)")
    parser.add_argument(
        "--prompt-tokens", type=_count, default=256, metavar="N", help="length of a prompt, about (256)"
    )
    parser.add_argument("--max-tokens", type=_count, default=64, metavar="N", help="longest answer (64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of arrivals and prompts (0)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds until an answer counts as lost (600)"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="answers of full length (Kvern, vLLM)")
    parser.add_argument("--allow-remote", action="store_true", help="the URL may be another machine's")
    _output_arguments(parser)


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON array")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw a chart as well (pip install 'kvern[bench]')")


def _engine(args: argparse.Namespace) -> int:
    from kvern.bench import charts, tables
    from kvern.bench import engine as bench
    from kvern.ops import library
    from kvern.plan.hardware import machine

    with _quiet_machine():
        model = _load(args)
        todo = list(_possible(bench.cases(args.prompt, args.decode, args.depth, args.batch), model, args.cache_dtype))
        read = bench.read_gb_s()
        title = (
            f"{args.model}, {machine().cpu}, kernels {library.isa() or 'none'}, {library.threads()} threads, "
            f"{str(model.activation_dtype).removeprefix('torch.')} activations, "
            f"{'FP8 cache, ' if args.cache_dtype == 'fp8' else ''}read {read:.1f} GB/s"
        )
        _say(title)
        rows = []
        for row in bench.measure(model, todo, read, cache_dtype=args.cache_dtype, stages=args.stages):
            rows.append(row)
            _say(f"{len(rows)}/{len(todo)}: {todo[len(rows) - 1]}: {row.tokens_per_s:.1f} tokens/s")
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        tables.show(tables.engine_table(rows))
    if args.png is not None:
        charts.engine_chart(rows, title, args.png)
    return 0


def _load(args: argparse.Namespace) -> Model:
    from kvern.checkpoint.progress import progress_bar
    from kvern.engine.threads import use_threads
    from kvern.llm import resolve
    from kvern.llm.opening import open_model

    use_threads(args.threads)
    with progress_bar() as progress:
        return open_model(resolve(args.model, progress), args.dtype, pack=not args.unpacked, progress=progress)


def _possible(cases: list[Case], model: Model, cache_dtype: CacheDtype) -> Iterator[Case]:
    """The cases that can run; the others are named with the reason. Raises when none is left."""
    from kvern.bench.engine import why_not

    left_out = {case: reason for case in cases if (reason := why_not(case, model, cache_dtype)) is not None}
    for case, reason in left_out.items():
        _say(f"left out: {case}: {reason}")
    if len(left_out) == len(cases):
        raise NotEnoughMemoryError("no case can run here", hint="ask for a smaller --depth, --batch or --prompt")
    yield from (case for case in cases if case not in left_out)


def _serve(args: argparse.Namespace) -> int:
    import asyncio

    from kvern.bench import charts, tables
    from kvern.bench.load import find_target
    from kvern.bench.raw_http import Address

    address = Address.of(args.url)
    if not address.is_loopback and not args.allow_remote:
        raise BadRequestError(
            f"{address.host} is not this machine", hint="--allow-remote, if its owner knows that a load test comes"
        )
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def sweep() -> tuple[str, list[RateRow]]:
        target = await find_target(address, args.model, headers, timeout=args.timeout, ignore_eos=args.ignore_eos)
        return target.model, await _sweep(target, args)

    with _quiet_machine():
        name, rows = asyncio.run(sweep())
    if args.json:
        print(json.dumps([_finite(asdict(row)) for row in rows], indent=1))
    else:
        tables.show(tables.serve_table(rows))
    if args.png is not None:
        charts.serve_chart(rows, f"{name} at {address}", args.png)
    if not any(row.complete for row in rows):
        raise KvernError("no request was answered", hint=f"the server's own log tells more; errors: {rows[0].errors}")
    return 0


async def _sweep(target: Target, args: argparse.Namespace) -> list[RateRow]:
    from kvern.bench.load import arrivals, measure_prompts, prompts, run_rate, summarise

    ruler = await measure_prompts(target)
    texts, rows = prompts(ruler.words(args.prompt_tokens), args.seed), []
    for rate in args.rates:
        answers = await run_rate(target, arrivals(rate, args.requests, args.seed), texts, args.max_tokens)
        rows.append(summarise(rate, answers))
        failed = f", errors {rows[-1].errors}" if rows[-1].errors else ""
        _say(f"{rate:g} requests/s: {rows[-1].complete} of {len(answers)} complete in {rows[-1].seconds:.1f} s{failed}")
    return rows


@contextmanager
def _quiet_machine() -> Iterator[None]:
    """Say so when other work ran beside the measurement."""
    before = os.getloadavg()[0]
    yield
    if before > BUSY:
        _say(f"DISTURBED: the machine's load was {before:.1f} before the measurement")


def _finite(row: dict[str, object]) -> dict[str, object]:
    """JSON has no infinity: the rate "all at once" becomes null."""
    return {**row, "rate": None} if row["rate"] == float("inf") else row


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _from_zero(text: str) -> list[int]:
    return [_number(part, least=0) for part in text.split(",")]


def _positive(text: str) -> list[int]:
    return [_number(part, least=1) for part in text.split(",")]


def _count(text: str) -> int:
    return _number(text, least=1)


def _number(text: str, least: int) -> int:
    if not (text.strip().isascii() and text.strip().isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(rate > 0 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} are no positive rates")
    return rates
