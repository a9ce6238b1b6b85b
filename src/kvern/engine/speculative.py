"""Drafts: tokens guessed cheaply and verified together, several to a step, without changing any answer.

    rows of a request = [its pending token, draft 1, ..., draft k]
    token j is drawn from row j as ever; while it equals draft j, row j + 1 tells the next one

A draw depends on logits, seed and position only, so the answer is what it would be without drafts, token for token and
at every temperature, and no rejection sampling is needed. Drafts come from the n-grams of prompt and answer or from
the MTP layer, whichever promises more; `best_length` says how many. Their chances are learnt also while nothing is
drafted, because a proposal that was not verified can still be compared with what came: drafts end where they do not
pay (doubtful text, many rows, deep context) and begin again by themselves. All of it is deterministic. Drafts use what
is left of a step's budget and of the free blocks: nobody waits and nobody is preempted for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvern.engine.draft_length import Chances, Load, best_length
from kvern.engine.drawing import Drawing
from kvern.engine.mtp_drafts import Followed, MTPDrafter
from kvern.engine.ngram import LONGEST, NgramDrafter, Proposal
from kvern.engine.request import Request
from kvern.engine.runner import Computed, Runner
from kvern.engine.scheduler import Chunk, Scheduler
from kvern.engine.settings import EngineSettings
from kvern.engine.step_cost import Cost, StepCost

NGRAM_GUESSES = tuple(matched / (matched + 3.5) for matched in range(LONGEST + 1))
"""Chance of a draft after so many equal tokens, before anything was measured."""

MTP_GUESS = 0.6


class Drafter(Protocol):
    """Proposes what may come next in one request; see `NgramDrafter`."""

    def propose(self, count: int) -> Proposal | None:
        """Up to `count` tokens."""

    def settle(self, proposal: Proposal | None, right: int, emitted: int) -> None:
        """`emitted` tokens came, and the first `right` of the proposal were right."""


@dataclass
class Drafted:
    """A request's drafts: its n-grams, its chances, and what was proposed for the step that runs."""

    ngram: Drafter
    chances: Chances = field(default_factory=lambda: Chances(NGRAM_GUESSES))
    mtp_chances: Chances = field(default_factory=lambda: Chances([MTP_GUESS]))
    proposal: Proposal | None = None
    predicted: tuple[int, ...] = ()
    """Drafts of the MTP layer that are known: all where they are verified, else the first, or none."""

    mtp_pays: bool = True
    """Whether the MTP layer's drafts promised more than none when it made the last, what they cost included."""


@dataclass
class DraftCounts:
    """Verified sequences of drafts, the drafts in them, and the accepted ones by their position."""

    drafts: int = 0
    tokens: int = 0
    accepted: list[int] = field(default_factory=list)


