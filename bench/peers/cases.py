"""The cases of the comparison, and the bars that issue them: how many times the peer's rate Kvern wants to reach.

A case says what is computed, not how an engine is told to: `decode` draws `tokens` for each of `batch` sequences that
have `depth` tokens behind them; `prefill` computes one prompt of `tokens`; `memory` looks at a decode from outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Test = Literal["decode", "prefill", "memory"]
LLAMA, IK, TRANSFORMERS, VLLM = "llama.cpp", "ik_llama.cpp", "transformers", "vllm"
ENGINES = (LLAMA, IK, TRANSFORMERS, VLLM)


@dataclass(frozen=True)
class Bar:
    """The ratio to reach, and the one to aim at."""

    bar: float
    aim: float


@dataclass(frozen=True)
class Case:
    """What every engine is asked for. bits: weights of 8 (FP8, Q8_0) or 4 (int4, Q4_0). rounds: most of them."""

    name: str
    title: str
    test: Test = "decode"
    tokens: int = 128
    batch: int = 1
    depth: int = 0
    bits: int = 8
    busy: bool = False
    avx2: bool = False
    rounds: int = 99
    full: bool = False
    bars: Mapping[str, Bar] = field(default_factory=dict)

    @property
    def peers(self) -> Sequence[str]:
        """Engines that have this case; slow ones are left out where a sample would take minutes."""
        if self.bits == 4 or self.busy or self.avx2 or self.test == "memory":
            return (LLAMA, IK)
        return ENGINES if self.depth == 0 and self.tokens <= 512 else (LLAMA, IK)


def _bars(llama: tuple[float, float], ik: tuple[float, float]) -> dict[str, Bar]:
    return {LLAMA: Bar(*llama), IK: Bar(*ik)}


PROMPT = 16
"""Random tokens before a decode at depth 0."""

BASE = (
    Case("x1", "1 stream", bars=_bars((1.6, 1.9), (1.0, 1.15))),
    Case("x8", "8 streams", tokens=32, batch=8, bars=_bars((1.9, 2.5), (1.2, 1.5))),
    Case("x32", "32 streams", tokens=32, batch=32, bars=_bars((2.0, 3.0), (1.5, 2.0))),
    Case("d4096", "1 stream, depth 4096", tokens=32, depth=4096, bars=_bars((2.4, 4.0), (1.0, 1.4))),
    Case(
        "d16384", "1 stream, depth 16384", tokens=32, depth=16384, rounds=2, full=True, bars=_bars((3, 5), (1.1, 1.6))
    ),
    Case("pp512", "prefill 512", "prefill", 512, bars=_bars((2.5, 4.0), (0.9, 1.3))),
    Case("pp4096", "prefill 4096", "prefill", 4096, bars=_bars((2.5, 4.0), (0.9, 1.3))),
    Case("x1-4bit", "1 stream, 4-bit", bits=4, bars=_bars((1.3, 1.5), (1.0, 1.0))),
    Case("x1-busy", "1 stream, a core busy", tokens=32, busy=True, bars=_bars((2.0, 2.0), (2.0, 2.0))),
    Case("x1-avx2", "1 stream, AVX2 only", avx2=True, full=True, bars=_bars((1.1, 1.3), (1.0, 1.0))),
    Case("memory", "memory at rest, depth 4096", "memory", 64, depth=4096, rounds=1, bars={LLAMA: Bar(1.0, 1.0)}),
)
CODER = (
    Case("x1", "1 stream", bars=_bars((1.05, 1.05), (1.0, 1.0))),
    Case("x16", "16 streams", tokens=32, batch=16, bars=_bars((1.8, 1.8), (1.3, 1.3))),
    Case("pp512", "prefill 512", "prefill", 512),
    Case("d4096", "1 stream, depth 4096", tokens=32, depth=4096, full=True),
    Case("x1-4bit", "1 stream, 4-bit", bits=4, full=True),
    Case("memory", "memory at rest, depth 4096", "memory", 64, depth=4096, rounds=1),
)


def chosen(model: str, names: Sequence[str] | None, full: bool) -> list[Case]:
    """The cases of a model: those named, or all, the long ones only with `full`. ValueError for a name it has not."""
    cases = BASE if model == "base" else CODER
    if names is None:
        return [case for case in cases if full or not case.full]
    unknown = set(names) - {case.name for case in cases}
    if unknown:
        known = ", ".join(case.name for case in cases)
        raise ValueError(f"{model} has no case {', '.join(sorted(unknown))}; it has {known}")
    return [case for case in cases if case.name in names]
