"""The plan of a training run against the report's figures, the model's own FLOPs and shapes, and the guide's tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.model.oracle import random_config

from kvern.config import ModelConfig
from kvern.errors import ConfigError
from kvern.model import Transformer
from kvern.model.mtp import MTPLayer
from kvern.plan import training
from kvern.plan.training import (
    H800,
    Memory,
    Run,
    flops_per_token,
    hours_per_trillion,
    memory,
    report_utilisation,
    state_bytes,
    step,
)

GUIDE = Path(__file__).parents[2] / "docs/training-671b.md"
V3 = ModelConfig.named("deepseek-v3")
UTILISATION = 0.4


def test_state_of_671b() -> None:
    assert state_bytes(V3, mtp=False) == 12 * 671_026_419_200
    assert round(state_bytes(V3, mtp=False) / 1e12, 2) == 8.05
    assert round(state_bytes(V3) / 1e12, 2) == 8.19
    on_256 = memory(V3, Run(256, 64))
    assert on_256.state * 256 == pytest.approx(state_bytes(V3), rel=1e-6)
    assert memory(V3, Run(512, 64)).state * 2 == pytest.approx(on_256.state, rel=1e-6)


def test_the_report_s_hours_are_two_fifths_of_the_peak() -> None:
    assert 0.36 < report_utilisation(V3) < 0.42
    rate = report_utilisation(V3) * H800.flops / flops_per_token(V3, 4096)
    assert hours_per_trillion(rate) == pytest.approx(180_000)
    assert rate == pytest.approx(1543, rel=0.001)


@pytest.mark.parametrize("seed", range(6))
def test_what_a_rank_needs_whole_is_what_the_model_has(seed: int) -> None:
    config = random_config(seed)
    model = Transformer(config)
    for number, layer in enumerate(model.model.layers):
        shared = {layer.embed_tokens.weight, layer.shared_head.head.weight} if isinstance(layer, MTPLayer) else set()
        counted = sum(parameter.numel() for parameter in layer.parameters() if parameter not in shared)
        assert training._whole(config, number, 1) == counted


def test_more_expert_ranks_gather_less_and_exchange_more() -> None:
    few, many = Run(256, 8, rows=4), Run(256, 64, rows=4)
    assert memory(V3, many).gathered < memory(V3, few).gathered
    slow, fast = step(V3, few, H800, UTILISATION), step(V3, many, H800, UTILISATION)
    assert fast.gathers < slow.gathers
    assert fast.exchanges > slow.exchanges
    assert slow.compute == fast.compute
    assert fast.slowest < fast.fastest


def test_recomputation_saves_memory() -> None:
    kept, again = (memory(V3, Run(256, 64, recompute=recompute)) for recompute in (False, True))
    assert kept.activations > 10 * again.activations


@pytest.mark.parametrize("run", [Run(0), Run(10, 4), Run(512, 512), Run(8, rows=0)])
def test_impossible_meshes(run: Run) -> None:
    with pytest.raises(ConfigError):
        memory(V3, run)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


def memory_row(run: Run) -> str:
    """A line of the guide's first table."""
    need: Memory = memory(V3, run)
    cells = [need.masters, need.gradients, need.moments, need.gathered, need.activations, need.logits, need.total]
    return f"| {run.world} | {run.expert} | {run.rows} | " + " | ".join(map(gigabytes, cells)) + " |"


def speed_row(run: Run) -> str:
    """A line of the guide's second table."""
    took = step(V3, run, H800, UTILISATION)
    seconds = " | ".join(f"{part:.1f}" for part in (took.compute, took.gathers, took.exchanges))
    return (
        f"| {run.world} | {run.expert} | {run.rows} | {seconds} | {took.slowest:.0f} - {took.fastest:.0f} | "
        f"{hours_per_trillion(took.fastest) / 1000:.0f}K - {hours_per_trillion(took.slowest) / 1000:.0f}K |"
    )


def test_the_guide_s_tables_are_what_the_plan_says() -> None:
    text = GUIDE.read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|.*$", text, re.MULTILINE)
    assert len(rows) >= 8
    for world, expert, count in rows:
        run = Run(int(world), int(expert), int(count))
        assert memory_row(run) in text or speed_row(run) in text, (memory_row(run), speed_row(run))
