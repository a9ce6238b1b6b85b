"""Where models lie on this machine: what was pulled, and its import in V3 form, made at first use.

Layout: CACHE/downloads/NAME/FILE as fetched (see `pull`), CACHE/models/NAME-DTYPE the import; bundled models lie in the
package. Finding a model costs a
few looks at files; the code that downloads and converts is imported only where there is something to do.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from kvern.checkpoint.bundled import BUNDLED, bundled_folder, is_bundled
from kvern.checkpoint.file_hash import FileHash, hash_file
from kvern.checkpoint.known_models import KNOWN, KnownModel, find_model
from kvern.checkpoint.save import Progress
from kvern.config import MODEL_TYPES, read_config_json
from kvern.errors import DownloadError, NotFoundError

DType = Literal["f32", "bf16", "fp8"]
LEDGER = "verified.json"


def cache_folder() -> Path:
    """Where models are kept: KVERN_CACHE, or ~/.cache/kvern."""
    return Path(os.environ.get("KVERN_CACHE") or Path.home() / ".cache" / "kvern")


def work_folder(folder: Path) -> Path:
    """Where what is made of the checkpoint in `folder` is kept: beside it, or in the cache for a bundled one."""
    if not is_bundled(folder):
        return folder
    made = cache_folder() / "models" / f"{folder.name}-bundled"
    with suppress(OSError):  # whoever writes there says what is wrong
        made.mkdir(parents=True, exist_ok=True)
    return made


def pulled_path(model: KnownModel, cache: Path | None = None) -> Path | None:
    """Where the download of `model` lies, or None while it is missing or incomplete. Hashes nothing."""
    folder = (cache or cache_folder()) / "downloads" / model.name
    if model.file is None:
        return folder if Ledger(folder).complete else None
    path = folder / model.file.name
    return path if path.is_file() and path.stat().st_size == model.file.size else None


def ensure_imported(
    name_or_path: str | Path, dtype: DType = "bf16", progress: Progress | None = None, *, cache: Path | None = None
) -> Path:
    """A V3 checkpoint folder for a bundled or known name, a GGUF file or a model folder; imported once, then reused.

    A folder that already is of the V3 family, pulled or given, is returned as it is. Never touches the network:
    raises NotFoundError when the named model has not been pulled, or is not in this installation.
    """
    if str(name_or_path) in BUNDLED:
        return bundled_folder(str(name_or_path))
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
    from kvern.checkpoint.convert import fingerprint

    return _imported(path, root / "models" / f"{path.stem}-{fingerprint(path)[:8]}-{dtype}", dtype, progress)


def _imported(source: Path, target: Path, dtype: DType, progress: Progress | None) -> Path:
    if not _is_complete(target):
        from kvern.checkpoint.convert import convert

        convert(source, target, dtype=dtype, progress=progress)
    return target


def _is_complete(folder: Path) -> bool:
    """A conversion writes config.json last."""
    return (folder / "config.json").is_file()


class Ledger:
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
