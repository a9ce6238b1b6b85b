"""Random scenarios: whatever is shared, preempted, cancelled or broken, every answer is the one it has alone.

The answer alone comes from the model without any cache, one whole forward pass a token, so it shares nothing with the
engine but the weights and the sampler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_config, tiny_model

from kvern.engine import Engine, EngineSettings, SamplingParams, Update
from kvern.engine.request import BACKGROUND, Request
from kvern.engine.runner import Computed, Runner
from kvern.engine.sampler import Row, sample
from kvern.engine.scheduler import Chunk
from kvern.errors import NonFiniteLogitsError
from kvern.model import ForwardBatch, Model, PackedTransformer, Transformer
from kvern.model.packed import PackedNow
from kvern.ops import packed

VOCABULARY = 48
CONTEXT = 64
EOS = 7

BASES = tuple(
    tuple(torch.randint(8, VOCABULARY, (CONTEXT,), generator=torch.Generator().manual_seed(seed)).tolist())
    for seed in range(3)
)
"""Prompts are prefixes of these, maybe with one more token, so that many are shared."""

KINDS = (
    SamplingParams(max_tokens=0),
    SamplingParams(max_tokens=0, ignore_eos=True, logprobs=2),
    SamplingParams(max_tokens=0, temperature=1.0, seed=3),
    SamplingParams(max_tokens=0, temperature=0.8, seed=4, top_k=20, top_p=0.9, min_tokens=3, repetition_penalty=1.2),
    SamplingParams(max_tokens=0, frequency_penalty=0.5, presence_penalty=0.5, logit_bias=((9, 2.0),)),
    SamplingParams(max_tokens=0, logprobs=1, prompt_logprobs=True, vocab_limit=40, stop_token_ids=(11, 12)),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model() -> Transformer:
    return tiny_model(tiny_config(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, eos_token_id=(EOS,)))


@cache
def served() -> Model:
    """The model that engines get: packed where there are kernels, against the plain one that answers alone."""
    return PackedTransformer(model(), PackedNow()) if packed.available() else model()


@cache
def logits_after(tokens: tuple[int, ...]) -> torch.Tensor:
    """[1, vocab_size] after `tokens`, computed alone and from the start."""
    with torch.inference_mode():
        logits: torch.Tensor = model()(ForwardBatch.of(list(tokens)))
    return logits[-1:].clone()


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams, context: int) -> tuple[tuple[int, ...], str]:
    """Answer and reason of its end, in a context of so many tokens."""
    tokens = list(prompt)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    while len(tokens) < min(len(prompt) + params.max_tokens, context):
        row = Row(params, params.seed or 0, tokens, len(prompt), stops)
        tokens.append(sample(logits_after(tuple(tokens)), [row])[0].token)
        if tokens[-1] in stops:
            return tuple(tokens[len(prompt) :]), "stop"
    return tuple(tokens[len(prompt) :]), "length"


@dataclass(frozen=True)
class Job:
    """A request: when it arrives, when it is cancelled, after how many of its tokens its logits become NaN."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrives: int = 0
    priority: int = 0
    salt: bytes = b""
    cancelled: int | None = None
    broken: int | None = None


@dataclass
class Outcome:
    """What an engine did for the jobs, in their order."""

    updates: list[list[Update]] = field(default_factory=list)
    steps: int = 0


class BreakingRunner(Runner):
    """Gives NaN for the logits of chosen requests; remembers what the last step computed."""

    broken: dict[int, int]
    computed: Sequence[Request]

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> Computed:
        self.computed = [chunk.request for chunk in chunks]
        computed = super().run(chunks)
        for chunk, rows in zip(chunks, computed.rows, strict=True):
            sound = max(0, self.broken.get(chunk.request.id, CONTEXT) - chunk.request.generated)
            computed.logits[rows.start + sound : rows.stop] = torch.nan
        return computed


def run(engine: Engine, jobs: Sequence[Job]) -> Outcome:
    """Let the jobs arrive and leave as they say, until nothing is left; every step's blocks are looked at."""
    runner = BreakingRunner(engine.model, engine.cache, mtp=engine.runner.mtp)
    runner.broken, engine.runner = {}, runner
    ids: dict[int, int] = {}
    updates: dict[int, list[Update]] = defaultdict(list)
    last, step = max(job.arrives for job in jobs), 0
    bound = last + 2 * sum(len(job.prompt) + job.params.max_tokens for job in jobs) + 2 * len(jobs)
    while step <= last or engine.has_work():
        assert step <= bound, "somebody starves"
        for index, job in enumerate(jobs):
            if job.arrives == step:
                ids[index] = engine.add(job.prompt, job.params, priority=job.priority, salt=job.salt)
                if job.broken is not None:
                    runner.broken[ids[index]] = job.broken
            if index in ids and job.cancelled is not None and job.arrives + job.cancelled == step:
                engine.cancel(ids[index])
        first = next(iter(engine.scheduler.running), None)
        runner.computed = []
        for update in engine.step():
            updates[update.request_id].append(update)
        if first and first.id in engine.live():
            assert any(one.order <= first.order for one in runner.computed), "the first in order stands still"
        only_equal_prefixes_are_shared(engine)
        step += 1
    return Outcome([updates[ids[index]] for index in range(len(jobs))], step)


