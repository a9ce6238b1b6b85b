"""The kernels alone: products of one and of several tokens, attention over paged latents.

    python -m bench.kernels [--threads 1,2] [--rows 1,4,16] [--json]

Products over the shapes of coder-0.5b and DeepSeek-V3: GB/s of weights, beside what memory can deliver. Attention of
one step: GFLOP/s, counting 2 H (D + rank) a query and row, beside `ops.reference`.

Every figure is the median of rounds in which Kvern and torch alternate, over copies of the weight that no cache holds
together. "read" is a plain pass over the same number of bytes. torch has no FP8 product; its BF16 and FP32 are F.linear
in that dtype. A run beside other work (load above 1 at the start) is marked as disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kvern import ops
from kvern.ops import library
from kvern.plan.hardware import machine

SHAPES = {
    "coder-0.5b q, o": (896, 896),
    "coder-0.5b gate, up": (4864, 896),
    "coder-0.5b down": (896, 4864),
    "V3 expert gate, up": (2048, 7168),
    "V3 expert down": (7168, 2048),
    "V3 q_b": (24576, 1536),
    "V3 o": (7168, 16384),
}
DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
HEADS = {"coder-0.5b": (14, 128, 128), "V3": (128, 512, 64)}
"""heads, kv_lora_rank, qk_rope_head_dim"""

STEPS = ((1, 512), (1, 4096), (16, 512))
"""(sequences, context) of the attention of a step."""

BLOCK_SIZE = 16
BYTES = 400_000_000
ROUNDS = 7


@dataclass(frozen=True)
class Row:
    """GB/s of one product; `torch_gb_s` is None where torch has no such product."""

    threads: int
    shape: str
    outputs: int
    inputs: int
    rows: int
    dtype: str
    read_gb_s: float
    kvern_gb_s: float
    torch_gb_s: float | None


@torch.inference_mode()
def measure(threads: int, name: str, rows: int, dtype: torch.dtype, read: float) -> Row:
    """Time one shape, number of rows of x, and dtype."""
    outputs, inputs = SHAPES[name]
    size = outputs * inputs * dtype.itemsize
    count = max(2, BYTES // size)
    first = torch.randn(outputs, inputs)
    scale = None
    if dtype is torch.float8_e4m3fn:
        first, scale = ops.quantize_blocks(first)
    else:
        first = first.to(dtype)
    weights = [first.clone() for _ in range(count)]
    x = torch.randn(rows, inputs)
    runs: list[Callable[[], object]] = [lambda: [ops.linear(x, weight, scale) for weight in weights]]
    if scale is None:
        same = x.to(dtype)
        runs.append(lambda: [F.linear(same, weight) for weight in weights])
    rates = [size * count / seconds / 1e9 for seconds in alternate(runs)]
    short = str(dtype).removeprefix("torch.")
    return Row(threads, name, outputs, inputs, rows, short, read, rates[0], rates[1] if len(rates) > 1 else None)


@dataclass(frozen=True)
class AttentionRow:
    """GFLOP/s of one step's attention, FP32 queries over BF16 latents."""

    threads: int
    shape: str
    sequences: int
    context: int
    kvern_gflop_s: float
    reference_gflop_s: float


@torch.inference_mode()
def measure_attention(threads: int, name: str, sequences: int, context: int) -> AttentionRow:
    """Time `sequences` queries, each over `context` rows in shuffled blocks."""
    heads, rank, rope = HEADS[name]
    blocks = sequences * -(-context // BLOCK_SIZE)
    rows = torch.randn(blocks * BLOCK_SIZE, rank + rope).bfloat16()
    tables = torch.randperm(blocks).to(torch.int32).view(sequences, -1)
    contexts = torch.full((sequences,), context, dtype=torch.int32)
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    q = torch.randn(sequences, heads, rank + rope)
    arguments = (q, rows, tables, contexts, starts, BLOCK_SIZE, rank, (rank + rope) ** -0.5)
    op = ops.paged_latent_attention
    seconds = alternate([lambda: op(*arguments), lambda: op.reference(*arguments)])
    work = 2 * sequences * context * heads * (2 * rank + rope) / 1e9
    return AttentionRow(threads, name, sequences, context, work / seconds[0], work / seconds[1])


def alternate(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each, run in turn after one warm-up each."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + ROUNDS):
        for times, run in zip(seconds, runs, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [median(times[1:]) for times in seconds]


def read_rate(data: Tensor) -> float:
    """GB/s of reading `data` once."""
    return data.numel() * data.element_size() / alternate([lambda: library.read_bandwidth(data)])[0] / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2", help="thread counts to measure, separated by commas")
    parser.add_argument("--rows", default="1", help="rows of x to measure, separated by commas")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if (reason := library.why_absent()) is not None:
        raise SystemExit(f"error: {reason}")
    load, rows, attention = os.getloadavg()[0], [], []
    sizes = [int(one) for one in args.rows.split(",")]
    for threads in (int(one) for one in args.threads.split(",")):
        library.set_threads(threads)
        torch.set_num_threads(threads)
        read = read_rate(torch.ones(BYTES // 4))
        rows += [measure(threads, name, size, dtype, read) for name in SHAPES for size in sizes for dtype in DTYPES]
        attention += [measure_attention(threads, name, *step) for name in HEADS for step in STEPS]
    if args.json:
        found = {"rows": [asdict(row) for row in rows], "attention": [asdict(row) for row in attention]}
        print(json.dumps({"isa": library.isa(), "load": load, **found}, indent=2))
    else:
        print_table(rows, load)
        print_attention(attention)


def print_table(rows: Sequence[Row], load: float) -> None:
    """One line a product."""
    print(f"{machine().cpu}, kernels {library.isa()}, torch {torch.__version__}, load {load:.1f} at the start", end="")
    print(" (DISTURBED)" if load > 1 else "")
    print("threads  shape                       N x K  rows  dtype           read  Kvern share  torch ratio")
    for row in rows:
        size, share = f"{row.outputs}x{row.inputs}", f"{row.kvern_gb_s / row.read_gb_s:.2f}"
        other = (
            ("-", "-")
            if row.torch_gb_s is None
            else (f"{row.torch_gb_s:.1f}", f"{row.kvern_gb_s / row.torch_gb_s:.2f}")
        )
        print(
            f"{row.threads:>7}  {row.shape:<20} {size:>12}  {row.rows:>4}  {row.dtype:<13} {row.read_gb_s:>6.1f} "
            f"{row.kvern_gb_s:>6.1f} {share:>5} {other[0]:>6} {other[1]:>5}"
        )


def print_attention(rows: Sequence[AttentionRow]) -> None:
    """One line a step."""
    print("threads  attention   sequences  context  Kvern GFLOP/s  reference  ratio")
    for row in rows:
        print(
            f"{row.threads:>7}  {row.shape:<10} {row.sequences:>10} {row.context:>8} {row.kvern_gflop_s:>14.1f} "
            f"{row.reference_gflop_s:>10.1f} {row.kvern_gflop_s / row.reference_gflop_s:>6.2f}"
        )


if __name__ == "__main__":
    main()
