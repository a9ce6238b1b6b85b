"""bench.train compares like with like: the same weights, the same loss, step after step."""

from __future__ import annotations

import pytest
import torch
from bench.train import kvern_step, transformers_step


def test_both_sides_learn_the_same() -> None:
    ids_BT = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    ours = kvern_step(torch.float32, balanced=False)
    theirs = transformers_step(torch.float32, torch.float32, "grouped_mm")
    losses = [(ours(ids_BT), theirs(ids_BT)) for _ in range(3)]
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-4)
    assert losses[-1][0] < losses[0][0]