def only_equal_prefixes_are_shared(engine: Engine) -> None:
    """A block with two owners holds the same tokens, after the same tokens, under the same salt."""
    size = engine.settings.block_size
    contents: dict[int, tuple[bytes, int, tuple[int, ...]]] = {}
    for request in engine.scheduler.running:
        for index, block in enumerate(request.blocks):
            what = (request.salt, index, tuple(request.tokens[: (index + 1) * size]))
            assert contents.setdefault(block, what) == what


def same_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def judge(engine: Engine, jobs: Sequence[Job], outcome: Outcome) -> None:
    """Everything that must hold afterwards."""
    for index, (job, updates) in enumerate(zip(jobs, outcome.updates, strict=True)):
        answer, reason = alone(job.prompt, job.params, engine.max_context)
        got = tuple(token for update in updates for token in update.tokens)
        assert [update.finish for update in updates].count(None) == len(updates) - 1
        end = updates[-1].finish
        if end == "cancelled":
            assert job.cancelled is not None
            assert got == answer[: len(got)]
        elif job.broken is not None and job.broken < len(answer):
            assert end == "error"
            assert isinstance(updates[-1].error, NonFiniteLogitsError)
            assert got == answer[: job.broken]
        else:
            assert (got, end) == (answer, reason)
        check_logprobs(job, got, updates)
        others = [
            same_prefix(job.prompt, (*other.prompt, *alone(other.prompt, other.params, engine.max_context)[0]))
            for at, other in enumerate(jobs)
            if at != index and other.salt == job.salt
        ]
        if engine.stats().preemptions:
            others.append(len(job.prompt))  # its own blocks, from before it was preempted
        most = min(len(job.prompt) - 1, max(others, default=0)) if engine.settings.prefix_caching else 0
        assert updates[0].cached_tokens <= most
        assert updates[0].cached_tokens % engine.settings.block_size == 0
        assert all(update.cached_tokens == 0 for update in updates[1:])
    engine.check()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_blocks_used) == (0, 0, 0)
    assert engine.blocks.free_blocks == stats.cache_blocks
    assert sum(stats.finished.values()) == len(jobs)
    assert stats.generated_tokens == sum(len(update.tokens) for updates in outcome.updates for update in updates)
    assert stats.prompt_tokens == sum(len(job.prompt) for job in jobs)


def check_logprobs(job: Job, got: tuple[int, ...], updates: Sequence[Update]) -> None:
    """One for each token of the answer, and of the prompt where asked for, as computed alone."""
    told = [one for update in updates for one in update.logprobs]
    if job.params.logprobs is None:
        assert told == []
        return
    assert [one.token for one in told] == list(got)
    if told:
        position = len(job.prompt) + len(got) - 1
        expected = logits_after((*job.prompt, *got)[:position])[0, : job.params.vocab_limit].log_softmax(-1)
        assert told[-1].logprob == pytest.approx(float(expected[got[-1]]), abs=1e-4)
        assert len(told[-1].top) == job.params.logprobs
    if job.params.prompt_logprobs and told:
        first = updates[0].prompt_logprobs
        assert [one and one.token for one in first] == [None, *job.prompt[1:]]
        if len(first) > 1 and first[-1] is not None:
            expected = logits_after(job.prompt[:-1])[0, : job.params.vocab_limit].log_softmax(-1)
            limit = job.params.vocab_limit or VOCABULARY
            if job.prompt[-1] < limit:
                assert first[-1].logprob == pytest.approx(float(expected[job.prompt[-1]]), abs=1e-4)


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[EngineSettings, list[Job]]:
    size = draw(st.sampled_from([1, 2, 4, 8]))
    running = draw(st.integers(1, 6))
    chosen = EngineSettings(
        max_context=draw(st.sampled_from([24, 40])),
        cache_tokens=draw(st.sampled_from([24, 40, 56, 80, 400])),
        block_size=size,
        step_tokens=running + draw(st.sampled_from([0, 1, 3, 8, 40])),
        max_running=running,
        prefix_caching=draw(st.booleans()),
        check_every_step=True,
    )
    room = min(chosen.max_context or CONTEXT, (chosen.cache_tokens or CONTEXT) // size * size)
    jobs = []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(KINDS))
        length = draw(st.integers(1, room - 1))
        tail = draw(st.sampled_from([(), (8,), (9,)]))
        jobs.append(
            Job(
                prompt=(draw(st.sampled_from(BASES))[:length] + tail)[: room - 1],
                params=replace(kind, max_tokens=draw(st.integers(1, 14))),
                arrives=draw(st.integers(0, 12)),
                priority=draw(st.sampled_from([0, 0, 0, 1, 2, BACKGROUND, BACKGROUND + 1])),
                salt=draw(st.sampled_from([b"", b"", b"other"])),
                cancelled=draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 15))),
                broken=draw(st.sampled_from([None, None, None, None, 0, 2])) if not kind.prompt_logprobs else None,
            )
        )
    return chosen, jobs


