"""Drafts change nothing but the number of steps: in any scenario, from n-grams, the MTP layer or anybody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_properties import (
    BASES,
    LARGE,
    SMALL,
    VOCABULARY,
    Job,
    alone,
    jobs_of,
    judge,
    logits_after,
    model,
    one_thread,
    run,
    scenarios,
    served,
)

from kvern.engine import Engine, EngineSettings, SamplingParams
from kvern.engine.draft_length import Load
from kvern.engine.ngram import Proposal
from kvern.engine.request import Request
from kvern.engine.runner import Computed
from kvern.engine.scheduler import Chunk
from kvern.engine.settings import Drafts
from kvern.engine.speculative import Drafted, Speculator, equal_from_start
from kvern.errors import ConfigError
from kvern.model import ForwardBatch, PackedTransformer, Transformer
from kvern.model.packed import PackedNow
from kvern.ops import packed

__all__ = ["one_thread"]

Guess = Callable[[Sequence[int], int], Sequence[int]]
"""(prompt and answer so far, how many) -> what may come next."""


@dataclass(frozen=True)
class Priced:
    """A step costs 1 and so much more for each row; a pass of the MTP layer."""

    row: float = 0.0
    drafting: float = 0.0

    def __call__(self, rows: int, attended: int) -> float:
        return 1.0 + self.row * rows

    def mtp_pass(self, rows: int) -> float:
        return self.drafting


free = Priced()
"""Drafts cost nothing: as many as there is room for are verified."""


@dataclass
class Scripted:
    """A drafter that proposes what `guess` says."""

    tokens: Sequence[int]
    guess: Guess

    def propose(self, count: int) -> Proposal | None:
        guessed = tuple(self.guess(self.tokens, count))
        return Proposal(guessed, 8, 0) if guessed else None

    def settle(self, proposal: Proposal | None, right: int, emitted: int) -> None:
        """Nothing to learn."""


class ScriptedSpeculator(Speculator):
    """Verifies what `guess` says, always as much as there is room for."""

    def __init__(self, most: int, guess: Guess) -> None:
        super().__init__(most, free, ngram=True, mtp=False)
        self.guess = guess

    def drafter(self, request: Request) -> Drafted:
        return Drafted(Scripted(request.tokens, self.guess))


def garbage(tokens: Sequence[int], count: int) -> list[int]:
    generator = torch.Generator().manual_seed(len(tokens))
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def truth(jobs: Sequence[Job], context: int, wrong_every: int = 0) -> Guess:
    """What the jobs' answers will be, with every so manieth token wrong."""
    whole = [job.prompt + alone(job.prompt, job.params, context)[0] for job in jobs]

    def guess(tokens: Sequence[int], count: int) -> list[int]:
        known = next((one for one in whole if one[: len(tokens)] == tuple(tokens)), ())
        right = known[len(tokens) : len(tokens) + count]
        at = enumerate(right, start=len(tokens))
        return [(token + 1) % VOCABULARY if wrong_every and i % wrong_every == 0 else token for i, token in at]

    return guess


def watch(engine: Engine, see: Callable[[Sequence[Chunk]], None]) -> None:
    """Let `see` look at the chunks of each step before they are computed."""
    run_chunks = engine.runner.run

    def watched(chunks: Sequence[Chunk]) -> Computed:
        see(chunks)
        return run_chunks(chunks)

    engine.runner.run = watched  # type: ignore[method-assign]


def drafting(chosen: EngineSettings, guess: Guess, most: int = 5) -> Engine:
    engine = Engine(served(), settings=chosen)
    engine.speculator = ScriptedSpeculator(most, guess)
    return engine


@settings(max_examples=70)
@given(scenarios(), st.sampled_from([1, 2, 16]))
def test_prompt_lookup_changes_no_answer(case: tuple[EngineSettings, list[Job]], most: int) -> None:
    chosen, jobs = case
    engine = Engine(served(), settings=replace(chosen, drafts="ngram", draft_tokens=most))
    judge(engine, jobs, run(engine, jobs))


