"""Runs one case in ik_llama.cpp through the C functions that its wheel ships, and prints one JSON line.

    python drive_ik.py MODEL.gguf --test decode --tokens 128 --batch 1 --depth 0 --threads 2

The wheel has no benchmark program, and ik_llama.cpp's own batched one feeds token 0 to every sequence, so that all of
them choose the same experts. This one feeds random tokens, as llama.cpp's does. Settings: MLA form 3, flash attention,
weights repacked at load, fused MoE up and gate (`-mla 3 -fa 1 -rtr 1 -fmoe 1` of its command line).

Several sequences run without flash attention. It looks only at the first row of each block of the cache to see whether
a batch needs the block, which is wrong for rows of several sequences: it stops (`S > 0`), or, where they share their
prompt, passes rows over and computes other logits (docs/peers.md has the figures).

Runs in the peer's environment: nothing but the standard library and `ik_llama_cpp`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import random
import time
from typing import Any

api: Any = importlib.import_module("ik_llama_cpp._ctypes_api")

BATCH, UBATCH = 2048, 512
WARM_STEPS = 2
PROMPT = 16


class Model:
    """A loaded model with a context for `sequences` of `context` tokens each."""

    def __init__(self, path: str, *, context: int, sequences: int, threads: int) -> None:
        api.llama_backend_init()
        self.handle = api.llama_model_load_from_file(path.encode(), self._model_params())
        if not self.handle:
            raise SystemExit(f"ik_llama.cpp does not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context * sequences, sequences
        params.n_batch, params.n_ubatch = BATCH, UBATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn, params.mla_attn, params.fused_moe_up_gate = sequences == 1, 3, True
        self.context = api.llama_init_from_model(self.handle, params)
        if not self.context:
            raise SystemExit("ik_llama.cpp makes no context")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.handle))
        self.batch = api.llama_batch_init(BATCH, 0, 1)
        self.random = random.Random(0)

    @staticmethod
    def _model_params() -> Any:
        params = api.llama_model_default_params()
        params.mla, params.flash_attn, params.repack_tensors = 3, True, True
        params.use_mmap = False  # repacked weights are private copies anyway
        return params

    def compute(self, placed: list[tuple[int, int]], wanted: set[int]) -> None:
        """One batch of random tokens at (sequence, position); logits of the indices in `wanted`."""
        batch = self.batch
        for at, (sequence, position) in enumerate(placed):
            batch.token[at] = self.random.randrange(self.vocabulary)
            batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = position, 1, sequence
            batch.logits[at] = at in wanted
        batch.n_tokens = len(placed)
        code = api.llama_decode(self.context, batch)
        if code != 0:
            raise SystemExit(f"llama_decode returned {code}")
        for at in wanted:
            api.llama_get_logits_ith(self.context, at)

    def prompt(self, sequence: int, tokens: int) -> None:
        """Compute a prompt from position 0 on, logits of its last token."""
        for first in range(0, tokens, BATCH):
            last = min(first + BATCH, tokens)
            ends = {last - first - 1} if last == tokens else set()
            self.compute([(sequence, position) for position in range(first, last)], ends)

    def clear(self) -> None:
        """Forget all sequences."""
        api.llama_kv_cache_clear(self.context)


def decode_rate(model: Model, tokens: int, batch: int, depth: int) -> float:
    """Tokens a second of all sequences together."""
    start_at = depth or PROMPT
    for sequence in range(batch):
        model.prompt(sequence, start_at)
    everything = set(range(batch))
    for step in range(WARM_STEPS):
        model.compute([(sequence, start_at + step) for sequence in range(batch)], everything)
    start = time.perf_counter()
    for step in range(WARM_STEPS, WARM_STEPS + tokens):
        model.compute([(sequence, start_at + step) for sequence in range(batch)], everything)
    return tokens * batch / (time.perf_counter() - start)


def prefill_rate(model: Model, tokens: int) -> float:
    """Prompt tokens a second, after a short prompt that warms up."""
    model.prompt(0, min(tokens, UBATCH))
    model.clear()
    start = time.perf_counter()
    model.prompt(0, tokens)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--test", choices=("decode", "prefill"), default="decode")
    for name, default in (("tokens", 128), ("batch", 1), ("depth", 0), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    context = -(-(max(args.depth, PROMPT) + args.tokens + WARM_STEPS + 1) // 256) * 256
    model = Model(args.model, context=context, sequences=args.batch, threads=args.threads)
    if args.test == "decode":
        rate = decode_rate(model, args.tokens, args.batch, args.depth)
    else:
        rate = prefill_rate(model, args.tokens)
    system = api._lib.llama_print_system_info
    system.restype = ctypes.c_char_p
    print(json.dumps({"tokens_per_s": rate, "system": system().decode()}))


if __name__ == "__main__":
    main()
