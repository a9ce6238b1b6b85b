"""What outlives the process: files, batches and their rows, in SQLite or PostgreSQL.

`database` opens a store, and is the only place that does. `schema` says what a group of tables is; each group has a
file of its own, with its tables and the statements over them as functions of an open transaction.
"""

from kvern.store.database import Store

__all__ = ["Store"]