@settings(max_examples=70)
@given(scenarios(), st.sampled_from([0, 2, 3, 5]), st.sampled_from([1, 4, 9]))
def test_right_and_wrong_drafts_change_no_answer(
    case: tuple[EngineSettings, list[Job]], wrong_every: int, most: int
) -> None:
    chosen, jobs = case
    context = Engine(served(), settings=chosen).max_context
    engine = drafting(chosen, truth(jobs, context, wrong_every), most)
    judge(engine, jobs, run(engine, jobs))


@settings(max_examples=30)
@given(scenarios())
def test_garbage_changes_no_answer(case: tuple[EngineSettings, list[Job]]) -> None:
    chosen, jobs = case
    engine = drafting(chosen, garbage)
    judge(engine, jobs, run(engine, jobs))


def test_the_truth_saves_steps() -> None:
    jobs = jobs_of(BASES[0][:10], params=SamplingParams(max_tokens=26, ignore_eos=True))
    engine = drafting(LARGE, truth(jobs, 40), most=4)
    judge(engine, jobs, run(engine, jobs))
    stats = engine.stats()
    assert stats.steps == 1 + 5  # the prompt and one token; then four drafts and one token a step
    assert (stats.drafts, stats.draft_tokens, stats.accepted_draft_tokens) == (5, 20, 20)
    assert stats.accepted_by_position == (5, 5, 5, 5)


def test_accepted_drafts_are_counted_by_position() -> None:
    jobs = jobs_of(BASES[0][:10], params=SamplingParams(max_tokens=13, ignore_eos=True))
    engine = drafting(LARGE, truth(jobs, 40, wrong_every=3), most=4)
    judge(engine, jobs, run(engine, jobs))
    assert engine.stats().accepted_by_position[2:] == (0, 0)
    assert engine.stats().accepted_by_position[0] > 0


