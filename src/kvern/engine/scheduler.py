"""Decides what the next step computes. There are no phases: every request is "tokens still to compute".

Each step has a budget of tokens. Requests with a single token left (those that decode) go first, so that a long prompt
never holds up an answer; the rest of the budget goes to the others in order of priority and arrival, a chunk each.
A waiting request enters when blocks for all its tokens are free. When blocks run out, the request that is last in order
gives all of its blocks back and waits again; what it had computed stays in the prefix cache until it is overwritten.
The first in order is never preempted, so it advances in every step, and so does everybody in turn.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from kvern.engine.block_manager import BlockManager
from kvern.engine.request import Request


@dataclass(frozen=True)
class Chunk:
    """Compute the next `count` tokens of `request`."""

    request: Request
    count: int


class Scheduler:
    """Holds the running and the waiting requests, both in order."""

    def __init__(self, blocks: BlockManager, step_tokens: int, max_running: int) -> None:
        self.blocks, self.step_tokens, self.max_running = blocks, step_tokens, max_running
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
        budget = self.step_tokens
        for request in sorted(self.running, key=lambda one: (one.pending > 1, one.order)):
            count = min(request.pending, budget)
            if count and request in self.running and self._grow(request, count, chunks):
                chunks[request.id] = Chunk(request, count)
            budget = self.step_tokens - sum(chunk.count for chunk in chunks.values())
        while budget and self.waiting and self._make_room(self.waiting[0], chunks):
            request = self.waiting.pop(0)
            insort(self.running, request, key=lambda one: one.order)
            chunks[request.id] = Chunk(request, min(request.pending, budget))
            self._grow(request, chunks[request.id].count, chunks)
            budget = self.step_tokens - sum(chunk.count for chunk in chunks.values())
        return list(chunks.values())

    def computed(self, chunk: Chunk) -> None:
        """A chunk was computed: its full blocks can be shared from now on."""
        request, size = chunk.request, self.blocks.block_size
        before, request.computed = request.computed // size, request.computed + chunk.count
        full = request.computed // size
        hashes = self.blocks.hashes(request.tokens[: full * size], request.salt, request.block_hashes)
        for index in range(before, full):
            self.blocks.seal(request.blocks[index], hashes[index])

    def _make_room(self, request: Request, chunks: dict[int, Chunk]) -> bool:
        """Give a waiting request its cached prefix, if all its tokens fit then and it may run; else change nothing."""
        while len(self.running) >= self.max_running or not self._enter(request):
            victim = self.running[-1] if self.running else None
            if victim is None or victim.priority <= request.priority:
                return False
            self._preempt(victim, chunks)
        return True

    def _enter(self, request: Request) -> bool:
        size = self.blocks.block_size
        hashes = self.blocks.hashes(request.tokens, request.salt, request.block_hashes)
        usable = (len(request.tokens) - 1) // size  # one token at least must be computed, for its logits
        cached = [] if request.params.prompt_logprobs else self.blocks.match(hashes[:usable])
        self.blocks.acquire(cached)
        if -(-len(request.tokens) // size) - len(cached) > self.blocks.free_blocks:
            self.blocks.release(cached)
            return False
        request.blocks, request.computed = cached, len(cached) * size
        self.prefix_queries += len(request.tokens)
        self.prefix_hits += request.computed
        if request.cached_tokens is None:
            request.cached_tokens = request.computed
        return True

    def _grow(self, request: Request, count: int, chunks: dict[int, Chunk]) -> bool:
        """Blocks for the next `count` tokens, taken from the last in order if need be; False: that was itself."""
        needed = -(-(request.computed + count) // self.blocks.block_size) - len(request.blocks)
        while (fresh := self.blocks.allocate(needed)) is None:
            victim = self.running[-1]
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
