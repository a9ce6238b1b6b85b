"""A group of tables with a version of its own, so that groups grow without knowing each other.

A store notes the version of each group that it holds. Opening it makes the groups it lacks, and takes older ones
through their migrations, one version at a time, in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, insert, select, update

from kvern.errors import ConfigError

Migration: TypeAlias = Callable[[Connection], object]

VERSIONS = Table(
    "kvern_schema", MetaData(), Column("name", String(64), primary_key=True), Column("version", Integer, nullable=False)
)


@dataclass(frozen=True)
class Group:
    """Tables that belong together. `migrations[i]` turns version i + 1 into i + 2; `metadata` is the newest."""

    name: str
    metadata: MetaData
    migrations: tuple[Migration, ...] = ()

    @property
    def version(self) -> int:
        """The version that `metadata` describes."""
        return len(self.migrations) + 1

    def prepare(self, connection: Connection, where: str) -> None:
        """Make the group's tables, or bring them up to date. Raises ConfigError for a store of a newer Kvern."""
        found = connection.scalar(select(VERSIONS.c.version).where(VERSIONS.c.name == self.name))
        if found is None:
            self.metadata.create_all(connection, checkfirst=False)
            connection.execute(insert(VERSIONS).values(name=self.name, version=self.version))
            return
        if found > self.version:
            raise ConfigError(
                f"{where}: the tables of {self.name} have version {found}, and this Kvern knows {self.version}",
                hint="a newer Kvern wrote this store: use that one, or another store",
            )
        for migrate in self.migrations[found - 1 :]:
            migrate(connection)
        connection.execute(update(VERSIONS).where(VERSIONS.c.name == self.name).values(version=self.version))
