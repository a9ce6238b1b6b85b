"""Opening a store: where, who else, which version; what a transaction promises."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, insert, inspect, select, text

from kvern.errors import ConfigError
from kvern.store import Store
from kvern.store.database import StoreError, default_path
from kvern.store.schema import VERSIONS, Group

NUMBERS = Table("numbers", MetaData(), Column("value", Integer, primary_key=True))
GROUP = Group("numbers", NUMBERS.metadata)


@pytest.fixture
def store(where: str) -> Iterator[Store]:
    opened = Store(where, [GROUP])
    yield opened
    opened.close()


def values(store: Store) -> list[int]:
    with store.read() as connection:
        return list(connection.scalars(select(NUMBERS.c.value)))


def test_sqlite_is_durable(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.sqlite")
    with store.read() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA synchronous")) == 2
    store.close()


def write_twice(store: Store) -> None:
    with store.write() as connection:
        connection.execute(insert(NUMBERS).values(value=2))
        connection.execute(insert(NUMBERS).values(value=1))


def test_a_transaction_is_all_or_nothing(store: Store, where: str) -> None:
    with store.write() as connection:
        connection.execute(insert(NUMBERS).values(value=1))
    with pytest.raises(StoreError, match=r"(?i)unique"):
        write_twice(store)
    assert values(store) == [1]


def test_a_process_that_is_killed_keeps_what_it_committed(store: Store, where: str) -> None:
    code = (
        "import os, sys; from tests.store.test_database import *\n"
        "store = Store(sys.argv[1], [GROUP])\n"
        "with store.write() as connection: connection.execute(insert(NUMBERS).values(value=7))\n"
        "with store.write() as connection:\n"
        "    connection.execute(insert(NUMBERS).values(value=8)); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, where], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    assert values(store) == [7]


def test_stores_open_again_and_grow_by_migrations(store: Store, where: str) -> None:
    with store.write() as connection:
        connection.execute(insert(NUMBERS).values(value=1))
    older = Group("numbers", NUMBERS.metadata, (lambda c: c.exec_driver_sql("UPDATE numbers SET value = value + 1"),))
    other = Group("others", MetaData())
    for _ in range(2):
        again = Store(where, [older, other])
        assert values(again) == [2]
        with again.read() as connection:
            assert {row.name: row.version for row in connection.execute(select(VERSIONS))} == {
                "numbers": 2,
                "others": 1,
            }
        again.close()
    with pytest.raises(ConfigError, match="the tables of numbers have version 2, and this Kvern knows 1"):
        Store(where, [GROUP])


def test_a_migration_that_fails_changes_nothing(store: Store, where: str) -> None:
    def half(connection: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Store(where, [Group("others", MetaData()), Group("numbers", NUMBERS.metadata, (half,))])
    with store.read() as connection:
        assert list(connection.scalars(select(VERSIONS.c.name))) == ["numbers"]


def test_one_process_holds_a_claim(store: Store, where: str) -> None:
    release = store.claim("work")
    assert release is not None
    other = Store(where, [GROUP])
    assert other.claim("work") is None
    unrelated = store.claim("other work")
    assert unrelated is not None
    unrelated()
    release()
    again = other.claim("work")
    assert again is not None
    again()
    other.close()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mysql://localhost/x", "a store is SQLite or PostgreSQL, not mysql"),
        ("postgresql://:x@@:::/", "is no database URL"),
        ("sqlite://", "a store of SQLite needs a file"),
        ("postgresql://127.0.0.1:1/none", "cannot open the store postgresql"),
        ("/proc/none/store.sqlite", "cannot make the store's folder /proc/none"),
    ],
)
def test_what_is_no_store_is_refused(where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Store(where)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("something else " * 100)
    with pytest.raises(ConfigError, match="file is not a database"):
        Store(path)
    assert path.read_text().startswith("something else")


def test_a_database_that_fails_is_a_typed_error(store: Store, where: str) -> None:
    with pytest.raises(StoreError, match="nowhere"), store.read() as connection:
        connection.execute(text("SELECT 1 FROM nowhere"))


def test_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "kvern" / "store.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == Path.home() / ".local" / "share" / "kvern" / "store.sqlite"


def test_all_groups_have_names_of_their_own(tmp_path: Path) -> None:
    opened = Store(tmp_path / "store.sqlite")
    with opened.read() as connection:
        tables = set(inspect(connection).get_table_names())
    assert {"kvern_schema", "files", "file_chunks", "batches", "batch_rows", "batch_answers"} <= tables
    opened.close()
