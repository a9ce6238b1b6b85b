"""Opens a store and hands out its transactions; nothing else connects to a database.

    a path, or sqlite:///PATH    SQLite: WAL, and every commit is on the disk before it counts (synchronous=FULL)
    postgresql://...             PostgreSQL through psycopg, for several servers

A writing transaction of SQLite takes the write lock when it begins, so it never finds at its end that another was
faster. What a commit has returned for survives a kill of the process and a loss of power.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from kvern.errors import ConfigError, KvernError
from kvern.store.groups import GROUPS
from kvern.store.schema import VERSIONS, Group

LOCK_SECONDS = 60
"""How long a transaction waits for the write lock of SQLite."""

WRITES = "kvern_writes"
POSTGRESQL = "postgresql+psycopg"


class StoreError(KvernError):
    """The database failed: a full disk, a lost server, a file that is no database."""

    status = 503
    code = "store_failed"


def default_path() -> Path:
    """Where a server keeps what it must not lose: kvern/store.sqlite in XDG_DATA_HOME, or in ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "kvern" / "store.sqlite"


class Store:
    """An open store. `where` is a path or a URL. Raises ConfigError where it can not be opened."""

    def __init__(self, where: str | Path, groups: Sequence[Group] = GROUPS) -> None:
        self.url = _as_url(where)
        self.name = self.url.render_as_string(hide_password=True)
        self._engine = _connect(self.url)
        self._writing = self._engine.execution_options(**{WRITES: True})
        try:
            self._prepare(groups)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path | None:
        """The file, where it is one."""
        return Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store and changes nothing."""
        with self._errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction: all of it is durable when the block ends, nothing where it raises."""
        with self._errors(), self._writing.begin() as connection:
            yield connection

    def claim(self, name: str) -> Callable[[], None] | None:
        """Be the only one to do `name`, over all processes that share the store; None where another is.

        Returns what gives it up. The end of the process, whichever way, gives it up too.
        """
        if self.path is not None:
            return _lock_file(self.path.with_name(f"{self.path.name}.{_digest(name):016x}.lock"))
        with self._errors():
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            if connection.scalar(select(func.pg_try_advisory_lock(_digest(name) - 2**63))):
                return lambda: _unlock(connection)
            connection.close()
            return None

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _prepare(self, groups: Sequence[Group]) -> None:
        try:
            with self.write() as connection:
                if self.path is None:  # two servers that start together: one makes the tables
                    connection.execute(select(func.pg_advisory_xact_lock(_digest("schema") - 2**63)))
                VERSIONS.metadata.create_all(connection)
                for group in groups:
                    group.prepare(connection, self.name)
        except StoreError as error:
            raise ConfigError(f"cannot open the store {self.name}: {error.message}", hint=error.hint) from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise StoreError(f"the database failed: {error.orig}") from error
        except SQLAlchemyError as error:
            raise StoreError(f"the database failed: {error}") from error


def _as_url(where: str | Path) -> URL:
    text = str(where)
    if "://" not in text:
        return URL.create("sqlite", database=str(Path(text).expanduser().absolute()))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"{text!r} is no database URL", hint="a path, or postgresql://user@host/name") from error
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername=POSTGRESQL)
    if url.drivername not in ("sqlite", POSTGRESQL):
        raise ConfigError(f"a store is SQLite or PostgreSQL, not {url.drivername}", hint="a path, or postgresql://...")
    if url.drivername == "sqlite" and not url.database:
        raise ConfigError("a store of SQLite needs a file", hint="sqlite:///PATH, or the path alone")
    return url


def _connect(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        try:
            return create_engine(url, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise ConfigError("PostgreSQL needs psycopg", hint="pip install 'kvern[postgres]'") from error
    path = Path(url.database or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the store's folder {path.parent}: {error.strerror}") from error
    engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says so
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _lock_file(path: Path) -> Callable[[], None] | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return lambda: os.close(descriptor)


def _unlock(connection: Connection) -> None:
    connection.invalidate()  # closes the session, and with it the lock
    connection.close()
