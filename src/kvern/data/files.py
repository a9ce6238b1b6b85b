"""Which files a source names, always in the same order, and what tells that they have changed.

A folder gives its regular files, those of folders below it included. What begins with a dot is left out, and links to
folders are not followed: name them as a source of their own.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from kvern.data.options import SourceOptions
from kvern.errors import DataError

CHUNK_BYTES = 1 << 20


def find_files(options: SourceOptions) -> list[Path]:
    """The files of a source, sorted. Raises DataError where there is none, or one is no regular file."""
    path = Path(options.path).expanduser()
    found: set[Path] = set()
    if path.exists():
        found.update(_below(path, path, options) if path.is_dir() else [path])
    else:
        for match in map(Path, glob.glob(str(path), recursive=True)):  # noqa: PTH207 (Path.glob refuses absolute patterns)
            if _is_wanted(match.name, str(match), options, is_folder=match.is_dir()):
                found.update(_below(match, match, options) if match.is_dir() else [match])
    if not found:
        says = "no file is left by include and exclude" if path.exists() else "there is no such file or folder"
        raise DataError(says, file=path)
    for file in found:
        if not file.is_file():
            raise DataError("not a regular file", file=file, hint="name it in exclude")
    return sorted(found)


def _below(folder: Path, root: Path, options: SourceOptions) -> Iterator[Path]:
    with naming(folder):
        entries = list(folder.iterdir())
    for path in entries:
        relative = path.relative_to(root).as_posix()
        is_folder = path.is_dir()
        if path.name.startswith(".") or not _is_wanted(path.name, relative, options, is_folder=is_folder):
            continue
        if not is_folder:
            yield path
        elif not path.is_symlink():
            yield from _below(path, root, options)


def _is_wanted(name: str, relative: str, options: SourceOptions, *, is_folder: bool) -> bool:
    """`include` says which files; `exclude` takes folders, too."""
    if _matches(name, relative, options.exclude):
        return False
    return is_folder or not options.include or _matches(name, relative, options.include)


def _matches(name: str, relative: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(relative, pattern) for pattern in patterns)


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 of names and contents."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(heading(path))
        with naming(path), path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def stamp_of(files: Sequence[Path]) -> str:
    """SHA-256 of names, sizes and times of change: what tells that contents need not be read again."""
    digest = hashlib.sha256()
    for path in files:
        with naming(path):
            status = path.stat()
        digest.update(heading(path) + f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=path) from error


def heading(path: Path) -> bytes:
    """What goes before a file's content into a digest."""
    return b"\0" + os.fsencode(path) + b"\0"
