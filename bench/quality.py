"""What a weight format costs in quality: its next-token distributions against those of BF16, on code.

    python -m bench.quality [--model coder-0.5b] [--formats fp8,int4-g32,...] [--window 512] [--windows 1] [--json]

    KL = sum_v p(v) (log p(v) - log q(v)) in nats, p of BF16, q of the format, at every position of a window; mean, its
    standard error and 99th percentile. top-1: share of positions with the same best token. perplexity: exp of the mean
    difference of -log p(next token).

All run here, in float32, with the same code: only weights differ. q4_0 and q4_k_m are llama.cpp's own files, made by
its llama-quantize from the same BF16 weights and dequantised by `gguf`. `cache-fp8` computes with the weights of BF16
over the engine's own FP8 cache (`--cache-dtype fp8`), from which every token reads the others and itself.

The weights: published GGUF files are quantised already, which favours formats on the same grid. The reference has that
rounding undone at random (`bench.dither`); --as-published leaves it. The text: `TEXTS`, files of packages that the
development requirements pin, most of them written after the models. What this cannot show is the loss on a task.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.dither import write_dithered
from gguf import GGUFReader
from torch import Tensor

from kvern.checkpoint.convert import convert
from kvern.checkpoint.known_models import find_model
from kvern.checkpoint.load import load
from kvern.checkpoint.local import cache_folder, pulled_path
from kvern.checkpoint.reader import CheckpointReader
from kvern.checkpoint.target import LINEAR, float_shape, weight_name
from kvern.engine.cache import RECORDS, PagedCache, Span
from kvern.errors import NotFoundError
from kvern.model import ForwardBatch, Transformer
from kvern.text.tokenizer import Tokenizer

TEXTS = (
    ("transformers", "core_model_loading.py"),
    ("transformers", "generation/continuous_batching/scheduler.py"),
    ("transformers", "generation/continuous_batching/offloading_manager.py"),
    ("transformers", "models/kimi_linear/modular_kimi_linear.py"),
    ("schemathesis", "specs/openapi/stateful/inference.py"),
    ("schemathesis", "core/failures.py"),
    ("openai", "lib/streaming/responses/_responses.py"),
    ("fastapi", "dependencies/utils.py"),
)
"""(package, file): Apache-2.0 and MIT. None existed in this form when Qwen2.5-Coder was trained."""

SKIPPED = 256
"""Tokens at the beginning of a file that are left out: licence and imports."""

OURS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "fp8": {"dtype": "fp8"},
    "fp8+head": {"dtype": "fp8", "head_fp8": True},
    "int4-g32": {"dtype": "int4", "group_size": 32},
    "int4-g32+head": {"dtype": "int4", "group_size": 32, "head_fp8": True},
    "int4-g128": {"dtype": "int4", "group_size": 128},
}
THEIRS = ("q4_0", "q4_k_m")
CACHE = "cache-fp8"
CACHE_BLOCK = 16
FORMATS = (*list(OURS)[1:], *THEIRS, CACHE)


@dataclass(frozen=True)
class Row:
    """One format against BF16. Bits: stored bits a weight in the layers (scales included), and in the head."""

    format: str
    layer_bits: float
    head_bits: float
    kl_mean: float
    kl_error: float
    kl_p99: float
    top1: float
    perplexity_ratio: float


class Measured:
    """Positions so far: KL, same best token, and difference of -log p(next)."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []
        self.worse: list[Tensor] = []

    def add(self, reference: Tensor, found: Tensor, following: Tensor) -> None:
        """Logits [T, vocabulary] of one window and the tokens [T] that follow."""
        p, q = reference.log_softmax(-1), found.log_softmax(-1)
        self.kl.append((p.exp() * (p - q)).sum(-1).double())
        self.same.append(p.argmax(-1) == q.argmax(-1))
        self.worse.append((p - q).gather(-1, following[:, None])[:, 0].double())

    def row(self, name: str, bits: tuple[float, float]) -> Row:
        kl = torch.cat(self.kl).clamp(min=0)
        return Row(
            name,
            *bits,
            kl_mean=float(kl.mean()),
            kl_error=float(kl.std() / math.sqrt(len(kl))),
            kl_p99=float(kl.quantile(0.99)),
            top1=float(torch.cat(self.same).double().mean()),
            perplexity_ratio=math.exp(float(torch.cat(self.worse).mean())),
        )


class Workshop:
    """Makes each form of the model in a folder, once."""

    def __init__(self, model: str, folder: Path, quantize_tool: Path, dither: bool) -> None:
        self.model, self.quantize_tool, self.dither = model, quantize_tool, dither
        self.folder = folder / f"{model}-{'dithered' if dither else 'published'}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def gguf(self) -> Path:
        """The reference's weights, BF16, as llama.cpp reads them."""
        out = self.folder / "bf16.gguf"
        if not out.exists():
            pulled = pulled_path(find_model(self.model))
            if pulled is None:
                raise NotFoundError(f"{self.model} has not been pulled", hint=f"run `kvern pull {self.model}`")
            part = out.with_suffix(".part")
            source = pulled if pulled.is_file() else next(pulled.glob("*.gguf"))
            write_dithered(source, part, dither=self.dither)
            part.rename(out)
        return out

    def checkpoint(self, name: str) -> Path:
        """The V3 folder of a format; a peer's weights come back as BF16."""
        out = self.folder / name
        if name in THEIRS:
            convert(self.peer(name), out, dtype="bf16")
        elif name == "bf16":
            convert(self.gguf(), out, dtype="bf16")
        else:
            convert(self.checkpoint("bf16"), out, **OURS[name])
        return out

    def peer(self, name: str) -> Path:
        """llama.cpp's file of a format."""
        out = self.folder / f"{name}.gguf"
        if not out.exists():
            part = out.with_suffix(".part")
            command = [str(self.quantize_tool), str(self.gguf()), str(part), name.upper()]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            part.rename(out)
        return out

    def bits(self, name: str) -> tuple[float, float]:
        """Bits a weight in the layers' Linears that the source has too, and in the head."""
        return gguf_bits(self.peer(name)) if name in THEIRS else checkpoint_bits(self.checkpoint(name))


