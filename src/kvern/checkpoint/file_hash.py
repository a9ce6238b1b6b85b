"""Hashes of downloaded files: SHA-256, or the SHA-1 of git's blob object, whichever the source states."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvern.errors import DownloadError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileHash:
    """`algorithm` is sha256, or git: the SHA-1 over "blob SIZE\\0" and the content."""

    algorithm: str
    digest: str


def check_file(path: Path, size: int, expected: FileHash) -> None:
    """Verify a temporary file, deleting it when it is wrong, since continuing from it could never succeed."""
    found = hash_file(path, expected.algorithm)
    if path.stat().st_size == size and found == expected.digest:
        return
    path.unlink()
    raise DownloadError(
        f"{path.name.removesuffix('.part')}: wrong {expected.algorithm}: expected {expected.digest}, found {found}",
        hint="the download was discarded, nothing else was touched; try again, or another --source",
    )


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file; `git` is the SHA-1 of git's blob object."""
    digest: Any = hashlib.sha256()
    if algorithm == "git":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())
