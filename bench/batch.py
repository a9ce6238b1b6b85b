"""Batches of coder-0.5b: requests that come and go in Kvern against transformers' static batch, same weights and dtype.

    python -m bench.batch [--dtype bf16|f32|auto] [--requests 48] [--pairs 5] [--json]

Every figure is generated tokens over all the time, prompts included. Kvern and transformers run in alternating pairs:

- `16 come and go`: 16 places; when an answer ends, the next request takes its place, until none is left to come (how
  the places empty after that is not timed). Lengths are random, seeded, the same in every run. transformers computes
  what a static batch is best at: 16 prompts of the mean length, all answers of the mean length, so that no place is
  ever idle or padded. Bar: 0.9.
- `the same requests`: from the first to the very last answer; transformers gets them in static batches of 16 in order,
  padded on the left, each batch as long as its longest answer. No bar: that is what mixed lengths do to static batches.
- `single stream`: one request at a time on both sides. Bar: 1.0.
- `warm prefix`: Kvern's time to first token of a 4096-token prompt over the time when all but its last block was
  computed before. Bar: below 10 % of the cold time.

Both sides use greedy decoding, all cores, and the logits of the last token only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median

import torch
from bench.transformers_peer import Static, Work, load_qwen2

from kvern.checkpoint.local import ensure_imported
from kvern.engine import Engine, EngineSettings, SamplingParams
from kvern.llm.opening import Dtype, open_model
from kvern.ops import library
from kvern.plan.hardware import default_threads, machine

MODEL = "coder-0.5b"
PLACES = 16
PROMPT = (16, 128)
ANSWER = (16, 112)
PREFIX = 4096
IDS = 150_000
"""Random prompts use ids below this, all of them in the tokenizer's range."""

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
BARS = {"16 come and go": 0.9, "single stream": 1.0}
WARM_BAR = 0.1


@dataclass(frozen=True)
class Row:
    """Medians of alternating pairs, in tokens a second, and of the pairs' ratios. bar None: a figure without one."""

    case: str
    kvern: float
    transformers: float
    ratio: float
    bar: float | None
    pairs: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class WarmRow:
    """Seconds to the first token of the same 4096 tokens, cold and warm: medians."""

    cold: float
    warm: float
    share: float
    runs: tuple[tuple[float, float], ...]


def requests(count: int, lengths: int, ids: int) -> list[Work]:
    """Requests of random lengths; both arguments are seeds."""
    random_, contents = random.Random(lengths), random.Random(ids)
    return [Work(_ids(contents, random_.randint(*PROMPT)), random_.randint(*ANSWER)) for _ in range(count)]


def even(work: Sequence[Work], count: int, seed: int) -> list[Work]:
    """`count` requests that all have the mean lengths of `work`."""
    random_ = random.Random(seed)
    prompt, tokens = round(mean(len(one.prompt) for one in work)), round(mean(one.tokens for one in work))
    return [Work(_ids(random_, prompt), tokens) for _ in range(count)]


def come_and_go(engine: Engine, work: Sequence[Work], places: int, *, to_the_end: bool = False) -> float:
    """Tokens/s with `places` requests running as long as there is another to come. The engine must be idle.

    `to_the_end`: until the last answer is complete, with fewer and fewer of them.
    """
    left = list(reversed(work))
    for _ in range(places):
        _add(engine, left.pop())
    assert len(work) >= places, "the places are never all taken"
    running, drawn = places, 0
    start = time.perf_counter()
    while running == places or (to_the_end and running):
        for update in engine.step():
            drawn += len(update.tokens)
            if update.finish is not None and left:
                _add(engine, left.pop())
            elif update.finish is not None:
                running -= 1
    seconds = time.perf_counter() - start
    while engine.has_work():
        engine.step()
    return drawn / seconds


def one_by_one(engine: Engine, work: Sequence[Work]) -> float:
    """Tokens/s, each request alone."""
    start = time.perf_counter()
    for one in work:
        _add(engine, one)
        while engine.has_work():
            engine.step()
    return sum(one.tokens for one in work) / (time.perf_counter() - start)