def test_drafts_take_what_the_others_leave_of_the_budget() -> None:
    """A long prompt that fills every step leaves none for drafts."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    jobs = [*jobs_of(BASES[0][:4], params=params), *jobs_of(BASES[1][:30], arrives=1)]
    chosen = replace(LARGE, step_tokens=5)
    engine = drafting(chosen, truth(jobs, 40), most=4)
    rows: list[int] = []
    watch(engine, lambda chunks: rows.append(sum(chunk.count + len(chunk.drafts) for chunk in chunks)))
    for job in jobs:
        engine.add(job.prompt, job.params)
    while engine.has_work():
        engine.step()
    assert max(rows) == chosen.step_tokens
    assert engine.stats().steps < 8 + 12


def test_nobody_is_preempted_for_drafts() -> None:
    jobs = jobs_of(*(base[:8] for base in BASES))
    chosen = replace(SMALL, cache_tokens=60, block_size=1, step_tokens=64)
    engine = drafting(chosen, garbage, most=16)
    judge(engine, jobs, run(engine, jobs))
    assert engine.stats().preemptions == 0
    assert engine.stats().draft_tokens > 0


def test_rejected_drafts_are_not_found_by_others() -> None:
    """Blocks are shared only where all their tokens were accepted."""
    jobs = jobs_of(BASES[0][:9])
    answer, _ = alone(jobs[0].prompt, jobs[0].params, 40)
    engine = drafting(LARGE, garbage, most=7)
    judge(engine, jobs, run(engine, jobs))
    wrong = (*jobs[0].prompt, *garbage([0] * 10, 8), 9)
    right = (*jobs[0].prompt, *answer, 9)
    later = [*jobs_of(wrong), *jobs_of(right)]
    outcome = run(engine, later)
    assert outcome.updates[0][0].cached_tokens == 8
    assert outcome.updates[1][0].cached_tokens == 20


def test_drafts_stop_where_they_are_wrong_and_begin_again_where_they_are_right() -> None:
    """What repeats is continued wrongly at first, later it is copied; only the first costs rows, and only a while."""
    copied = [*range(100, 160)]
    misleading = [token for other in range(200, 260) for token in (1, 2, other)]
    speculator = Speculator(8, Priced(row=0.3), ngram=True, mtp=False)
    request = Request(0, SamplingParams(1), len(copied), [*copied], 0, 0, b"", 0, limit=1000)
    drafted = []
    for token in [*misleading, *copied]:
        choice, _ = speculator._choose(request, 8, Load(1, 1, 1), 1)
        drafted.append(choice.count)
        request.tokens.append(token)
        speculator._settle(request, choice.tokens, [token])
    assert sum(drafted[:30]) > 0
    assert sum(drafted[60 : len(misleading)]) == 0
    assert drafted[-20:] == [8] * 20


def test_unseeded_draws_keep_their_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens after a prompt, with drafts that are often right: chi-square over the pairs against the model."""
    monkeypatch.setattr("kvern.engine.engine.secrets.randbits", Random(0).getrandbits)
    params = SamplingParams(max_tokens=3, temperature=1.0, top_k=4, ignore_eos=True)
    prompt, draws = BASES[0][:6], 3000
    expected = pairs(prompt, params)
    second = {a: max((p, b) for (first, b), p in expected.items() if first == a)[1] for a, _ in expected}
    chosen = replace(LARGE, step_tokens=256, max_running=64, max_waiting=draws, cache_tokens=4000)
    engine = drafting(chosen, lambda tokens, count: [second[tokens[-1]]] if len(tokens) == len(prompt) + 1 else [])
    for _ in range(draws):
        engine.add(prompt, params)
    answers: dict[int, list[int]] = {}
    while engine.has_work():
        for update in engine.step():
            answers.setdefault(update.request_id, []).extend(update.tokens)
    seen = Counter(tuple(answer[:2]) for answer in answers.values())
    assert set(seen) <= set(expected)
    stats = engine.stats()
    assert stats.draft_tokens == draws
    assert 0.3 * draws < stats.accepted_draft_tokens < 0.95 * draws
    common = {pair: draws * p for pair, p in expected.items() if draws * p >= 5}
    statistic = sum((seen[pair] - mean) ** 2 / mean for pair, mean in common.items())
    assert len(common) > 8
    assert statistic < 40, "with 16 cells at most one right distribution in a thousand exceeds 39"


