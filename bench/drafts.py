"""What drafts gain: the same answers with drafts off and on, in alternating pairs, on one engine.

    python -m bench.drafts [--model coder-0.5b] [--batch 1,4] [--pairs 3] [--tokens 1600] [--json]

"rewrite" returns a file (Python's own bisect.py) with one function renamed, greedily: almost all of it is copied.
"story" draws free text at temperature 1, where little repeats and drafts must cost nothing. Prompts are not timed: the
clock runs from the step after the first token to the last, and a ratio compares the two runs of one pair. Answers are
compared; where they part, the difference between the logits of both tokens shows whether that was a near-tie.
"""

from __future__ import annotations

import argparse
import bisect
import inspect
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median

import torch

from kvern.engine import Engine, EngineSettings
from kvern.engine.settings import Drafts
from kvern.llm import LLM
from kvern.llm.prepare import Prepared
from kvern.model import ForwardBatch
from kvern.text.options import SamplingOptions

NAMES = {
    "insort_right": "insert_after_equals",
    "insort_left": "insert_before_equals",
    "bisect_right": "find_after_equals",
    "bisect_left": "find_before_equals",
}
PLACES = ("a lighthouse", "a night train", "an old printing works", "a market in the mountains")
NEAR = 0.25
"""Logits nearer than this are a tie as far as BF16 can tell: it resolves 1/8 at 16 to 32."""


@dataclass(frozen=True)
class Run:
    """One run of a task: the answers, the tokens after the first, and what they took."""

    answers: tuple[tuple[int, ...], ...]
    tokens: int
    seconds: float
    steps: int
    drafted: int
    accepted: int

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Parting:
    """Where two greedy answers part: after how many tokens, and how far apart the logits of both next tokens are."""

    after: int
    gap: float
    near_tie: bool


@dataclass(frozen=True)
class Row:
    """Medians of the pairs. acceptance: part of the drafted tokens that were right."""

    task: str
    drafts: str
    batch: int
    off_tokens_per_s: float
    on_tokens_per_s: float
    ratio: float
    ratios: tuple[float, ...]
    tokens_per_step: float
    acceptance: float | None
    answers_equal: bool
    partings: tuple[Parting, ...] = field(default=())


def rewrite(llm: LLM, index: int) -> Prepared:
    """Return bisect.py with one function renamed."""
    old, new = list(NAMES.items())[index % len(NAMES)]
    source = inspect.getsource(bisect)
    ask = f"Return this whole file with the function {old} renamed to {new}, and nothing else changed."
    return llm.prepare_chat(f"```python\n{source}```\n\n{ask}", SamplingOptions.of(temperature=0.0, max_tokens=1600))


def story(llm: LLM, index: int) -> Prepared:
    """Free text at temperature 1, of a fixed length."""
    ask = f"Write a story of 300 words that happens in {PLACES[index % len(PLACES)]}."
    options = SamplingOptions.of(
        temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=index, max_tokens=256
    )
    prepared = llm.prepare_chat(ask, options)
    return replace(prepared, params=replace(prepared.params, ignore_eos=True))


TASKS = {"rewrite": rewrite, "story": story}


def run(engine: Engine, work: Sequence[Prepared], drafts: Drafts) -> Run:
    """Answer all of `work` together on an engine that remembers nothing."""
    engine.settings = replace(engine.settings, drafts=drafts)
    engine.reset()
    answers: dict[int, list[int]] = {engine.add(one.prompt, one.params): [] for one in work}
    while not all(answers.values()):
        _step(engine, answers)
    begun, first, steps = sum(map(len, answers.values())), engine.stats(), engine.stats().steps
    start = time.perf_counter()
    while engine.has_work():
        _step(engine, answers)
    seconds, last = time.perf_counter() - start, engine.stats()
    return Run(
        tuple(tuple(answer) for answer in answers.values()),
        sum(map(len, answers.values())) - begun,
        seconds,
        last.steps - steps,
        last.draft_tokens - first.draft_tokens,
        last.accepted_draft_tokens - first.accepted_draft_tokens,
    )