class Speculator:
    """Drafts for every request of an engine: at most `most` tokens a step each, none where they do not pay."""

    def __init__(self, most: int, cost: Cost, *, ngram: bool, mtp: bool) -> None:
        self._most, self._cost, self._ngram = most, cost, ngram
        self._mtp = MTPDrafter() if mtp else None
        self._of: dict[int, Drafted] = {}
        self.counts = DraftCounts(accepted=[0] * most)

    def extend(self, chunks: Sequence[Chunk], scheduler: Scheduler, runner: Runner) -> list[Chunk]:
        """The chunks of a step with drafts where they pay, blocks allocated."""
        load = Load(
            sum(chunk.count for chunk in chunks),
            sum(chunk.count * (chunk.request.computed + chunk.count) for chunk in chunks),
            sum(chunk.count for chunk in chunks),
        )
        drafts: dict[int, tuple[int, ...]] = {}
        predicting: list[tuple[Request, int]] = []
        decoding = [chunk.request for chunk in chunks if chunk.request.decodes]
        for request in decoding:
            room = min(self._most, scheduler.step_tokens - load.rows, scheduler.room(request))
            room = min(room, request.limit - len(request.tokens) - 1)
            chosen, load = self._choose(request, room, load, len(decoding))
            scheduler.reserve(request, chosen.count)
            if chosen.predicted:
                predicting.append((request, chosen.count))
            drafts[request.id] = chosen.tokens
        for request, tokens in self._predict(predicting, runner):
            self._of[request.id].predicted = tokens
            drafts[request.id] = tokens[: _fitting(request, tokens)]
        return [replace(chunk, drafts=drafts.get(chunk.request.id, ())) for chunk in chunks]

    def learn(self, drawings: Sequence[Drawing], computed: Computed, runner: Runner) -> None:
        """What came of a step, after it was accounted for and before anybody loses blocks."""
        for one in drawings:
            if drawn := [token.token for token in one.drawn if token.error is None]:
                self._settle(one.chunk.request, one.chunk.drafts, drawn)
        self._follow(drawings, computed, runner)

    def _settle(self, request: Request, drafts: Sequence[int], drawn: Sequence[int]) -> None:
        """`drawn` came where `drafts` were verified: learn from them, and from what was only proposed."""
        drafted = self._of.get(request.id)
        if drafted is None:
            return
        right = 0
        if drafted.proposal is not None:
            right = _compare(drafted.proposal.tokens, drawn, drafted.chances, drafted.proposal.matched)
        drafted.ngram.settle(drafted.proposal, right, len(drawn))
        _compare(drafted.predicted, drawn, drafted.mtp_chances)
        drafted.proposal, drafted.predicted = None, ()
        if drafts:
            self.counts.drafts += 1
            self.counts.tokens += len(drafts)
            for position in range(equal_from_start(drafts, drawn)):
                self.counts.accepted[position] += 1

    def _follow(self, drawings: Sequence[Drawing], computed: Computed, runner: Runner) -> None:
        """Let the MTP layer see what was computed and accepted."""
        if self._mtp is None or computed.hidden is None:
            return
        parts = []
        for one, start in zip(drawings, computed.starts[:-1], strict=True):
            if one.finish != "error":
                request, size = one.chunk.request, runner.cache.block_size
                first = request.computed - one.count
                fills = first // size < request.computed // size
                ahead = one.finish is None and request.decodes and (fills or self._hopeful(request))
                parts.append(Followed(request, first, one.count, start, fills, ahead))
        self._mtp.follow(runner, computed.hidden, parts)

    def forget(self, request: Request) -> None:
        """A request ended."""
        self._of.pop(request.id, None)
        if self._mtp is not None:
            self._mtp.forget(request)

    def drafter(self, request: Request) -> Drafted:
        """What drafts for one request."""
        return Drafted(NgramDrafter(request.tokens))

    def _choose(self, request: Request, room: int, load: Load, decoding: int) -> tuple[_Choice, Load]:
        """The better of both kinds of drafts for a request, one of so many that decode, or none."""
        drafted = self._of.get(request.id)
        if drafted is None:
            drafted = self._of[request.id] = self.drafter(request)
        room, context = max(0, room), len(request.tokens)
        best, most = _Choice(), load
        if self._ngram and (proposal := drafted.ngram.propose(self._most + 1)) is not None:
            drafted.proposal = proposal
            fits = _fitting(request, proposal.tokens[:room])
            chances = [drafted.chances.of(proposal.matched + position) for position in range(fits)]
            count, most = best_length(chances, load, context, self._cost)
            best = _Choice(count, proposal.tokens[:count])
        if self._mtp is not None and self._mtp.ready(request):
            making = self._cost.mtp_pass(decoding) / decoding  # a pass makes one draft for each
            count, other = best_length([drafted.mtp_chances.of(0)] * room, load, context, self._cost, making)
            drafted.predicted, drafted.mtp_pays = (self._mtp.first(request),), count > 0
            if other.rate(self._cost) > most.rate(self._cost):
                best, most = _Choice(count, predicted=True), other
        return best, most

    def _predict(self, wishes: Sequence[tuple[Request, int]], runner: Runner) -> list[tuple[Request, tuple[int, ...]]]:
        if self._mtp is None or not wishes:
            return []
        requests = [request for request, _ in wishes]
        return list(zip(requests, self._mtp.drafts(runner, wishes), strict=True))

    def _hopeful(self, request: Request) -> bool:
        drafted = self._of.get(request.id)
        return drafted is None or drafted.mtp_pays


def speculator(runner: Runner, settings: EngineSettings) -> Speculator | None:
    """What drafts for an engine, if anything does."""
    if settings.drafts == "off":
        return None
    cost = StepCost(runner.model.config)
    return Speculator(settings.draft_tokens, cost, ngram=settings.drafts != "mtp", mtp=runner.mtp)


@dataclass(frozen=True)
class _Choice:
    """So many drafts: these, or those that the MTP layer still has to predict."""

    count: int = 0
    tokens: tuple[int, ...] = ()
    predicted: bool = False


def _fitting(request: Request, drafts: Sequence[int]) -> int:
    """How many drafts the request's grammar takes: the next one would never be drawn."""
    return len(drafts) if request.matcher is None else request.matcher.fitting(drafts)


def equal_from_start(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many drafts are right."""
    pairs = zip(drafts, drawn, strict=False)
    return next((index for index, (guess, token) in enumerate(pairs) if guess != token), min(len(drafts), len(drawn)))


def _compare(drafts: Sequence[int], drawn: Sequence[int], chances: Chances, kind: int = 0) -> int:
    """Learn from drafts up to the first wrong one; how many were right."""
    right = equal_from_start(drafts, drawn)
    for position in range(right):
        chances.learn(kind + position, True)
    if right < min(len(drafts), len(drawn)):
        chances.learn(kind + right, False)
    return right
