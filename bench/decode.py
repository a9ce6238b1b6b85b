"""Greedy decoding of coder-0.5b: Kvern against transformers' Qwen2 with the same weights, in alternating pairs.

    python -m bench.decode [--tokens 64] [--pairs 5] [--json]

Both start from the same GGUF file: Kvern from its import (BF16), transformers from the dequantised weights in its own
Qwen2 form, in BF16 and in FP32. Both use greedy decoding, a cache, and the same threads; the prompt is not timed. A
ratio compares the two runs of one pair; the table shows medians. The pairs of a run that other work disturbed (load
above 1 at its start) are marked.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from bench.transformers_peer import load_qwen2

from kvern.checkpoint.local import ensure_imported
from kvern.engine import Engine, SamplingParams
from kvern.llm.opening import Dtype, open_model
from kvern.ops import library
from kvern.plan.hardware import default_threads, machine

MODEL = "coder-0.5b"
PROMPT = (750, 282, 3974, 17083, 10939, 982, 262, 4210)  # "def quick_sort(arr):" and the start of its body

ACTIVATIONS: tuple[Dtype, ...] = ("bf16", "f32")

Decode = Callable[[int], float]
"""Tokens to generate -> tokens a second, the first token (the prompt's pass) not counted."""


@dataclass(frozen=True)
class Row:
    """Medians of alternating pairs: tokens a second of both, and of their ratio."""

    ours: str
    theirs: str
    kvern: float
    transformers: float
    ratio: float
    pairs: tuple[tuple[float, float], ...]


def kvern_decode(activations: Dtype) -> Decode:
    """Kvern's engine on the imported checkpoint, its BF16 weights packed."""
    engine = Engine(open_model(ensure_imported(MODEL), activations))

    def run(tokens: int) -> float:
        stream = engine.generate(PROMPT, SamplingParams(max_tokens=tokens, ignore_eos=True))
        next(stream)
        start = time.perf_counter()
        rest = sum(1 for _ in stream)
        return rest / (time.perf_counter() - start)

    return run


def transformers_decode(dtype: torch.dtype) -> Decode:
    """transformers' own Qwen2 with the file's dequantised weights, through its forward and its cache."""
    model = load_qwen2(MODEL, dtype)

    @torch.inference_mode()
    def run(tokens: int) -> float:
        out = model(torch.tensor([PROMPT]), use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.cache
        start = time.perf_counter()
        for _ in range(tokens - 1):
            out = model(token, cache=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return (tokens - 1) / (time.perf_counter() - start)

    return run


def compare(ours: str, decode: Decode, theirs: str, other: Decode, tokens: int, pairs: int) -> Row:
    """Alternate the two, one warm-up each."""
    decode(4)
    other(4)
    results = tuple((decode(tokens), other(tokens)) for _ in range(pairs))
    left, right = (median(column) for column in zip(*results, strict=True))
    return Row(ours, theirs, left, right, median(a / b for a, b in results), results)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a run")
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    load_at_start = os.getloadavg()[0]
    torch.set_num_threads(default_threads())
    rows = measure(args.tokens, args.pairs)
    if args.json:
        print(json.dumps({"load": load_at_start, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print_table(rows, load_at_start)


def measure(tokens: int, pairs: int) -> list[Row]:
    """Kvern with BF16 and FP32 activations, each against transformers in BF16 and FP32."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        other = transformers_decode(dtype)
        for activations in ACTIVATIONS:
            rows.append(compare(activations, kvern_decode(activations), _name(dtype), other, tokens, pairs))
    return rows


def print_table(rows: list[Row], load_at_start: float) -> None:
    """One line a comparison."""
    mark = " (DISTURBED)" if load_at_start > 1 else ""
    threads = f"{library.threads()} threads"
    print(f"{MODEL}, {machine().cpu}, kernels {library.isa()}, {threads}, load {load_at_start:.1f} at the start{mark}")
    print(f"{'Kvern':<32} {'transformers':<12} {'Kvern tok/s':>11} {'theirs':>7} {'ratio':>6}  ratio of each pair")
    for row in rows:
        each = " ".join(f"{a / b:.2f}" for a, b in row.pairs)
        print(f"{row.ours:<32} {row.theirs:<12} {row.kvern:>11.1f} {row.transformers:>7.1f} {row.ratio:>6.2f}  {each}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