def scenario(chosen: EngineSettings, jobs: list[Job]) -> None:
    engine = Engine(served(), settings=chosen)
    judge(engine, jobs, run(engine, jobs))


@settings(max_examples=250)
@given(scenarios())
def test_every_answer_is_the_one_it_has_alone(case: tuple[EngineSettings, list[Job]]) -> None:
    scenario(*case)


@pytest.mark.slow
@settings(max_examples=3000)
@given(scenarios())
def test_every_answer_is_the_one_it_has_alone_many_times(case: tuple[EngineSettings, list[Job]]) -> None:
    scenario(*case)


def jobs_of(*prompts: Sequence[int], **same: Any) -> list[Job]:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    return [replace(Job(tuple(prompt), params), **same) for prompt in prompts]


SMALL = EngineSettings(
    max_context=40, cache_tokens=48, block_size=4, step_tokens=8, max_running=4, check_every_step=True
)
LARGE = replace(SMALL, cache_tokens=800, step_tokens=64)


def test_a_cache_too_small_preempts_and_changes_nothing() -> None:
    engine, jobs = Engine(served(), settings=SMALL), jobs_of(*(base[:14] for base in BASES))
    judge(engine, jobs, run(engine, jobs))
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("step_tokens", [5, 11, 64])
def test_a_chunked_prompt_is_computed_once(step_tokens: int) -> None:
    engine, jobs = Engine(served(), settings=replace(SMALL, step_tokens=step_tokens)), jobs_of(BASES[0][:22])
    outcome = run(engine, jobs)
    judge(engine, jobs, outcome)
    assert engine.stats().steps == -(-22 // step_tokens) + 11


def test_a_long_prompt_does_not_hold_up_an_answer() -> None:
    engine = Engine(served(), settings=replace(LARGE, step_tokens=5))
    short, long = (engine.add(base[:n], SamplingParams(max_tokens=6)) for base, n in ((BASES[0], 3), (BASES[1], 30)))
    told = [{update.request_id for update in engine.step()} for _ in range(5)]
    assert all(short in ids for ids in told)
    assert long not in set().union(*told)


@pytest.mark.parametrize("shared", [0, 3, 4, 11, 12, 13, 20])
def test_cached_tokens_are_the_full_blocks_of_the_shared_prefix(shared: int) -> None:
    engine = Engine(served(), settings=LARGE)
    first, second = BASES[0][:20], BASES[0][:shared] + BASES[1][shared:20]
    jobs = [*jobs_of(first), *jobs_of(second, first, arrives=30), *jobs_of(first, arrives=30, salt=b"other")]
    outcome = run(engine, jobs)
    judge(engine, jobs, outcome)
    told = [updates[0].cached_tokens for updates in outcome.updates]
    assert told == [0, min(shared, 19) // 4 * 4, 16, 0]


def test_answers_are_cached_too() -> None:
    engine = Engine(served(), settings=LARGE)
    answer, _ = alone(BASES[0][:10], SamplingParams(max_tokens=12, ignore_eos=True), 40)
    jobs = [*jobs_of(BASES[0][:10]), *jobs_of((*BASES[0][:10], *answer, 9), arrives=20)]
    outcome = run(engine, jobs)
    judge(engine, jobs, outcome)
    assert outcome.updates[1][0].cached_tokens == 20


def test_without_prefix_caching_nothing_is_found() -> None:
    engine = Engine(served(), settings=replace(LARGE, prefix_caching=False))
    jobs = [*jobs_of(BASES[0][:20]), *jobs_of(BASES[0][:20], arrives=20)]
    outcome = run(engine, jobs)
    judge(engine, jobs, outcome)
    assert outcome.updates[1][0].cached_tokens == 0


def test_a_broken_request_harms_no_other_that_shares_its_step() -> None:
    engine = Engine(served(), settings=LARGE)
    jobs = jobs_of(*(base[:9] for base in BASES))
    jobs[1] = replace(jobs[1], broken=3)
    outcome = run(engine, jobs)
    judge(engine, jobs, outcome)
    assert [updates[-1].finish for updates in outcome.updates] == ["length", "error", "length"]


def test_a_broken_prompt_whose_logprobs_were_asked_for_harms_no_other() -> None:
    engine = Engine(served(), settings=LARGE)
    scored = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=True)
    jobs = [*jobs_of(BASES[0][:9]), *jobs_of(BASES[1][:9], params=scored, broken=0)]
    outcome = run(engine, jobs)
    assert [updates[-1].finish for updates in outcome.updates] == ["length", "error"]


def test_what_a_preempted_request_had_computed_itself_is_no_cached_prompt() -> None:
    engine = Engine(served(), settings=replace(SMALL, step_tokens=4))
    jobs = [*jobs_of(BASES[1][:20]), *jobs_of(BASES[0][:24], arrives=6)]
    outcome = run(engine, jobs)
    if engine.stats().preemptions != 1:
        pytest.fail("nobody was preempted")
    assert outcome.updates[1][0].cached_tokens == 0