def _step(engine: Engine, answers: dict[int, list[int]]) -> None:
    for update in engine.step():
        if update.error is not None:
            raise update.error
        answers[update.request_id].extend(update.tokens)


@torch.inference_mode()
def partings(engine: Engine, work: Sequence[Prepared], off: Run, on: Run) -> tuple[Parting, ...]:
    """Where answers differ: the gap between the two tokens' logits, computed anew over everything before them."""
    found = []
    for one, plain, drafted in zip(work, off.answers, on.answers, strict=True):
        pairs = zip(plain, drafted, strict=False)
        after = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if after is None:
            continue
        tokens = [*one.prompt, *plain[:after]]
        batch = replace(ForwardBatch.of(tokens), logits_at=torch.tensor([len(tokens) - 1]))
        logits = engine.model(batch)[0]
        gap = abs(float(logits[plain[after]] - logits[drafted[after]]))
        found.append(Parting(after, gap, gap < NEAR))
    return tuple(found)


def measure(llm: LLM, task: str, drafts: Drafts, batch: int, pairs: int, tokens: int) -> Row:
    """Alternate drafts off and on, after a short warm-up; the first pair tells whether the answers are equal."""
    work = [_shorter(TASKS[task](llm, index), tokens) for index in range(batch)]
    run(llm.engine, [_shorter(one, 8) for one in work], drafts)
    runs = [(run(llm.engine, work, "off"), run(llm.engine, work, drafts)) for _ in range(pairs)]
    off, on = runs[0]
    apart = partings(llm.engine, work, off, on)
    ratios = tuple(b.rate / a.rate for a, b in runs)
    return Row(
        task,
        drafts,
        batch,
        median(a.rate for a, _ in runs),
        median(b.rate for _, b in runs),
        median(ratios),
        ratios,
        on.tokens / on.steps,
        on.accepted / on.drafted if on.drafted else None,
        off.answers == on.answers,
        apart,
    )


def _shorter(one: Prepared, tokens: int) -> Prepared:
    return replace(one, params=replace(one.params, max_tokens=min(tokens, one.params.max_tokens)))


def print_table(rows: Sequence[Row], load: float) -> None:
    """As text."""
    print(f"load at start {load:.2f}")
    print(
        f"{'task':8} {'batch':>5} {'off tok/s':>10} {'on tok/s':>9} {'ratio':>6} {'tok/step':>8} {'right':>8}  answers"
    )
    for row in rows:
        accepted = "-" if row.acceptance is None else f"{row.acceptance:.2f}"
        apart = ", ".join(f"part after {one.after} tokens, logits {one.gap:.3f} apart" for one in row.partings)
        print(
            f"{row.task:8} {row.batch:5} {row.off_tokens_per_s:10.1f} {row.on_tokens_per_s:9.1f} {row.ratio:6.2f} "
            f"{row.tokens_per_step:8.2f} {accepted:>8}  {'equal' if row.answers_equal else apart}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coder-0.5b", help="a pulled model's name, or a checkpoint folder")
    parser.add_argument("--dtype", choices=("auto", "bf16", "f32"), default="auto")
    parser.add_argument("--drafts", choices=("auto", "ngram", "mtp"), default="ngram")
    parser.add_argument("--task", choices=(*TASKS, "all"), default="all")
    parser.add_argument("--batch", default="1,4", help="answers computed together")
    parser.add_argument("--pairs", type=int, default=3, help="alternating pairs")
    parser.add_argument("--tokens", type=int, default=1600, help="longest answer")
    parser.add_argument("--threads", type=int, help="default: every core")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    settings = EngineSettings(drafts=args.drafts, max_context=8192)
    llm = LLM(args.model, dtype=args.dtype, threads=args.threads, settings=settings)
    tasks = list(TASKS) if args.task == "all" else [args.task]
    batches = [int(number) for number in args.batch.split(",")]
    rows = [measure(llm, task, args.drafts, batch, args.pairs, args.tokens) for task in tasks for batch in batches]
    if args.json:
        print(json.dumps({"load": load, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print_table(rows, load)


if __name__ == "__main__":
    main()
