"""The peak that a step's FLOPs are compared with: a card's by its data sheet, else that of a large product."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

BF16_PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}
"""Dense BF16 FLOP/s of cards, from NVIDIA's data sheets (SXM)."""

MEASURED_SIZE, MEASURED_TIMES = 1024, 5


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one rank's device, and where the figure comes from."""

    flops: float
    source: str


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The device's dense peak: of a known card in BF16 from its data sheet, else that of a large product, measured."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for card, flops in BF16_PEAKS.items():
            if card in name:
                return Peak(flops, f"data sheet of {card}, dense BF16")
    shown = str(dtype).removeprefix("torch.")
    return Peak(_measured(device, dtype), f"measured: a product of {MEASURED_SIZE} x {MEASURED_SIZE} in {shown}")


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    numbers = torch.Generator().manual_seed(0)  # not the run's
    one = torch.randn(MEASURED_SIZE, MEASURED_SIZE, generator=numbers).to(device, dtype)
    best = float("inf")
    for _ in range(MEASURED_TIMES):
        begin = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * MEASURED_SIZE**3 / best
