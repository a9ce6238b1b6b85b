"""The corpus: CPython's own standard library and the sources of its documentation, both under the PSF licence.

The library is that of the interpreter that runs this. The documentation is Debian's package of the same minor version
(`python3.11-doc`): installed, or fetched with `apt-get download` and unpacked here. Without it the corpus is the
library alone, which the manifest says.

Left out are what teaches nothing (generated tables of encodings, pydoc's copy of the documentation, files that do not
parse) and what is there twice: equal texts, and files most of whose lines an earlier one has. A file is held out of all
training, and of all generated rows, by its own hash, so a copy of it can never be on the other side.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["library", "tests", "docs"]
Split: TypeAlias = Literal["train", "held-out"]

HELD_OUT = 40
"""One file of so many is never trained on."""

SEEN = 0.8
"""A file with this share of lines that were seen before is dropped."""

TELLING = 20
"""Characters from which on a line counts as seen: shorter ones are in every file."""

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
LEFT_OUT = frozenset({"site-packages", "__pycache__", "pydoc_data", "__phello__", "lib-dynload", "ensurepip"})
GENERATED = (
    "gencodec.py",
    "charmap_build(decoding_table)",
    "# This file was generated",
    "system configuration generated",
)
MANIFEST = "manifest.json"
LICENCES = {
    "library": "PSF-2.0 (the interpreter's LICENSE.txt; a few files carry other permissive notices of their own)",
    "tests": "PSF-2.0",
    "docs": "PSF-2.0; code in the documentation also under Zero-Clause BSD",
}


@dataclass(frozen=True)
class Document:
    """One file. path: relative, with `/`; text: as Unicode, lines ended by \\n."""

    kind: Kind
    path: str
    text: str

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def split(self) -> Split:
        """Decided by the hash alone."""
        return "held-out" if int(self.sha256[:8], 16) % HELD_OUT == 0 else "train"


def collect(folder: Path, *, tests: bool = True, docs: Path | None = None) -> dict[str, Any]:
    """Write the corpus under `folder`, as SPLIT/KIND/PATH, and return its manifest, which lies there as well.

    docs: where the documentation's sources are, None: look for them, and download them into `folder`/downloads.
    """
    sources = docs or find_documentation(folder / "downloads")
    found = [*library(Path(sysconfig.get_path("stdlib")), tests=tests), *documentation(sources)]
    kept = list(without_copies(found))
    for split in ("train", "held-out"):
        shutil.rmtree(folder / split, ignore_errors=True)
        (folder / split).mkdir(parents=True)
    for document in kept:
        path = folder / document.split / document.kind / document.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text, encoding="utf-8")
    manifest = describe(kept, len(found), sources)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def read(folder: Path, split: Split) -> list[Document]:
    """The documents of one side of a corpus that `collect` wrote, in the order of their paths."""
    root = folder / split
    if not (folder / MANIFEST).is_file() or not root.is_dir():
        raise SystemExit(f"there is no corpus in {folder}: run `python -m recipes.nano data` first")
    kinds: tuple[Kind, ...] = ("library", "tests", "docs")
    return [
        Document(kind, path.relative_to(root / kind).as_posix(), path.read_text(encoding="utf-8"))
        for kind in kinds
        for path in sorted((root / kind).rglob("*"))
        if path.is_file()
    ]


def library(root: Path, *, tests: bool = True) -> Iterator[Document]:
    """Python's own modules under `root`; with `tests`, those of its tests too."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        kind: Kind = "tests" if TEST_FOLDERS & set(parts[:-1]) else "library"
        if LEFT_OUT & set(parts) or (kind == "tests" and not tests):
            continue
        text = _source(path)
        if text is not None and not any(mark in text for mark in GENERATED):
            yield Document(kind, "/".join(parts), text)


def documentation(root: Path | None) -> Iterator[Document]:
    """The reStructuredText under `root`; nothing where there is none."""
    if root is None:
        return
    for path in sorted(root.rglob("*.rst.txt")):
        text = path.read_text(encoding="utf-8")
        if text.strip():
            yield Document("docs", path.relative_to(root).as_posix().removesuffix(".txt"), text)


def find_documentation(downloads: Path) -> Path | None:
    """Where the documentation's sources are: installed, unpacked before, or fetched now. None, and said, if nowhere."""
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-doc"
    inside = Path("usr/share/doc") / package.removesuffix("-doc") / "html" / "_sources"
    for root in (Path("/"), downloads / "unpacked"):
        if (root / inside).is_dir():
            return root / inside
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        if not list(downloads.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=downloads, check=True, capture_output=True)
        archive = next(downloads.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, downloads / "unpacked"], check=True, capture_output=True)
        return downloads / "unpacked" / inside
    except (OSError, subprocess.CalledProcessError, StopIteration):
        print(
            f"the documentation is neither installed nor to be had from apt ({package}): the corpus is the standard "
            "library alone. Install the package, or name its html/_sources with --docs",
            file=sys.stderr,
        )
        return None


def without_copies(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents that are not there already, as a whole or line by line."""
    texts: set[str] = set()
    lines: set[int] = set()
    for document in documents:
        own = [hash(line) for line in map(str.strip, document.text.splitlines()) if len(line) >= TELLING]
        copied = bool(own) and sum(line in lines for line in own) >= SEEN * len(own)
        if document.sha256 not in texts and not copied:
            yield document
        texts.add(document.sha256)
        lines.update(own)


def describe(documents: Iterable[Document], found: int, docs: Path | None) -> dict[str, Any]:
    """The manifest: what there is, how much of it, under which licence, and a hash over all of it."""
    listed = list(documents)
    sizes = {
        split: {
            kind: {"files": len(part), "bytes": sum(len(document.text.encode()) for document in part)}
            for kind in LICENCES
            if (part := [one for one in listed if one.kind == kind and one.split == split])
        }
        for split in ("train", "held-out")
    }
    lines = "".join(f"{one.sha256}  {one.split}/{one.kind}/{one.path}\n" for one in listed)
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "documentation": docs is not None,
        "files_found": found,
        "files_kept": len(listed),
        "sizes": sizes,
        "licences": LICENCES,
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "held_out": [f"{one.kind}/{one.path}" for one in listed if one.split == "held-out"],
    }


def _source(path: Path) -> str | None:
    """The text of a module; None where it is not Python to this interpreter."""
    try:
        with tokenize.open(path) as stream:
            text = stream.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None
    return text if text.strip() else None