def first_token(engine: Engine, prompt: Sequence[int]) -> float:
    """Seconds from the request to its first token."""
    start = time.perf_counter()
    engine.add(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    while engine.has_work():
        engine.step()
    return time.perf_counter() - start


def kvern_engine(dtype: Dtype) -> Engine:
    """The engine on the imported checkpoint, which holds BF16 weights, as `kvern serve --dtype` runs it."""
    model = open_model(ensure_imported(MODEL), dtype)
    return Engine(model, settings=EngineSettings(max_running=PLACES, cache_tokens=3 * PREFIX))


def compare(case: str, ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> Row:
    """Alternate the two, after one run of each that does not count."""
    ours()
    theirs()
    results = tuple((ours(), theirs()) for _ in range(pairs))
    left, right = (median(column) for column in zip(*results, strict=True))
    return Row(case, left, right, median(a / b for a, b in results), BARS.get(case), results)


def compare_prefix(engine: Engine, pairs: int, tokens: int = PREFIX) -> WarmRow:
    """Cold and warm time to first token, a new prompt each time."""
    random_, runs = random.Random(1), []
    for _ in range(pairs):
        prompt = _ids(random_, tokens)
        runs.append((first_token(engine, prompt), first_token(engine, prompt)))
    cold, warm = (median(column) for column in zip(*runs, strict=True))
    return WarmRow(cold, warm, median(b / a for a, b in runs), tuple(runs))


def measure(engine: Engine, other: Static, count: int, pairs: int, seed: int) -> tuple[list[Row], WarmRow]:
    """All cases. Prompts differ from run to run, so the prefix cache never helps where it is not asked to."""
    ids = iter(range(seed + 1, sys.maxsize))
    plan = even(requests(count, seed, seed), PLACES, seed)
    rows = [
        compare(
            "16 come and go",
            lambda: come_and_go(engine, requests(count, seed, next(ids)), PLACES),
            lambda: other.run(plan),
            pairs,
        ),
        compare(
            "the same requests",
            lambda: come_and_go(engine, requests(count, seed, next(ids)), PLACES, to_the_end=True),
            lambda: other.run_all(requests(count, seed, seed), PLACES),
            max(1, pairs // 2),
        ),
        compare(
            "single stream",
            lambda: one_by_one(engine, even(plan, 1, next(ids))),
            lambda: other.run(even(plan, 1, seed)),
            pairs,
        ),
    ]
    return rows, compare_prefix(engine, pairs)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and judge by the bars: 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dtype_help = "activations of both sides, and the weights of the other; auto: what Kvern chooses, against BF16"
    parser.add_argument("--dtype", choices=[*DTYPES, "auto"], default="bf16", help=dtype_help)
    parser.add_argument("--requests", type=int, default=48, help="requests that come and go in a run")
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and prompts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    load_at_start = os.getloadavg()[0]
    torch.set_num_threads(default_threads())
    engine = kvern_engine(args.dtype)
    other = Static(load_qwen2(MODEL, DTYPES.get(args.dtype, torch.bfloat16), rounded=True))
    rows, warm = measure(engine, other, args.requests, args.pairs, args.seed)
    if args.json:
        both = {"rows": [asdict(row) for row in rows], "warm_prefix": asdict(warm)}
        print(json.dumps({"dtype": args.dtype, "load": load_at_start, **both}, indent=1))
    else:
        show(rows, warm, args.dtype, load_at_start)
    return int(bool(missed(rows, warm)))


def missed(rows: Sequence[Row], warm: WarmRow) -> list[str]:
    """The bars that were not reached."""
    found = [f"{row.case}: {row.ratio:.2f} of {row.bar}" for row in rows if row.bar is not None and row.ratio < row.bar]
    return found + ([f"warm prefix: {warm.share:.2f} of {WARM_BAR}"] if warm.share >= WARM_BAR else [])


def show(rows: Sequence[Row], warm: WarmRow, dtype: str, load_at_start: float) -> None:
    """A line a case."""
    mark = " (DISTURBED)" if load_at_start > 1.2 else ""
    print(f"{MODEL} {dtype}, {machine().cpu}, kernels {library.isa()}, load {load_at_start:.1f} at the start{mark}")
    print(f"{'case':<18} {'Kvern tok/s':>11} {'transformers':>12} {'ratio':>6} {'bar':>5}  ratio of each pair")
    for row in rows:
        each = " ".join(f"{a / b:.2f}" for a, b in row.pairs)
        bar = "-" if row.bar is None else f"{row.bar:.1f}"
        print(f"{row.case:<18} {row.kvern:>11.1f} {row.transformers:>12.1f} {row.ratio:>6.2f} {bar:>5}  {each}")
    print(
        f"{PREFIX}-token prompt, first token: cold {warm.cold:.2f} s, warm {warm.warm:.3f} s = {100 * warm.share:.1f} %"
    )
    print("\n".join(f"MISSED: {one}" for one in missed(rows, warm)) or "every bar is reached")


def _add(engine: Engine, work: Work) -> None:
    engine.add(work.prompt, SamplingParams(max_tokens=work.tokens, ignore_eos=True))


def _ids(random_: random.Random, count: int) -> tuple[int, ...]:
    return tuple(random_.choices(range(IDS), k=count))


if __name__ == "__main__":
    sys.exit(main())
