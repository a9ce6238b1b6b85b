"""Speed of the engine in this process: prefill and decode over depths and batches, beside what memory delivers.

    gb_per_s = bytes_per_token * tokens_per_s;   bandwidth_share = gb_per_s / a plain read of memory in the same run

A prefill row is one prompt behind `depth` cached tokens, from the first step to its first token. A decode row is
`batch` sequences, each behind `depth` tokens of its own, that draw one token a step. `bench.depth` reaches the depth,
`bench.traffic` counts the bytes, `bench.stages` splits the time.
"""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from kvern.bench.depth import fill
from kvern.bench.stages import stopwatches
from kvern.bench.traffic import cache_row_bytes, counted_bytes
from kvern.engine import Engine, SamplingParams
from kvern.engine.settings import CacheDtype, EngineSettings
from kvern.model import Model
from kvern.ops import library
from kvern.plan.hardware import machine

Test = Literal["prefill", "decode"]
STEP_TOKENS = 512
BLOCK = 16
WARM_STEPS = 2
STAGED_STEPS = 16
"""Most decode steps of the pass that is timed by stages."""

READ_BYTES = 400_000_000
READ_ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """One row to measure. tokens: those of the prompt behind `depth`, or those to draw for each sequence."""

    test: Test
    tokens: int
    batch: int
    depth: int

    @property
    def context(self) -> int:
        """Tokens that a sequence reaches, all passes together."""
        if self.test == "prefill":
            return self.depth + self.tokens + 1
        return self.depth + 2 + WARM_STEPS + self.tokens + min(self.tokens, STAGED_STEPS)

    @property
    def cache_tokens(self) -> int:
        """Room that the row takes in the cache; a prefill may run twice over the same depth."""
        twice = self.tokens if self.test == "prefill" else 0
        return self.batch * (self.context + twice + 2 * BLOCK)

    def __str__(self) -> str:
        return f"{self.test} {self.tokens}, batch {self.batch}, depth {self.depth}"


@dataclass(frozen=True)
class EngineRow:
    """What a case gave. stages: seconds a step of each of `bench.stages.STAGES`, where asked for."""

    test: Test
    tokens: int
    batch: int
    depth: int
    tokens_per_s: float
    bytes_per_token: float
    gb_per_s: float
    bandwidth_share: float
    stages: dict[str, float] | None


