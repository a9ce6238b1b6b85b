"""Which cache block belongs to whom: reference counts, a prefix cache over full blocks, least-recently-used eviction.

A full block is known by a chained hash, h_i = H(h_{i-1}, its tokens) with h_{-1} = H(salt), so equal hashes mean equal
prefixes under the same salt: what one tenant computed is invisible under another's salt. A block without owner keeps
its contents and its hash until it is needed again. `check` proves that the books balance.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain


class BlockManager:
    """Owns the numbers 0 .. blocks - 1; knows nothing of what the blocks hold."""

    def __init__(self, blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.blocks, self.block_size, self.prefix_caching = blocks, block_size, prefix_caching
        self._references = [0] * blocks
        self._hash_of: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        """Blocks without owner, the next to be used first: those without a hash, then the longest unused."""

    @property
    def free_blocks(self) -> int:
        """Blocks that `allocate` can give out."""
        return len(self._free)

    def hashes(self, tokens: Sequence[int], salt: bytes, known: list[bytes]) -> list[bytes]:
        """Extend `known`, the chain of the first full blocks of `tokens`, to all of its full blocks."""
        size = self.block_size
        for start in range(len(known) * size, len(tokens) - size + 1, size):
            before = known[-1] if known else hashlib.blake2b(salt, digest_size=32).digest()
            block = array("q", tokens[start : start + size]).tobytes()
            known.append(hashlib.blake2b(before + block, digest_size=32).digest())
        return known

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest cached prefix of the chain; nobody's count changes."""
        found = []
        for one in hashes:
            block = self._block_of.get(one)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Count one more owner of each block."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one owner each, their former contents forgotten; None if there are fewer."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Count one owner less of each; the end of a sequence is evicted before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def freed_by(self, owners: Iterable[Sequence[int]]) -> int:
        """How many blocks would be without owner if these owners gave theirs back; nobody's count changes."""
        counted = Counter(chain.from_iterable(owners))
        return sum(count == self._references[block] for block, count in counted.items())

    def seal(self, block: int, block_hash: bytes) -> None:
        """A block became full: from now on others can find it by its hash."""
        if self.prefix_caching and self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def unseal(self, blocks: Iterable[int]) -> None:
        """What these blocks hold cannot be trusted: from now on nobody finds them."""
        for block in blocks:
            self._forget(block)

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books balance with these owners' blocks."""
        counted = [0] * self.blocks
        for blocks in owners:
            if len(set(blocks)) != len(blocks):
                raise AssertionError("an owner holds a block twice")
            for block in blocks:
                counted[block] += 1
        if counted != self._references:
            raise AssertionError("reference counts differ from what the owners hold")
        if set(self._free) != {block for block, count in enumerate(counted) if count == 0}:
            raise AssertionError("the free list differs from the blocks without owner")
        if {h: b for b, h in enumerate(self._hash_of) if h is not None} != self._block_of:
            raise AssertionError("the prefix cache points at blocks that hold something else")

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