def checkpoint_bits(folder: Path) -> tuple[float, float]:
    """Bits a weight of the layers' Linears (not the selection matrices of an import) and of the head."""
    reader = CheckpointReader(folder)
    bits, numbers = {True: 0, False: 0}, {True: 0, False: 0}
    for spec in reader.specs():
        module, _, part = weight_name(spec.name).rpartition(".")
        head, name = module == "lm_head", f"{module}.weight"
        if not part.startswith("weight") or not (head or LINEAR.fullmatch(name)):
            continue
        if module.endswith(("q_b_proj", "kv_b_proj")):
            continue
        bits[head] += 8 * (spec.end - spec.start)
        numbers[head] += math.prod(float_shape(spec)) if part == "weight" else 0
    return bits[False] / numbers[False], bits[True] / numbers[True]


def gguf_bits(path: Path) -> tuple[float, float]:
    """The same of a GGUF file; a tied head is the embedding."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    layers = [t for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return 8 * sum(int(t.n_bytes) for t in layers) / sum(int(t.n_elements) for t in layers), _bits(head)


def _bits(tensor: Any) -> float:
    return 8 * int(tensor.n_bytes) / int(tensor.n_elements)


def windows(tokenizer: Tokenizer, length: int, per_file: int) -> Iterator[list[int]]:
    """Token ids, `length` + 1 each: the last is only predicted. A file that is too short gives fewer."""
    for package, file in TEXTS:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        text = (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")
        ids = tokenizer.encode(text)
        for start in range(SKIPPED, SKIPPED + per_file * length, length):
            if start + length < len(ids):
                yield ids[start : start + length + 1]


@torch.inference_mode()
def logits(model: Transformer, ids: Sequence[int], fp8_cache: bool) -> Tensor:
    """[T, vocabulary] float32 of all tokens but the last."""
    batch = ForwardBatch.of(list(ids[:-1]))
    if fp8_cache:
        blocks = -(-len(batch.tokens) // CACHE_BLOCK)
        cache = PagedCache(model.config, blocks, CACHE_BLOCK, RECORDS)
        batch = replace(batch, cache=cache.step([Span(range(blocks), 0, len(batch.tokens))]))
    found: Tensor = model(batch)
    return found


def measure(workshop: Workshop, formats: Sequence[str], texts: Sequence[Sequence[int]]) -> Iterator[Row]:
    """A row for each format; the reference's logits wait on disk."""
    model = load(workshop.checkpoint("bf16"), dtype=torch.float32)
    kept = [workshop.folder / f"logits-{number}.npy" for number in range(len(texts))]
    try:
        for path, ids in zip(kept, texts, strict=True):
            np.save(path, logits(model, ids, False).numpy())
        for name in formats:
            started = time.monotonic()
            model = load(workshop.checkpoint("bf16" if name == CACHE else name), dtype=torch.float32)
            found = Measured()
            for path, ids in zip(kept, texts, strict=True):
                reference = torch.from_numpy(np.load(path))
                found.add(reference, logits(model, ids, name == CACHE), torch.tensor(ids[1:]))
            print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
            yield found.row(name, workshop.bits("bf16" if name == CACHE else name))
    finally:
        for path in kept:
            path.unlink(missing_ok=True)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as text."""
    yield f"{'format':14} {'bits':>5} {'head':>5} {'KL mean':>9} {'+-':>7} {'KL p99':>7} {'top-1':>7} perplexity"
    for row in rows:
        yield (
            f"{row.format:14} {row.layer_bits:5.2f} {row.head_bits:5.2f} {row.kl_mean:9.5f} {row.kl_error:7.5f} "
            f"{row.kl_p99:7.3f} {row.top1:7.2%} {row.perplexity_ratio:9.4f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coder-0.5b", help="a model that `kvern pull` fetched as GGUF")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join((*FORMATS, 'bf16'))}")
    parser.add_argument("--window", type=int, default=512, metavar="TOKENS", help="length of a window")
    parser.add_argument("--windows", type=int, default=1, metavar="N", help=f"from each of {len(TEXTS)} files")
    parser.add_argument("--as-published", action="store_true", help="do not undo the source's rounding")
    parser.add_argument("--work", type=Path, default=cache_folder() / "quality", help="holds every form of the model")
    tool = cache_folder() / "peers" / "llama.cpp-native" / "bin" / "llama-quantize"
    parser.add_argument(
        "--llama-quantize", type=Path, default=tool, help="llama.cpp's (`python -m bench.peers` builds it)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    names = args.formats.split(",")
    if unknown := sorted(set(names) - {*FORMATS, "bf16"}):
        parser.error(f"no such format: {', '.join(unknown)}")
    if not args.llama_quantize.exists() and (left := [name for name in names if name in THEIRS]):
        print(f"left out, {args.llama_quantize} is missing: {', '.join(left)}", file=sys.stderr)
        names = [name for name in names if name not in THEIRS]
    workshop = Workshop(args.model, args.work, args.llama_quantize, not args.as_published)
    texts = list(windows(Tokenizer.load(workshop.checkpoint("bf16")), args.window, args.windows))
    print(f"{sum(len(ids) - 1 for ids in texts)} positions in {len(texts)} windows", file=sys.stderr)
    rows = []
    for row in measure(workshop, names, texts):
        rows.append(row)
        print("\n".join(table([row])), file=sys.stderr)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
