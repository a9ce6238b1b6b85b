"""How each engine is told to run a case, and how its answer is read. One process a sample, so that runs can alternate.

Kvern through `kvern bench engine`, llama.cpp through llama-bench and llama-batched-bench, the others through the
drivers beside this file. Each gets all usable cores as threads and random tokens.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.cases import IK, LLAMA, PROMPT, TRANSFORMERS, VLLM, Case
from bench.peers.checkpoints import DRIVERS, Checkpoints
from bench.peers.setup import NotAvailable, Setup

from kvern.plan.hardware import default_threads

OURS = "kvern"
SPARE = 64
"""Cache tokens beyond a case's own."""


@dataclass(frozen=True)
class Sample:
    """Tokens a second; what Kvern says about its traffic, where it does.

    For `memory`: resident bytes beyond those of the runtime without a model, and those (interpreter, torch).
    """

    value: float
    bytes_per_token: float | None = None
    gb_per_s: float | None = None
    bandwidth_share: float | None = None
    runtime_bytes: float | None = None


@dataclass(frozen=True)
class Command:
    """A process that measures one sample: its stdout goes through `read`. idle: the same runtime without a model."""

    argv: tuple[str, ...]
    read: Callable[[str], Sample]
    env: Mapping[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Engines:
    """Commands for every engine. allow_avx2: whether llama.cpp may be compiled a second time. ik_source: compile ik."""

    setup: Setup
    checkpoints: Checkpoints
    allow_avx2: bool = False
    ik_source: bool = True

    def command(self, engine: str, case: Case) -> Command:
        """Make what it needs first. NotAvailable says why the engine does not run the case."""
        makers = {
            OURS: self._kvern,
            LLAMA: self._llama,
            IK: self._ik,
            TRANSFORMERS: self._transformers,
            VLLM: self._vllm,
        }
        return makers[engine](case)

    def _kvern(self, case: Case) -> Command:
        folder = self.checkpoints.ours(case.bits)
        prefill = case.test == "prefill"
        sizes = ["--prompt", str(case.tokens if prefill else PROMPT), "--decode", "1" if prefill else str(case.tokens)]
        place = ["--depth", str(case.depth), "--batch", str(case.batch)]
        argv = (sys.executable, "-m", "kvern", "bench", "engine", str(folder), *sizes, *place, "--json")
        idle = (sys.executable, "-c", f"import time, kvern.bench.engine; {IDLE}")
        return Command(argv, lambda text: read_kvern(text, case), {"KVERN_ISA": "avx2"} if case.avx2 else {}, idle)

    def _llama(self, case: Case) -> Command:
        if case.avx2 and not self.allow_avx2:
            raise NotAvailable("the AVX2 build is made with --avx2 or --full")
        tools = self.setup.llama_tools(avx2=case.avx2, amx=self._llama_amx_works(case))
        model = self.checkpoints.gguf(case.bits)
        if case.batch > 1 or case.test == "memory":
            return Command(tuple(batched_arguments(tools, model, case)), read_batched)
        sizes = ["-p", str(case.tokens), "-n", "0"] if case.test == "prefill" else ["-p", "0", "-n", str(case.tokens)]
        argv = [str(tools / "llama-bench"), "-m", str(model), "-t", str(default_threads()), *sizes]
        argv += ["-d", str(case.depth), "-r", "1", "-o", "jsonl"]
        argv += ["--no-warmup"] if case.test == "prefill" and case.tokens > 512 else []
        return Command(tuple(argv), read_llama_bench)

    def _llama_amx_works(self, case: Case) -> bool:
        """Not with latent attention (an assertion), nor with several rows at a time (a segmentation fault)."""
        return self.checkpoints.model != "base" and case.batch == 1 and case.test == "decode"

    def _ik(self, case: Case) -> Command:
        python, model = self.setup.ik_python(), self.checkpoints.gguf(case.bits)
        env = {"IK_LLAMA_CPP_LIB_PATH": str(self.setup.ik_library())} if self.ik_source and not case.avx2 else {}
        idle = (str(python), "-c", f"import time, ik_llama_cpp; {IDLE}")
        return Command((*_driver("drive_ik.py", python, model, case), "--threads", _threads()), read_driver, env, idle)

    def _transformers(self, case: Case) -> Command:
        base = self.checkpoints.model == "base"
        model = self.checkpoints.bf16() if base else self.checkpoints.qwen2()
        return Command(_driver("drive_transformers.py", Path(sys.executable), model, case), read_driver)

    def _vllm(self, case: Case) -> Command:
        if self.checkpoints.model != "base":
            raise NotAvailable("only `base` is tried in vLLM")
        env = {"VLLM_CPU_KVCACHE_SPACE": "3", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        python = self.setup.vllm_python()
        return Command(_driver("drive_vllm.py", python, self.checkpoints.bf16(), case), read_driver, env)


IDLE = "print('{\"tokens_per_s\": 0}', flush=True); time.sleep(1)"


def batched_arguments(tools: Path, model: Path, case: Case) -> list[str]:
    """llama-batched-bench: every sequence has a prompt of its own."""
    prompt = case.depth or PROMPT
    context = case.batch * (prompt + case.tokens) + SPARE
    argv = [str(tools / "llama-batched-bench"), "-m", str(model), "-t", _threads(), "-c", str(context)]
    argv += ["-npp", str(prompt), "-ntg", str(case.tokens), "-npl", str(case.batch)]
    return [*argv, "--output-format", "jsonl"]


def read_kvern(text: str, case: Case) -> Sample:
    """The row of `kvern bench engine --json` that is the case's."""
    test = "prefill" if case.test == "prefill" else "decode"
    rows = [row for row in json.loads(text) if row["test"] == test and row["tokens"] == case.tokens]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of {test} {case.tokens}")
    (row,) = rows
    return Sample(row["tokens_per_s"], row["bytes_per_token"], row["gb_per_s"], row["bandwidth_share"])


def read_llama_bench(text: str) -> Sample:
    """The one line of llama-bench -o jsonl."""
    return Sample(float(_only_json(text, "avg_ts")["avg_ts"]))


def read_batched(text: str) -> Sample:
    """The one line of llama-batched-bench --output-format jsonl, among its log."""
    return Sample(float(_only_json(text, "speed_tg")["speed_tg"]))


def read_driver(text: str) -> Sample:
    """The JSON line of a driver."""
    return Sample(float(_only_json(text, "tokens_per_s")["tokens_per_s"]))


def _only_json(text: str, key: str) -> dict[str, Any]:
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            found += [row] if key in row else []
    if len(found) != 1:
        raise ValueError(f"{len(found)} lines with {key}")
    result: dict[str, Any] = found[0]
    return result


def _driver(script: str, python: Path, model: Path, case: Case) -> tuple[str, ...]:
    test = "prefill" if case.test == "prefill" else "decode"
    sizes = ("--tokens", str(case.tokens), "--batch", str(case.batch), "--depth", str(case.depth))
    return (str(python), str(DRIVERS / script), str(model), "--test", test, *sizes)


def _threads() -> str:
    return str(default_threads())