def cases(prompts: Sequence[int], decode: int, depths: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """Every prompt at every depth, then every batch at every depth. Depths go down to a whole number of blocks.

    Prefill has no batches: a step computes STEP_TOKENS tokens, of one prompt or of several.
    """
    whole = list(dict.fromkeys(depth - depth % BLOCK for depth in depths))
    prefill = [Case("prefill", tokens, 1, depth) for tokens in prompts for depth in whole]
    return prefill + [Case("decode", decode, batch, depth) for batch in batches if decode for depth in whole]


def why_not(case: Case, model: Model, cache_dtype: CacheDtype = "auto") -> str | None:
    """Why a case cannot run on this machine, with numbers, or None."""
    limit = model.config.max_position_embeddings
    if case.context > limit:
        return f"needs a context of {case.context} tokens, the model has {limit}"
    needed, free = case.cache_tokens * cache_row_bytes(model, cache_dtype), machine().memory_available
    if needed > free:
        return f"needs {needed / 2**30:.1f} GiB of cache, {free / 2**30:.1f} GiB are free"
    return None


def read_gb_s(nbytes: int = READ_BYTES) -> float:
    """GB/s of a plain read of memory with all threads: median of rounds over `nbytes`, after a first one.

    The memory is in large pages where the system gives them, as packed weights are: in small ones a read is slower.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
    read = library.read_bandwidth if library.library() is not None else torch.sum
    seconds = []
    for _ in range(1 + READ_ROUNDS):
        start = time.perf_counter()
        read(data)
        seconds.append(time.perf_counter() - start)
    return nbytes / median(seconds[1:]) / 1e9


class EngineBench:
    """An engine of its own, large enough for every case."""

    def __init__(
        self, model: Model, todo: Sequence[Case], read: float, *, cache_dtype: CacheDtype = "auto", seed: int = 0
    ) -> None:
        most = max(case.batch for case in todo)
        settings = EngineSettings(
            cache_tokens=max(case.cache_tokens for case in todo) + 4 * BLOCK,
            cache_dtype=cache_dtype,
            block_size=BLOCK,
            step_tokens=max(STEP_TOKENS, most),
            max_running=most,
            max_waiting=most,
        )
        self.engine = Engine(model, settings=settings)
        self.model, self.read = model, read
        self._random = random.Random(seed)
        self._prefill(self._tokens(BLOCK), 0)  # the first pass reads mapped weights from disk

    def run(self, case: Case, *, stages: bool = False) -> EngineRow:
        """Measure one case; with `stages`, a second pass says where the time goes."""
        prompts = [self._tokens(case.depth) for _ in range(case.batch)]
        if case.depth:
            fill(self.engine, prompts)
        measure = self._run_prefill if case.test == "prefill" else self._run_decode
        seconds, read, split = measure(case, prompts, stages)
        computed = case.tokens * case.batch
        bytes_per_token = read / computed
        rate = computed / seconds
        gb_s = bytes_per_token * rate / 1e9
        share = gb_s / self.read
        return EngineRow(case.test, case.tokens, case.batch, case.depth, rate, bytes_per_token, gb_s, share, split)

    def _run_prefill(
        self, case: Case, prompts: list[list[int]], stages: bool
    ) -> tuple[float, int, dict[str, float] | None]:
        first, second = (prompts[0] + self._tokens(case.tokens) for _ in range(2))
        with counted_bytes(self.model, self.engine.settings.cache_dtype) as read:
            seconds, _ = self._prefill(first, case.depth)
        if not stages:
            return seconds, read(), None
        with stopwatches(self.model) as split:
            _, steps = self._prefill(second, case.depth)
        return seconds, read(), {stage: total / steps for stage, total in split.items()}

    def _prefill(self, prompt: list[int], cached: int) -> tuple[float, int]:
        """(seconds, steps) of a prompt to its first token, where the prefix cache holds its first `cached` tokens."""
        start, steps = time.perf_counter(), 0
        self.engine.add(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
        updates = []
        while self.engine.has_work():
            updates += self.engine.step()
            steps += 1
        seconds = time.perf_counter() - start
        _expect(cached, updates[0].cached_tokens, "cached tokens")
        return seconds, steps

    def _run_decode(
        self, case: Case, prompts: list[list[int]], stages: bool
    ) -> tuple[float, int, dict[str, float] | None]:
        params = SamplingParams(max_tokens=case.context, ignore_eos=True)
        ids = [self.engine.add(prompt + self._tokens(1), params) for prompt in prompts]
        for update in self.engine.step():
            _expect(case.depth, update.cached_tokens, "cached tokens")
        self._decode(WARM_STEPS, case.batch)
        with counted_bytes(self.model, self.engine.settings.cache_dtype) as read:
            start = time.perf_counter()
            self._decode(case.tokens, case.batch)
            seconds = time.perf_counter() - start
        split = None
        if stages:
            steps = min(case.tokens, STAGED_STEPS)
            with stopwatches(self.model) as totals:
                self._decode(steps, case.batch)
            split = {stage: total / steps for stage, total in totals.items()}
        for number in ids:
            self.engine.cancel(number)
        self.engine.step()
        return seconds, read(), split

    def _decode(self, steps: int, batch: int) -> None:
        drawn = sum(len(update.tokens) for _ in range(steps) for update in self.engine.step())
        _expect(steps * batch, drawn, "tokens")

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(self.engine.vocab_size), k=count)


def measure(
    model: Model, todo: Sequence[Case], read: float, *, cache_dtype: CacheDtype = "auto", stages: bool = False
) -> Iterator[EngineRow]:
    """The rows of `todo`, one by one; every case must be able to run (`why_not`)."""
    bench = EngineBench(model, todo, read, cache_dtype=cache_dtype)
    for case in todo:
        yield bench.run(case, stages=stages)


def _expect(wanted: int, found: int, what: str) -> None:
    """A figure of something else than the case says must not be printed."""
    if wanted != found:
        raise RuntimeError(f"the engine had {found} {what} where the case has {wanted}")
