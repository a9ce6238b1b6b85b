"""Runs one case in Hugging Face transformers, BF16, and prints one JSON line.

    python drive_transformers.py FOLDER_OR_GGUF --test decode --tokens 128 --batch 1

A V3 folder is loaded as it is; a Qwen2 GGUF through transformers' own GGUF reader. Decode is timed over few steps of
random tokens behind a prompt that is computed first, through the cache, as `generate` would do it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

PROMPT = 16
STEPS = 12
"""Most timed steps: a step takes as long as the one before it."""

WARM_STEPS = 2


def load(path: Path) -> Any:
    """The model in BF16, in eval mode."""
    from transformers import AutoModelForCausalLM

    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **where).eval()


@torch.inference_mode()
def decode_rate(model: Any, tokens: int, batch: int, depth: int) -> float:
    """Tokens a second of all sequences together."""
    out = model(_random(model, batch, depth or PROMPT), use_cache=True, logits_to_keep=1)
    steps, start = min(tokens, STEPS), 0.0
    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            start = time.perf_counter()
        out = model(_random(model, batch, 1), past_key_values=_cache(out), use_cache=True)
    return batch * steps / (time.perf_counter() - start)


@torch.inference_mode()
def prefill_rate(model: Any, tokens: int) -> float:
    """Prompt tokens a second, after one prompt that warms up."""
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        model(_random(model, 1, tokens), use_cache=True, logits_to_keep=1)
    return tokens / (time.perf_counter() - start)


def _cache(out: Any) -> Any:
    """The cache of a forward pass, whose name differs between versions."""
    return out.past_key_values if "past_key_values" in out else out.cache


def _random(model: Any, batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, model.config.vocab_size, (batch, tokens))


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--test", choices=("decode", "prefill"), default="decode")
    for name, default in (("tokens", 128), ("batch", 1), ("depth", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = load(args.model)
    if args.test == "decode":
        rate = decode_rate(model, args.tokens, args.batch, args.depth)
    else:
        rate = prefill_rate(model, args.tokens)
    print(json.dumps({"tokens_per_s": rate}))


if __name__ == "__main__":
    main()
