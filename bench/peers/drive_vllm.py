"""Runs one case in vLLM on the CPU, BF16, eager, and prints one JSON line.

    python drive_vllm.py FOLDER --test decode --tokens 32 --batch 8

vLLM gives no step times offline, so a decode is the difference of two runs of the same batch, with few and with all
tokens; a prefill is the time of one new token. Runs in the peer's environment.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import time
from typing import Any

PROMPT = 16
FEW = 4


def seconds(model: Any, batch: int, prompt: int, tokens: int, vocabulary: int) -> float:
    """Time of one call with random prompts."""
    params = importlib.import_module("vllm").SamplingParams(
        temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": random.choices(range(300, vocabulary), k=prompt)} for _ in range(batch)]
    start = time.perf_counter()
    model.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def rate(model: Any, test: str, tokens: int, batch: int, prompt: int, vocabulary: int) -> float:
    """Tokens a second."""
    if test == "prefill":
        seconds(model, 1, tokens, 1, vocabulary)
        return tokens / seconds(model, 1, tokens, 1, vocabulary)
    few, all_of_them = (seconds(model, batch, prompt, new, vocabulary) for new in (FEW, FEW + tokens))
    return batch * tokens / (all_of_them - few)


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--test", choices=("decode", "prefill"), default="decode")
    for name, default in (("tokens", 32), ("batch", 1), ("depth", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    random.seed(0)
    prompt = args.depth or PROMPT
    model = importlib.import_module("vllm").LLM(
        args.model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=max(prompt, 512) + args.tokens + 64,
        max_num_seqs=max(args.batch, 2),
        enable_prefix_caching=False,
        max_num_batched_tokens=4096,
    )
    vocabulary = model.llm_engine.model_config.get_vocab_size()
    seconds(model, args.batch, prompt, 2, vocabulary)
    print(json.dumps({"tokens_per_s": rate(model, args.test, args.tokens, args.batch, prompt, vocabulary)}))


if __name__ == "__main__":
    main()
