"""The block manager against a naive model: counts, order of eviction, chained hashes; corrupted books are noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvern.engine.block_manager import BlockManager

BLOCKS = 6


def sealed(manager: BlockManager, tokens: list[int], salt: bytes = b"") -> list[int]:
    """Allocate and seal the full blocks of `tokens`."""
    hashes = manager.hashes(tokens, salt, [])
    blocks = manager.allocate(len(hashes))
    assert blocks is not None
    for block, one in zip(blocks, hashes, strict=True):
        manager.seal(block, one)
    return blocks


def found(manager: BlockManager, tokens: list[int], salt: bytes = b"") -> list[int]:
    return manager.match(manager.hashes(tokens, salt, []))


def test_allocates_all_or_nothing() -> None:
    manager = BlockManager(3, 4)
    assert manager.allocate(4) is None
    assert manager.free_blocks == 3
    blocks = manager.allocate(3)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2]
    assert manager.allocate(1) is None
    assert manager.allocate(0) == []


def test_a_block_is_free_when_its_last_owner_left() -> None:
    manager = BlockManager(2, 4)
    blocks = sealed(manager, [1, 2, 3, 4])
    manager.acquire(blocks)
    manager.release(blocks)
    assert manager.free_blocks == 1
    manager.release(blocks)
    assert manager.free_blocks == 2


def test_only_full_blocks_have_a_hash_and_known_ones_are_kept() -> None:
    manager = BlockManager(2, 4)
    chain = manager.hashes(list(range(11)), b"", [])
    assert len(chain) == 2
    assert manager.hashes(list(range(12)), b"", list(chain))[:2] == chain
    assert manager.hashes(list(range(12)), b"", list(chain)) == manager.hashes(list(range(12)), b"", [])


def test_a_hash_names_everything_before_it() -> None:
    manager = BlockManager(9, 2)
    sealed(manager, [1, 2, 3, 4])
    assert len(found(manager, [1, 2, 3, 4, 5, 6])) == 2
    assert len(found(manager, [1, 2, 9, 4])) == 1
    assert found(manager, [9, 2, 3, 4]) == []
    assert found(manager, [3, 4]) == []
    assert found(manager, [2, 1, 3, 4]) == []


def test_a_token_of_several_bytes_is_not_two_tokens() -> None:
    manager = BlockManager(9, 2)
    sealed(manager, [1, 256])
    assert found(manager, [257, 0]) == []
    assert found(manager, [1, 256]) != []


def test_salts_do_not_share() -> None:
    manager = BlockManager(9, 2)
    sealed(manager, [1, 2, 3, 4], b"one")
    assert found(manager, [1, 2, 3, 4], b"two") == []
    assert found(manager, [1, 2, 3, 4]) == []
    assert len(found(manager, [1, 2, 3, 4], b"one")) == 2


def test_the_longest_unused_is_evicted_first_and_an_end_before_its_beginning() -> None:
    manager = BlockManager(4, 1)
    first, second = sealed(manager, [1, 2]), sealed(manager, [8, 9])
    manager.release(second)
    manager.release(first)
    assert manager.allocate(1) == [second[1]]
    assert manager.allocate(1) == [second[0]]
    assert manager.allocate(1) == [first[1]]
    assert found(manager, [1, 2]) == [first[0]]


def test_blocks_without_contents_are_used_before_any_eviction() -> None:
    manager = BlockManager(4, 1)
    kept = sealed(manager, [1, 2])
    manager.release(kept)
    blank = manager.allocate(2)
    assert blank is not None
    assert not set(blank) & set(kept)
    manager.release(blank)
    again = manager.allocate(2)
    assert again is not None
    assert set(again) == set(blank)


def test_an_acquired_block_is_not_evicted() -> None:
    manager = BlockManager(2, 1)
    blocks = sealed(manager, [1, 2])
    manager.release(blocks)
    manager.acquire(blocks[:1])
    assert manager.allocate(1) == [blocks[1]]
    assert manager.allocate(1) is None
    assert found(manager, [1]) == blocks[:1]


def test_the_first_of_two_equal_blocks_is_the_one_found() -> None:
    manager = BlockManager(4, 1)
    first, second = sealed(manager, [5]), sealed(manager, [5])
    assert found(manager, [5]) == first
    manager.release(second)
    manager.check([first])


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager(4, 1, prefix_caching=False)
    sealed(manager, [1])
    assert found(manager, [1]) == []


def _twice(manager: BlockManager) -> None:
    manager._references[0] += 1


def _lost(manager: BlockManager) -> None:
    manager._references[0] -= 1


def _leaked(manager: BlockManager) -> None:
    manager._free.popitem()


def _given_away(manager: BlockManager) -> None:
    manager._free[0] = None


def _wrong_hash(manager: BlockManager) -> None:
    manager._hash_of[0] = b"other"


def _forgotten_hash(manager: BlockManager) -> None:
    manager._block_of.clear()


def _wrong_block(manager: BlockManager) -> None:
    one, other = list(manager._block_of)
    manager._block_of[one], manager._block_of[other] = manager._block_of[other], manager._block_of[one]


@pytest.mark.parametrize(
    "corrupt",
    [_twice, _lost, _leaked, _given_away, _wrong_hash, _forgotten_hash, _wrong_block],
    ids=lambda f: f.__name__,
)
def test_corrupted_books_are_noticed(corrupt: Callable[[BlockManager], None]) -> None:
    manager = BlockManager(4, 1)
    owner = sealed(manager, [1, 2])
    manager.check([owner])
    corrupt(manager)
    with pytest.raises(AssertionError, match=r"differ|prefix cache"):
        manager.check([owner])


@pytest.mark.parametrize("owners", [[], [[0]], [[0, 1, 2]], [[0, 1], [1]], [[0, 0, 1]]], ids=str)
def test_owners_that_do_not_match_the_books_are_noticed(owners: list[list[int]]) -> None:
    manager = BlockManager(4, 1)
    sealed(manager, [1, 2])
    with pytest.raises(AssertionError):
        manager.check(owners)


class Books(RuleBasedStateMachine):
    """Sequences come, grow, share and go; the model keeps owners, contents and the order of the free blocks."""

    @initialize(size=st.integers(1, 3), caching=st.booleans())
    def begin(self, size: int, caching: bool) -> None:
        self.size, self.caching = size, caching
        self.manager = BlockManager(BLOCKS, size, caching)
        self.owners: list[tuple[bytes, list[int], list[int]]] = []  # salt, tokens, blocks
        self.contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # block -> salt, whole prefix that it ends
        self.free = list(range(BLOCKS))

    def longest(self, salt: bytes, tokens: list[int]) -> list[int]:
        blocks = []
        for end in range(self.size, len(tokens) + 1, self.size):
            block = next((b for b, what in self.contents.items() if what == (salt, tuple(tokens[:end]))), None)
            if block is None:
                break
            blocks.append(block)
        return blocks

    @rule(salt=st.sampled_from([b"", b"x"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def enter(self, salt: bytes, tokens: list[int]) -> None:
        hashes = self.manager.hashes(tokens, salt, [])
        cached = self.manager.match(hashes)
        assert cached == self.longest(salt, tokens)
        self.manager.acquire(cached)
        self.free = [block for block in self.free if block not in cached]
        needed = -(-len(tokens) // self.size) - len(cached)
        fresh = self.manager.allocate(needed)
        if needed > len(self.free):
            assert fresh is None
            self.manager.release(cached)
            self.freed(cached)
            return
        assert fresh == self.free[:needed]
        self.free = self.free[needed:]
        for block in fresh:
            self.contents.pop(block, None)
        blocks = cached + fresh
        for index in range(len(cached), len(hashes)):
            self.manager.seal(blocks[index], hashes[index])
            what = (salt, tuple(tokens[: (index + 1) * self.size]))
            if self.caching and what not in self.contents.values():
                self.contents[blocks[index]] = what
        self.owners.append((salt, tokens, blocks))

    @precondition(lambda self: self.owners)
    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        _, _, blocks = self.owners.pop(which % len(self.owners))
        self.manager.release(blocks)
        self.freed(blocks)

    def freed(self, blocks: list[int]) -> None:
        held = {block for _, _, owned in self.owners for block in owned}
        for block in reversed(blocks):
            if block not in held:
                self.free = [*self.free, block] if block in self.contents else [block, *self.free]

    @invariant()
    def balances(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check(blocks for _, _, blocks in self.owners)
        assert list(self.manager._free) == self.free
        assert self.manager.free_blocks == len(self.free)
        for block in range(BLOCKS):
            assert self.manager._references[block] == sum(block in blocks for _, _, blocks in self.owners)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=40)
