"""The groups of tables that a store holds: a new one is a file of its own and a line here."""

from __future__ import annotations

from kvern.store import batches, files, responses
from kvern.store.schema import Group

GROUPS: tuple[Group, ...] = (files.GROUP, batches.GROUP, responses.GROUP)