def pairs(prompt: tuple[int, ...], params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of each pair of next tokens."""
    first = cut(prompt, params)
    return {(a, b): p * q for a, p in first.items() for b, q in cut((*prompt, a), params).items()}


def cut(tokens: tuple[int, ...], params: SamplingParams) -> dict[int, float]:
    best, ids = logits_after(tokens)[0].double().topk(params.top_k)
    return dict(zip(ids.tolist(), best.softmax(-1).tolist(), strict=True))


def mtp_model(seed: int = 0) -> Transformer:
    config = replace(model().config, num_nextn_predict_layers=1)
    made = Transformer(config, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    own = dict(made.named_parameters())
    for name, parameter in model().named_parameters():
        own[name].data.copy_(parameter)
    return made.eval()


MTP = mtp_model()
SERVED = PackedTransformer(MTP, PackedNow()) if packed.available() else MTP


BY_MTP: tuple[Drafts, ...] = ("auto", "mtp")


@settings(max_examples=50)
@given(scenarios(), st.sampled_from(BY_MTP), st.sampled_from([1, 3]), st.booleans())
def test_mtp_changes_no_answer(case: tuple[EngineSettings, list[Job]], drafts: Drafts, most: int, always: bool) -> None:
    chosen, jobs = case
    engine = Engine(SERVED, settings=replace(chosen, drafts=drafts, draft_tokens=most))
    if always:
        engine.speculator = Speculator(most, free, ngram=drafts == "auto", mtp=True)
    judge(engine, jobs, run(engine, jobs))


@torch.inference_mode()
def reference_drafts(tokens: list[int], count: int) -> list[int]:
    """What the MTP layer says about the next but one, when all of it is computed anew, without a cache."""
    drafts: list[int] = []
    hidden = MTP.hidden(ForwardBatch.of(tokens))[:-1]
    for _ in range(count):
        following = [*tokens, *drafts][1:]
        batch = ForwardBatch(torch.tensor(following), torch.arange(len(following)), (0, len(following)))
        states, logits = MTP.mtp(hidden, batch)
        drafts.append(int(logits[-1].argmax()))
        hidden = torch.cat([hidden, states[-1:]])
    return drafts


class Seldom(Speculator):
    """Wants a draft at every third token only, so that hidden states wait."""

    def _hopeful(self, request: Request) -> bool:
        return request.generated % 3 == 0


@pytest.mark.parametrize("kind", [Speculator, Seldom])
@pytest.mark.parametrize(
    ("chosen", "preempts"),
    [(LARGE, False), (replace(LARGE, step_tokens=5), False), (replace(SMALL, max_running=3), True)],
    ids=["whole", "chunked", "preempted"],
)
def test_mtp_drafts_are_those_of_the_whole_sequence(
    chosen: EngineSettings, preempts: bool, kind: type[Speculator]
) -> None:
    """After chunks, accepted and rejected drafts, prefix hits with the same continuation, and preemption."""
    engine = Engine(SERVED, settings=replace(chosen, drafts="mtp", draft_tokens=3))
    engine.speculator = kind(3, free, ngram=False, mtp=True)
    drafts: list[int] = []

    def see(chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            assert list(chunk.drafts) == reference_drafts(chunk.request.tokens, len(chunk.drafts))
            drafts.extend(chunk.drafts)

    watch(engine, see)
    for prompts in ((BASES[0][:14], BASES[1][:13], BASES[2][:15]), (BASES[0][:14], BASES[1][:13])):
        for prompt in prompts:
            engine.add(prompt, SamplingParams(max_tokens=14, ignore_eos=True))
        while engine.has_work():
            engine.step()
    stats = engine.stats()
    assert stats.prefix_hits > 0
    assert (stats.preemptions > 0) == preempts
    assert stats.draft_tokens == len(drafts) > (50 if kind is Speculator else 20)


@pytest.mark.parametrize(("price", "passes"), [(0.0, 60), (9.0, 4)])
def test_an_mtp_layer_that_does_not_pay_hardly_runs(price: float, passes: int) -> None:
    """Whatever its drafts are worth: one pass for each block of 16 tokens, and those of the first draft."""
    engine = Engine(SERVED, settings=replace(LARGE, drafts="mtp", draft_tokens=1, max_context=80, block_size=16))
    engine.speculator = Speculator(1, Priced(drafting=price), ngram=False, mtp=True)
    ran, predict = [], engine.runner.predict
    engine.runner.predict = lambda *args: ran.append(1) or predict(*args)  # type: ignore[method-assign, func-returns-value]
    engine.add(BASES[0][:4], SamplingParams(max_tokens=60, ignore_eos=True))
    while engine.has_work():
        engine.step()
    assert len(ran) <= passes + 2
    assert (engine.stats().draft_tokens == 0) == (price > 0)


def test_mtp_alone_needs_an_mtp_layer() -> None:
    with pytest.raises(ConfigError, match="no MTP layer"):
        Engine(served(), settings=replace(LARGE, drafts="mtp"))


@pytest.mark.parametrize(
    ("drafts", "drawn", "right"), [((1, 2), (1, 2, 3), 2), ((1, 2), (1, 3), 1), ((), (4,), 0), ((1, 2, 3), (1, 2), 2)]
)
def test_equal_from_start(drafts: tuple[int, ...], drawn: tuple[int, ...], right: int) -> None:
    assert equal_from_start(drafts, drawn) == right
