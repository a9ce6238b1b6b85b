"""GEMV of one token over the shapes of coder-0.5b and DeepSeek-V3, in GB/s of weights, beside what memory can deliver.

    python -m bench.kernels [--threads 1,2] [--json]

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
from kvern.ops import native
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
BYTES = 400_000_000
ROUNDS = 7


@dataclass(frozen=True)
class Row:
    """GB/s of one product; `torch_gb_s` is None where torch has no such product."""

    threads: int
    shape: str
    outputs: int
    inputs: int
    dtype: str
    read_gb_s: float
    kvern_gb_s: float
    torch_gb_s: float | None


@torch.inference_mode()
def measure(threads: int, name: str, dtype: torch.dtype, read: float) -> Row:
    """Time one shape and dtype."""
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
    x = torch.randn(1, inputs)
    runs: list[Callable[[], object]] = [lambda: [ops.linear(x, weight, scale) for weight in weights]]
    if scale is None:
        same = x.to(dtype)
        runs.append(lambda: [F.linear(same, weight) for weight in weights])
    rates = [size * count / seconds / 1e9 for seconds in alternate(runs)]
    short = str(dtype).removeprefix("torch.")
    return Row(threads, name, outputs, inputs, short, read, rates[0], rates[1] if len(rates) > 1 else None)


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
    return data.numel() * data.element_size() / alternate([lambda: native.read_bandwidth(data)])[0] / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2", help="thread counts to measure, separated by commas")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if (reason := native.why_absent()) is not None:
        raise SystemExit(f"error: {reason}")
    load, rows = os.getloadavg()[0], []
    for threads in (int(one) for one in args.threads.split(",")):
        native.set_threads(threads)
        torch.set_num_threads(threads)
        read = read_rate(torch.ones(BYTES // 4))
        rows += [measure(threads, name, dtype, read) for name in SHAPES for dtype in DTYPES]
    if args.json:
        print(json.dumps({"isa": native.isa(), "load": load, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print_table(rows, load)


def print_table(rows: Sequence[Row], load: float) -> None:
    """One line a product."""
    print(f"{machine().cpu}, kernels {native.isa()}, torch {torch.__version__}, load {load:.1f} at the start", end="")
    print(" (DISTURBED)" if load > 1 else "")
    print("threads  shape                       N x K  dtype           read  Kvern share  torch ratio")
    for row in rows:
        size, share = f"{row.outputs}x{row.inputs}", f"{row.kvern_gb_s / row.read_gb_s:.2f}"
        other = (
            ("-", "-")
            if row.torch_gb_s is None
            else (f"{row.torch_gb_s:.1f}", f"{row.kvern_gb_s / row.torch_gb_s:.2f}")
        )
        print(
            f"{row.threads:>7}  {row.shape:<20} {size:>12}  {row.dtype:<13} {row.read_gb_s:>6.1f} "
            f"{row.kvern_gb_s:>6.1f} {share:>5} {other[0]:>6} {other[1]:>5}"
        )


if __name__ == "__main__":
    main()
