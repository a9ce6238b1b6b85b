"""Brings the prefix of a waiting request from the disk into free blocks, before the request enters.

A load owns its blocks while it runs. Then those that came are sealed and given back, so the scheduler finds them as it
finds every cached prefix; nothing depends on the request, which may have been cancelled. A request waits for one load
of its own at most, or for another's with the same prefix, and for no disk that does not answer: the rest is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvern.engine.block_manager import BlockManager
from kvern.engine.request import Request
from kvern.engine.spill import Load, Spill


class PrefixLoader:
    """The loads of one scheduler."""

    def __init__(self, blocks: BlockManager, spill: Spill) -> None:
        self._blocks, self._spill = blocks, spill
        self._loads: list[Load] = []

    def __bool__(self) -> bool:
        return bool(self._loads)

    def owned(self) -> Iterator[Sequence[int]]:
        """The blocks of each load."""
        return (load.blocks for load in self._loads)

    def holds_up(self, request: Request, prefix: Sequence[bytes], reserve: int, taken: int) -> bool:
        """Whether a waiting request had better wait for its prefix; begins to load it where it could enter then.

        prefix: hashes of the blocks that it may share. reserve: free blocks that are left to those who run. taken:
        blocks that it could take from others.
        """
        kept = self._blocks.match(prefix)
        missing = prefix[len(kept) :]
        if not missing:
            return False
        if any(missing[0] in load.missing for load in self._loads):
            return True
        if request.looked_up:
            return False
        self._blocks.acquire(kept)
        free, needed = self._blocks.free_blocks, -(-len(request.tokens) // self._blocks.block_size) - len(kept)
        count = 0 if needed > free + taken else min(self._spill.found(missing), free - reserve)
        fresh = self._blocks.allocate(count) if count > 0 else None
        if fresh is None:
            self._blocks.release(kept)
            return False
        request.looked_up = True
        hashes = prefix[: len(kept) + count]
        self._loads.append(self._spill.load(hashes, [*kept, *fresh], len(kept)))
        return True

    def take(self) -> None:
        """Let everybody find what has come."""
        for load in list(self._loads):
            if load.finished.is_set() or self._spill.is_stuck(load):
                self._end(load)

    def wait(self, seconds: float) -> None:
        """Until the oldest load is finished, but not longer."""
        if self._loads:
            self._loads[0].finished.wait(seconds)

    def abandon(self) -> None:
        """Forget all loads; none writes to its blocks any more."""
        for load in self._loads:
            load.cancel()
        self._loads.clear()

    def _end(self, load: Load) -> None:
        self._loads.remove(load)
        load.cancel()
        self._spill.loaded(load)
        for index in range(load.kept, load.kept + load.done):
            self._blocks.seal(load.blocks[index], load.hashes[index])
        self._blocks.release(load.blocks)
