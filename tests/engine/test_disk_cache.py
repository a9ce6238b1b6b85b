"""Records on disk against a dictionary: what is read was put, or is nothing; the bound holds; damage is noticed."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import stat
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvern.engine.disk_cache import HEADER, PAGE, DiskCache, file_bytes

PAYLOAD = 100
ROOM = 5
NUMBERS = st.integers(0, 9)


def content(number: int, version: int = 0) -> bytes:
    return random.Random(f"{number}/{version}").randbytes(PAYLOAD)


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "rows").rglob("*") if path.is_file()]


class Records(RuleBasedStateMachine):
    """The dictionary is ordered as the disk's index should be: what goes first is first."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.known: OrderedDict[int, bytes] = OrderedDict()
        self.version = 0
        self.open()

    def open(self) -> None:
        self.cache = DiskCache(self.folder, ROOM * PAGE, PAYLOAD)

    def name(self, number: int) -> str:
        return self.cache.name(str(number).encode())

    def path(self, number: int) -> Path:
        name = self.name(number)
        return self.folder / "rows" / name[:2] / name

    @rule(number=NUMBERS)
    def put(self, number: int) -> None:
        self.version += 1
        while len(self.known) >= ROOM:
            self.known.popitem(last=False)
        assert self.cache.put(self.name(number), content(number, self.version))
        self.known.pop(number, None)
        self.known[number] = content(number, self.version)

    @rule(number=NUMBERS)
    def put_what_is_not_wanted(self, number: int) -> None:
        while len(self.known) >= ROOM:
            self.known.popitem(last=False)
        assert not self.cache.put(self.name(number), content(number), lambda: False)

    @rule(number=NUMBERS)
    def read(self, number: int) -> None:
        got = self.cache.read(self.name(number), self.cache.buffer())
        assert (got and bytes(got)) == self.known.get(number)

    @rule(numbers=st.lists(NUMBERS, max_size=4, unique=True))
    def touch(self, numbers: list[int]) -> None:
        self.cache.touch([self.name(one) for one in numbers])
        for one in reversed(numbers):
            if one in self.known:
                self.known.move_to_end(one)

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        self.cache.remove([self.name(number)])
        self.known.pop(number, None)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.known)))
        path, good = self.path(number), self.path(number).read_bytes()
        length = data.draw(
            st.sampled_from([0, 1, HEADER.size - 1, HEADER.size, len(good) - 1, len(good), 2 * len(good)])
        )
        bad = bytearray((good + good)[:length])
        if length == len(good):
            bad[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(bad)
        before = self.cache.corrupt
        assert self.cache.read(self.name(number), self.cache.buffer()) is None
        assert self.cache.corrupt == before + 1
        assert not path.exists()
        del self.known[number]

    @precondition(lambda self: len(self.known) > 1)
    @rule(data=st.data())
    def pass_one_off_as_another(self, data: st.DataObject) -> None:
        one, other = data.draw(st.permutations(sorted(self.known)))[:2]
        shutil.copy(self.path(one), self.path(other))
        assert self.cache.read(self.name(other), self.cache.buffer()) is None
        del self.known[other]

    @rule(part=st.binary(max_size=200), number=NUMBERS)
    def restart(self, part: bytes, number: int) -> None:
        """The order that the files' times tell is set here: it is what touching leaves to a restart."""
        left = self.path(number)
        left.parent.mkdir(exist_ok=True)
        left.with_name(f"{left.name}.part").write_bytes(part)
        for at, one in enumerate(self.known):
            os.utime(self.path(one), ns=(at, at))
        self.cache.close()
        self.open()

    @invariant()
    def books_balance(self) -> None:
        assert len(self.cache) == len(self.known)
        assert {self.name(one) for one in self.known} == {path.name for path in files(self.folder)}
        assert self.cache.bytes == len(self.known) * PAGE <= ROOM * PAGE

    def teardown(self) -> None:
        self.cache.close()
        shutil.rmtree(self.folder)


Records.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRecords = Records.TestCase


def write_forever(folder: Path, most: int, life: int, body: bytes) -> None:
    """What a child does until it is killed; it never returns into pytest."""
    try:
        cache = DiskCache(folder, most, len(body))
        for number in itertools.count():
            cache.put(cache.name(b"%d/%d" % (life, number)), body)
    finally:
        os._exit(1)


def test_a_process_killed_at_any_moment_leaves_whole_records(tmp_path: Path) -> None:
    payload, most = 200_000, 6 * file_bytes(200_000)
    body = random.Random(0).randbytes(payload)
    kept = 0
    for attempt in range(25):
        child = os.fork()
        if child == 0:
            write_forever(tmp_path, most, attempt, body)
        time.sleep(0.004 * (1 + attempt % 7))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cache = DiskCache(tmp_path, most, payload)
        names = [path.name for path in files(tmp_path)]
        assert len(cache) == len(names)
        assert cache.bytes <= most
        assert all(bytes(cache.read(name, cache.buffer()) or b"") == body for name in names)
        assert cache.corrupt == 0
        kept += len(names)
        cache.close()
    assert kept > 20


def test_a_chain_goes_from_its_end_also_after_a_restart(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 8 * PAGE, PAYLOAD)
    chains = [[cache.name(bytes([chain, at])) for at in range(4)] for chain in range(2)]
    for chain in chains:
        for name in chain:
            cache.put(name, content(0))
    cache.touch(chains[1])
    cache.touch(chains[0])
    cache.close()
    cache = DiskCache(tmp_path, 3 * PAGE, PAYLOAD)
    assert [name in cache for name in chains[0]] == [True, True, True, False]
    assert not any(name in cache for name in chains[1])


def test_names_tell_nothing_without_the_folders_key(tmp_path: Path) -> None:
    one, other = (DiskCache(tmp_path / name, PAGE, PAYLOAD) for name in "ab")
    assert one.name(b"prefix") != other.name(b"prefix")
    one.put(one.name(b"prefix"), content(0))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").rglob("*")}
    assert modes["key"] == modes["lock"] == modes[one.name(b"prefix")] == 0o600
    assert modes["rows"] == modes[one.name(b"prefix")[:2]] == 0o700


@pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
def test_with_a_broken_key_nothing_of_old_is_found_and_all_of_it_is_counted(tmp_path: Path, key: bytes) -> None:
    cache = DiskCache(tmp_path, 4 * PAGE, PAYLOAD)
    name = cache.name(b"prefix")
    cache.put(name, content(0))
    cache.close()
    (tmp_path / "key").write_bytes(key)
    cache = DiskCache(tmp_path, 4 * PAGE, PAYLOAD)
    assert cache.name(b"prefix") != name
    assert cache.bytes == PAGE


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = DiskCache(tmp_path, PAGE, PAYLOAD)
    with pytest.raises(OSError, match="another process uses the folder"):
        DiskCache(tmp_path, PAGE, PAYLOAD)
    first.close()
    DiskCache(tmp_path, PAGE, PAYLOAD).close()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / "notes.txt", tmp_path / "rows" / "notes.txt", tmp_path / "rows" / "ab" / "notes.part"]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    cache = DiskCache(tmp_path, PAGE, PAYLOAD)
    for number in range(3):
        cache.put(cache.name(bytes([number])), content(number))
    assert all(path.read_text() == "mine" for path in others)


def test_a_folder_that_disappears_comes_back(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "a", 4 * PAGE, PAYLOAD)
    cache.put(cache.name(b"1"), content(1))
    shutil.rmtree(tmp_path / "a" / "rows")
    assert cache.read(cache.name(b"1"), cache.buffer()) is None
    assert cache.put(cache.name(b"1"), content(2))
    assert bytes(cache.read(cache.name(b"1"), cache.buffer()) or b"") == content(2)


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 4 * PAGE, PAYLOAD)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cache.put(cache.name(b"1"), content(1))
    assert files(tmp_path) == []
    assert (len(cache), cache.bytes) == (0, 0)
