"""A file of tokens gives back what was put in, or says that it is damaged; it never appears half written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvern.data import token_file
from kvern.data.token_file import Origin, TokenFile
from kvern.errors import DataError

DOCUMENT = st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), min_size=1, max_size=20)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def write_some(path: Path) -> None:
    with token_file.write(path, 300) as writer:
        writer.add([1, 2, 3], None, 7, Origin("a.py"))
        writer.add([4], [False], 1, Origin("b.jsonl", 2))
        writer.add([299, 0], None, 2, Origin("b.jsonl", 5))
        writer.made_from["seed"] = 3


@settings(max_examples=30)
@given(documents=st.lists(st.tuples(DOCUMENT, st.booleans()), max_size=8), wide=st.booleans())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[list[tuple[int, bool]], bool]], wide: bool
) -> None:
    path = tmp_path_factory.mktemp("files") / "some.tokens"
    limit = 70_001 if wide else 60_000
    kept = [
        ([min(token, limit - 1) for token, _ in pairs], [mark for _, mark in pairs] if marked else None)
        for pairs, marked in documents
    ]
    with token_file.write(path, limit) as writer:
        for number, (ids, marks) in enumerate(kept):
            writer.add(ids, marks, number, Origin(f"file{number % 2}", number))
    file = TokenFile.open(path)
    assert len(file) == len(kept)
    assert file.tokens == sum(len(ids) for ids, _ in kept)
    assert file.lengths.tolist() == [len(ids) for ids, _ in kept]
    assert file.utf8_bytes == sum(range(len(kept)))
    for number, (ids, marks) in enumerate(kept):
        read, learned = file.read(number, 0, len(ids))
        assert read.tolist() == ids
        assert read.itemsize == (4 if wide else 2)
        assert (marks or [True] * len(ids)) == ([True] * len(ids) if learned is None else learned.tolist())
        assert file.origin(number) == Origin(f"file{number % 2}", number)
        assert file.read(number, 1, len(ids))[0].tolist() == ids[1:]
    assert (file._marks is None) == all(marks is None for _, marks in kept)


def test_views_cannot_be_written_to(tmp_path: Path) -> None:
    write_some(tmp_path / "x")
    file = TokenFile.open(tmp_path / "x")
    assert file.made_from == {"seed": 3}
    ids, _ = file.read(0, 0, 3)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 9


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    write_some(tmp_path / "x")
    whole, damaged = (tmp_path / "x").read_bytes(), tmp_path / "damaged"
    for length in range(len(whole)):
        damaged.write_bytes(whole[:length])
        with pytest.raises(DataError):
            TokenFile.open(damaged)
    for place in range(len(whole)):
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"cut short|checksum"):
            TokenFile.open(damaged)
    with pytest.raises(DataError, match="cannot be read"):
        TokenFile.open(tmp_path / "nothing")


def test_another_version_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_some(tmp_path / "x")
    monkeypatch.setattr(token_file, "VERSION", 2)
    with pytest.raises(DataError, match="version 1 of the format, not 2"):
        TokenFile.open(tmp_path / "x")


def write_one(path: Path, ids: list[int], learned: list[bool] | None) -> None:
    with token_file.write(path, 300) as writer:
        writer.add([1], None, 1, Origin("a"))
        writer.add(ids, learned, 1, Origin("b.jsonl", 9))


def test_what_is_refused_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_some(path)
    before = path.read_bytes()
    wrong: list[tuple[list[int], list[bool] | None, str]] = [
        ([], None, "a document without tokens"),
        ([300], None, "300 is outside the vocabulary of 300"),
        ([2, -1], None, "-1 is outside"),
        ([1, 2], [True], "2 tokens and 1 marks"),
    ]
    for ids, learned, says in wrong:
        with pytest.raises(DataError, match=says) as refused:
            write_one(path, ids, learned)
        assert refused.value.message.startswith("b.jsonl:9: ")
        assert path.read_bytes() == before
    assert names(tmp_path) == ["x"]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="x: cannot be written: No space left"):
        write_some(tmp_path / "x")
    assert names(tmp_path) == []
    with pytest.raises(DataError, match="cannot be written"):
        write_some(tmp_path / "no folder" / "x")


KILLED = """
import os, signal, sys
from pathlib import Path
from kvern.data import token_file
from kvern.data.token_file import Origin
with token_file.write(Path(sys.argv[1]), 300) as writer:
    for number in range(60_000):
        writer.add(range(100), None, 1, Origin("a", number))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_minus_nine_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    write_some(tmp_path / "x")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "x")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "x.part").stat().st_size > 1 << 20
    assert len(TokenFile.open(tmp_path / "x")) == 3
    write_some(tmp_path / "x")  # what was left behind is in nobody's way
    assert names(tmp_path) == ["x"]


def test_documents_may_be_arrays(tmp_path: Path) -> None:
    with token_file.write(tmp_path / "x", 10) as writer:
        writer.add(np.array([1, 2], np.uint16), np.array([True, False]), 1, Origin("a"))
    assert TokenFile.open(tmp_path / "x").read(0, 0, 2)[1] is not None
