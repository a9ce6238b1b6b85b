"""Puts an exported checkpoint into the package: `python -m recipes.nano bundle FOLDER`.

The folder must be what `kvern train export` wrote in FP8, small enough, and of the shape that configs/nano.toml gives.
Beside it go the licence of the interpreter whose library was used, and the notice that is in the package already.
"""

from __future__ import annotations

import shutil
import sysconfig
import tomllib
from dataclasses import replace
from pathlib import Path

from kvern.checkpoint.bundled import models_root
from kvern.checkpoint.reader import CheckpointReader
from kvern.config import ModelConfig
from kvern.config.quantization import QuantizationConfig
from kvern.errors import CheckpointError

MOST_BYTES = 30_000_000
FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model.safetensors", "model.safetensors.index.json"),
)
OPTIONAL = ("model.safetensors.index.json",)


def bundle(folder: Path, config: Path, target: Path | None = None) -> Path:
    """Check and copy; returns where the model lies now. Raises CheckpointError that says what is wrong."""
    target = target or models_root() / "nano"
    reader = CheckpointReader(folder)  # every header is read and checked
    _check(folder, reader.config, config)
    present = [folder / name for name in FILES if (folder / name).is_file()]
    if missing := [name for name in FILES if name not in OPTIONAL and not (folder / name).is_file()]:
        raise CheckpointError(f"lacks {', '.join(missing)}", file=folder)
    size = sum(path.stat().st_size for path in present)
    if size > MOST_BYTES:
        raise CheckpointError(f"{size:,} bytes are more than the package takes, {MOST_BYTES:,}", file=folder)
    target.mkdir(parents=True, exist_ok=True)
    for path in present:
        shutil.copyfile(path, target / path.name)
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", target / "LICENSE-PSF.txt")
    return target


def _check(folder: Path, found: ModelConfig, config: Path) -> None:
    given = tomllib.loads(config.read_text(encoding="utf-8"))["model"]
    expected = ModelConfig.from_dict({"model_type": "deepseek_v3", **given})
    if not isinstance(found.quantization_config, QuantizationConfig):
        raise CheckpointError("is not in FP8", file=folder, hint="export it with --dtype fp8")
    same = replace(found, quantization_config=None, torch_dtype=expected.torch_dtype)
    if same != expected:
        raise CheckpointError(f"is not of the shape that {config} gives", file=folder)
