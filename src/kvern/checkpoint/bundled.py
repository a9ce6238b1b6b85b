"""Models that ship inside the package, as data: nothing to pull, nothing to convert, no network ever.

Their folders are checkpoints like any other, in `kvern/models/NAME`. What Kvern makes of a checkpoint, such as its
packed weights, goes to the cache instead: an installed package stays as it was installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kvern.errors import NotFoundError


@dataclass(frozen=True)
class BundledModel:
    """A model of the package, for lists of models."""

    name: str
    title: str
    licence: str


BUNDLED = {
    "nano": BundledModel("nano", "kvern-nano, trained by Kvern itself, FP8", "MIT; trained on PSF-2.0 sources"),
}


def models_root() -> Path:
    """The folder of the package that holds them, whether it is installed from a wheel or editable."""
    return Path(str(resources.files("kvern").joinpath("models")))


def bundled_folder(name: str) -> Path:
    """The checkpoint folder of the bundled model `name`. NotFoundError where this installation lacks its weights."""
    folder = models_root() / name
    if not (folder / "config.json").is_file():
        raise NotFoundError(
            f"{name} ships with Kvern, but this installation has no weights in {folder}",
            hint="reinstall kvern, or run another model: `kvern pull coder-0.5b`",
        )
    return folder


def is_bundled(folder: Path) -> bool:
    """Whether this checkpoint folder is one of the package's."""
    return folder.resolve().parent == models_root().resolve()
