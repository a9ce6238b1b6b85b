"""The same weights in every engine's form: BF16 folder, Kvern's FP8 and 4-bit folders, GGUF in Q8_0 and Q4_0.

`base` starts from the synthetic BF16 folder; llama.cpp's own converter and quantiser make the GGUF files. The coder
models start from the pulled GGUF (Q4_K_M): Kvern imports it, llama.cpp requantises the very same numbers and runs them
in their Qwen2 form. Every file is written under another name and renamed, so an existing one is whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.peers import synthetic
from bench.peers.setup import NotAvailable, Setup

DRIVERS = Path(__file__).parent
GGUF_TYPES = {8: "Q8_0", 4: "Q4_0"}


@dataclass(frozen=True)
class Checkpoints:
    """Makes, or finds, the files of one model under `setup.work`/checkpoints."""

    setup: Setup
    model: str

    @property
    def folder(self) -> Path:
        return self.setup.work / "checkpoints"

    def bf16(self) -> Path:
        """The V3 folder in BF16 that `base` is made from."""
        return synthetic.write(self.folder / f"{self.model}-bf16")

    def ours(self, bits: int) -> Path:
        """Kvern's folder: FP8 blocks or 4-bit groups, the head in FP8."""
        dtype, name = {8: ("fp8", "fp8"), 4: ("int4", "int4-head-fp8")}[bits]
        folder = self.folder / f"{self.model}-{name}"
        if not (folder / "config.json").is_file():
            options = ["--dtype", dtype, "--head-fp8"]
            source = self.bf16() if self.model == "base" else self.model
            kvern = [sys.executable, "-m", "kvern", "convert", source, folder]
            self.setup.run(f"convert {folder.name}", [*kvern, *options])
        return folder

    def gguf(self, bits: int) -> Path:
        """llama.cpp's file, which ik_llama.cpp reads as well."""
        kind = GGUF_TYPES[bits]
        return self._made(f"{self.model}-{kind}.gguf", lambda out: self._quantize(out, kind))

    def qwen2(self) -> Path:
        """The pulled GGUF of a coder model."""
        from kvern.checkpoint.known_models import find_model
        from kvern.checkpoint.local import pulled_path

        path = pulled_path(find_model(self.model))
        if path is None:
            raise NotAvailable(f"{self.model} has not been pulled: run `kvern pull {self.model}`")
        return path

    def _quantize(self, out: Path, kind: str) -> None:
        base = self.model == "base"
        source = self._bf16_gguf() if base else self.qwen2()
        tool = self.setup.llama_tools(amx=not base) / "llama-quantize"  # of the build that will run the file
        self.setup.run(f"quantise {self.model} {kind}", [tool, "--allow-requantize", source, out, kind])

    def _bf16_gguf(self) -> Path:
        def make(out: Path) -> None:
            driver = DRIVERS / "drive_convert.py"
            arguments = [self.setup.llama_source, self.bf16(), out]
            self.setup.run(f"convert {out.name}", [sys.executable, driver, *arguments])

        return self._made(f"{self.model}-bf16.gguf", make)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"part-{name}")
            make(part)
            part.rename(path)
        return path
