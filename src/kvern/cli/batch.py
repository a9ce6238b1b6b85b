"""`kvern batch run`: all requests of a file, answered by a model in this process or by any server.

The input is what OpenAI's Batch API takes. Each answer is on the disk before it counts, so the command may be stopped
in any way, and goes on where it was when it is called again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import TYPE_CHECKING

from kvern.errors import BadRequestError, KvernError

if TYPE_CHECKING:
    from kvern.jobs.asking import Ask
    from kvern.jobs.batch import Model
    from kvern.store import Store
    from kvern.store.batches import Batch

HELP = "Answer every request of a JSONL file, as OpenAI's batches do; called again, it goes on where it stopped."
EXAMPLES = """\
kvern batch run in.jsonl out.jsonl                        with the model that the first line names, in this process
kvern batch run in.jsonl out.jsonl --model ./my-model --threads 8
kvern batch run in.jsonl out.jsonl --url http://gpu-box:8000 --parallel 64
"""
KEY_VARIABLE = "KVERN_API_KEY"
DEFAULT_PARALLEL = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("action", choices=["run"], help="what to do")
    parser.add_argument("source", metavar="IN", type=Path, help="requests, one a line")
    parser.add_argument("target", metavar="OUT", type=Path, help="answers, in the order of the requests")
    parser.add_argument("--url", help=f"the server to ask; its key, if any, in {KEY_VARIABLE}")
    parser.add_argument("--model", help="the model to load (default: the one that the first line names)")
    parser.add_argument(
        "--dtype", choices=["auto", "bf16", "f32"], help="weights in memory (default: auto, what suits this machine)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: every usable core)")
    parser.add_argument(
        "--max-context", type=int, metavar="N", help="tokens of prompt and answer (default: the model's)"
    )
    parser.add_argument(
        "--parallel", type=int, metavar="N", default=DEFAULT_PARALLEL, help="requests in flight (default: %(default)s)"
    )
    parser.add_argument(
        "--store",
        metavar="PATH",
        help="keep the work here, also afterwards, so that later runs find equal requests (default: OUT.progress)",
    )


def run(args: argparse.Namespace) -> int:
    """Work until the output is whole. 0: every request has an answer; 1: some have an error instead."""
    from kvern.jobs.batch_file import BatchInputError, enter, first_line, progress_path, remove_store, write_output
    from kvern.store import Store

    endpoint, named = first_line(args.source)
    _check(args, named)
    store = Store(args.store or progress_path(args.target))
    with closing(store):
        if (release := store.claim(f"batch run {args.target.absolute()}")) is None:
            raise KvernError(f"another process works on {args.target} already")
        finished = False
        try:
            batch = enter(store, args.source, args.target, endpoint)
            done = asyncio.run(_work(args, args.model or named or "", store, batch))
            write_output(store, done, args.target)
            finished = True
        except BatchInputError:  # nothing was begun
            finished = True
            raise
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            raise
        finally:
            if finished and args.store is None:
                remove_store(store)
            release()
    print(_summary(done, args.target), file=sys.stderr)
    return 1 if done.failed else 0


def _check(args: argparse.Namespace, named: str | None) -> None:
    if args.parallel < 1:
        raise BadRequestError("--parallel must be at least 1")
    if not args.target.absolute().parent.is_dir():
        raise BadRequestError(f"there is no folder {args.target.absolute().parent}")
    if args.url and (args.model or args.dtype or args.threads or args.max_context):
        raise BadRequestError(
            "--model, --dtype, --threads and --max-context go with a model in this process, not with --url"
        )
    if not args.url and not args.model and not named:
        raise BadRequestError("the first line names no model", hint="--model NAME")


async def _work(args: argparse.Namespace, name: str, store: Store, batch: Batch) -> Batch:
    from kvern.cli.counting import count_bar
    from kvern.jobs.batch import BatchRunner
    from kvern.jobs.batch_file import LINE_BYTES, LINES, work
    from kvern.jobs.batch_input import Limits

    if batch.status == "completed":
        return batch
    if batch.total:
        print(f"going on: {batch.completed + batch.failed} of {batch.total} rows are done", file=sys.stderr)
    try:
        async with _asking(args, name, store) as (model, ask):
            limits = Limits(LINES, LINE_BYTES)
            runner = BatchRunner(store, model, ask, limits=limits, parallel=args.parallel, poll=0.25)
            with count_bar("rows") as count:
                return await work(runner, store, batch, lambda now: count(now.completed + now.failed, now.total))
    except BaseExceptionGroup as group:  # of the tasks that ask
        raise _first(group) from group


@asynccontextmanager
async def _asking(args: argparse.Namespace, name: str, store: Store) -> AsyncIterator[tuple[Model, Ask]]:
    """Who answers, and how to ask."""
    from kvern.jobs.batch import Model
    from kvern.jobs.batch_file import MODEL

    if args.url:
        from kvern.jobs.http_asking import HttpAsk

        async with HttpAsk(args.url, api_key=os.environ.get(KEY_VARIABLE), parallel=args.parallel) as asked:
            yield Model(MODEL, asked.url, lambda _: True), asked
        return
    from kvern.checkpoint.progress import progress_bar
    from kvern.llm import LLM, resolve
    from kvern.server.batching import offline

    with progress_bar() as progress:
        resolve(name, progress)

    def load() -> LLM:
        return LLM(name, dtype=args.dtype or "auto", threads=args.threads, max_context=args.max_context)

    async with offline(load, store) as (model, ask):
        yield Model(MODEL, model.revision, model.serves), ask


def _first(group: BaseExceptionGroup) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _summary(batch: Batch, target: Path) -> str:
    reused = f", {batch.reused} of them known already" if batch.reused else ""
    return (
        f"{target}: {batch.completed} answered{reused}, {batch.failed} failed; {batch.input_tokens} tokens in "
        f"({batch.cached_tokens} cached), {batch.output_tokens} out"
    )
