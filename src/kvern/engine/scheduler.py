"""Decides what the next step computes. There are no phases: every request is "tokens still to compute".

Each step has a budget of tokens. Running requests with a single token left (those that decode) go first, so that a long
prompt never holds up an answer; the rest of the budget goes to all others, running and waiting alike, in order of
priority and arrival, a chunk each. A waiting request enters when blocks for all its tokens are free, or those of worse
priority can free them, and nobody behind it enters before; only where another is just computing its prefix, or it is
just being read from the disk, does it let them pass, until it finds that prefix in the cache. When blocks run out, the
request that is last in order gives all of its blocks back and waits again; what it had computed stays in the prefix
cache until it is overwritten. The first in order is never preempted, so it advances in every step, and so does
everybody in turn; it may wait for a moment where loads from the disk hold the blocks that it needs.

Background requests (of priority BACKGROUND and worse) have a smaller budget of their own, so that a step that an
interactive request waits for is short; beside interactive requests it is smaller still, and they get no drafts. It is
never 0: background work ends, too.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from kvern.engine.block_manager import BlockManager
from kvern.engine.prefix_loading import PrefixLoader
from kvern.engine.request import BACKGROUND, Request


@dataclass(frozen=True)
class Chunk:
    """Compute the next `count` tokens of `request`, and behind them `drafts`, which are not its tokens yet."""

    request: Request
    count: int
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True)
class BackgroundTokens:
    """Tokens of background requests in a step: while there are no others, and beside others."""

    alone: int = 128
    beside: int = 4


class Scheduler:
    """Holds the running and the waiting requests, both in order."""

    def __init__(
        self,
        blocks: BlockManager,
        step_tokens: int,
        max_running: int,
        background: BackgroundTokens = BackgroundTokens(),
        loader: PrefixLoader | None = None,
    ) -> None:
        self.blocks, self.step_tokens, self.max_running = blocks, step_tokens, max_running
        self.background, self.loader = background, loader
        self._beside = False
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        insort(self.waiting, request, key=lambda one: one.order)

    def remove(self, request: Request) -> None:
        """Forget a request and give its blocks back."""
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self._give_back(request)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, blocks allocated; empty when there is nothing to do."""
        chunks: dict[int, Chunk] = {}
        if self.loader is not None:
            self.loader.take()
        self._beside = any(one.priority < BACKGROUND for one in (*self.running, *self.waiting))
        for request in [one for one in self.running if one.pending == 1]:
            self._advance(request, chunks)
        others = [one for one in self.running if one.pending > 1] + self.waiting
        full = False
        for request in sorted(others, key=lambda one: one.order):
            if not self._budget(request, chunks):
                break
            if request not in self.running:
                if full or self._is_being_computed(request) or self._is_being_loaded(request):
                    continue
                full = not self._enter(request, chunks)
            self._advance(request, chunks)
        return list(chunks.values())

    def room(self, request: Request) -> int:
        """Drafts for which there are blocks, behind the request's tokens, without anybody losing one.

        None for a background request beside others.
        """
        if self._beside and request.priority >= BACKGROUND:
            return 0
        return (len(request.blocks) + self.blocks.free_blocks) * self.blocks.block_size - len(request.tokens)

    def reserve(self, request: Request, drafts: int) -> None:
        """Take blocks for so many drafts, for which there is room; `computed` gives back what was not needed."""
        needed = -(-(len(request.tokens) + drafts) // self.blocks.block_size) - len(request.blocks)
        fresh = self.blocks.allocate(needed)
        assert fresh is not None, "there is no room for the drafts"
        request.blocks += fresh

    def computed(self, chunk: Chunk) -> None:
        """A chunk was computed, as far as its `count`: its full blocks can be shared from now on."""
        request, size = chunk.request, self.blocks.block_size
        before, request.computed = request.computed // size, request.computed + chunk.count
        full = request.computed // size
        hashes = self.blocks.hashes(request.tokens[: full * size], request.salt, request.block_hashes)
        for index in range(before, full):
            self.blocks.seal(request.blocks[index], hashes[index])
        used = -(-request.computed // size)
        unused, request.blocks = request.blocks[used:], request.blocks[:used]
        self.blocks.release(unused)

    def _budget(self, request: Request, chunks: dict[int, Chunk]) -> int:
        """Tokens of the step that are left for a request."""
        left = self.step_tokens - sum(chunk.count for chunk in chunks.values())
        if request.priority < BACKGROUND:
            return left
        most = self.background.beside if self._beside else self.background.alone
        return min(left, most - sum(c.count for c in chunks.values() if c.request.priority >= BACKGROUND))

    def _advance(self, request: Request, chunks: dict[int, Chunk]) -> None:
        """Give a running request the chunk that budget and blocks allow."""
        count = min(request.pending, self._budget(request, chunks))
        if count and request in self.running and self._grow(request, count, chunks):
            chunks[request.id] = Chunk(request, count)

    def _prefix(self, request: Request) -> list[bytes]:
        """Hashes of the blocks that it may share: one token at least it must compute itself, for the logits."""
        if request.params.prompt_logprobs or not self.blocks.prefix_caching:
            return []
        hashes = self.blocks.hashes(request.tokens, request.salt, request.block_hashes)
        return hashes[: (len(request.tokens) - 1) // self.blocks.block_size]

    def _is_being_computed(self, request: Request) -> bool:
        """Whether a running request of better order has yet to compute the next block that `request` could share."""
        prefix, size = self._prefix(request), self.blocks.block_size
        at = len(self.blocks.match(prefix))
        return any(
            one.block_hashes[at : at + 1] == prefix[at : at + 1] and one.computed < (at + 1) * size
            for one in self.running
            if at < len(prefix) and one.order < request.order
        )

    def _is_being_loaded(self, request: Request) -> bool:
        """Whether a prefix that `request` could share comes from the disk, as it does from now on if it is there."""
        if self.loader is None or len(self.running) >= self.max_running:
            return False
        reserve = len(self.running) + self.step_tokens // self.blocks.block_size if self.running else 0
        taken = self.blocks.freed_by(one.blocks for one in self.running if one.priority > request.priority)
        return self.loader.holds_up(request, self._prefix(request), reserve, taken)

    def _enter(self, request: Request, chunks: dict[int, Chunk]) -> bool:
        """Let a waiting request run, with its cached prefix, if all its tokens fit then; else change nothing."""
        cached = self.blocks.match(self._prefix(request))
        if not self._make_room(request, cached, chunks):
            return False
        self.waiting.remove(request)
        insort(self.running, request, key=lambda one: one.order)
        request.blocks, request.computed = cached, len(cached) * self.blocks.block_size
        self.prefix_queries += len(request.tokens)
        self.prefix_hits += request.computed
        if request.started is None:
            request.started, request.cached_tokens = time.monotonic(), request.computed
        return True

    def _make_room(self, request: Request, cached: Sequence[int], chunks: dict[int, Chunk]) -> bool:
        """Own `cached`, and have blocks and a place for the rest: from those of worse priority, if that suffices."""
        needed = -(-len(request.tokens) // self.blocks.block_size) - len(cached)
        worse = [one for one in self.running if one.priority > request.priority]
        self.blocks.acquire(cached)
        most = self.blocks.free_blocks + self.blocks.freed_by(one.blocks for one in worse)
        if needed > most or len(self.running) - len(worse) >= self.max_running:
            self.blocks.release(cached)
            return False
        while needed > self.blocks.free_blocks or len(self.running) >= self.max_running:
            self._preempt(self.running[-1], chunks)
        return True

    def _grow(self, request: Request, count: int, chunks: dict[int, Chunk]) -> bool:
        """Blocks for the next `count` tokens, taken from the last in order if need be; False: that was itself."""
        needed = -(-(request.computed + count) // self.blocks.block_size) - len(request.blocks)
        while (fresh := self.blocks.allocate(needed)) is None:
            victim = self.running[-1]
            if victim is request and self.loader:
                return False  # the loads give theirs back at once
            self._preempt(victim, chunks)
            if victim is request:
                return False
        request.blocks += fresh
        return True

    def _preempt(self, victim: Request, chunks: dict[int, Chunk]) -> None:
        self.running.remove(victim)
        self._give_back(victim)
        self.add(victim)
        chunks.pop(victim.id, None)
        self.preemptions += 1

    def _give_back(self, request: Request) -> None:
        self.blocks.release(request.blocks)
        request.blocks, request.computed = [], 0
