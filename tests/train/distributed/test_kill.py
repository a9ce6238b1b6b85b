"""`torchrun -m kvern train`: two processes equal one; killed at any moment, the run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.distributed.launch import ROOT
from tests.train.small import TIMES
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

CONFIG = """
steps = {steps}
[model]
vocab_size = 320
hidden_size = 32
intermediate_size = 48
moe_intermediate_size = 16
num_hidden_layers = 2
num_attention_heads = 2
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
n_group = 2
topk_group = 1
kv_lora_rank = 16
q_lora_rank = 16
qk_rope_head_dim = 8
qk_nope_head_dim = 8
v_head_dim = 8
first_k_dense_replace = 1
num_nextn_predict_layers = 1
max_position_embeddings = 64
initializer_range = 0.2
bos_token_id = 256
eos_token_id = 257
[data]
tokenizer = "bytes"
[[data.sources]]
path = "{text}"
[batch]
rows = 8
length = 64
[precision]
dtype = "f32"
[learning_rate]
peak = 2.2e-4
warmup_steps = 2
[checkpoint]
every = 1
"""
STEPS, KILLS = 8, 2


def command(world: int, folder: Path, out: str, expert: int = 1) -> list[str]:
    """The command line of a run in `folder`, whose text and configuration it writes."""
    text = folder / "text.py"
    if not text.exists():
        text.write_text((ROOT / "src/kvern/train/mesh.py").read_text() * 3)
        (folder / "run.toml").write_text(CONFIG.format(steps=STEPS, text=text))
    run = ["-m", "kvern", "train", str(folder / "run.toml"), "--out", str(folder / out), "--resume", "auto"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    return [sys.executable, *(torchrun if world > 1 else []), *run, "--set", f"mesh.expert={expert}"]


def environment() -> Mapping[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def finish(world: int, folder: Path, out: str, expert: int = 1) -> None:
    done = subprocess.run(
        command(world, folder, out, expert), check=False, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def last_state(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, whole."""
    dcp_to_torch_save(max((folder / "checkpoints").glob("step-*[0-9]")), scratch)
    found: dict[str, torch.Tensor] = torch.load(scratch)
    return found


def children(parent: int) -> list[int]:
    """Processes that `parent` has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if entry.name.isdigit() and int(fields[1]) == parent:
            found.append(int(entry.name))
    return found


def kill_midway(world: int, folder: Path, out: str, lines: int, draw: random.Random) -> None:
    """Start a run and kill -9 one of its ranks, or all, some time after `lines` steps are reported."""
    process = subprocess.Popen(
        command(world, folder, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    file, end = folder / out / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < end and not (file.exists() and len(file.read_text().splitlines()) >= lines):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.02)
    time.sleep(draw.random() * 0.2)
    ranks = children(process.pid)
    assert len(ranks) == world
    for rank in draw.sample(ranks, draw.choice([1, world])):
        os.kill(rank, signal.SIGKILL)
    assert process.wait(timeout=120) != 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_again_and_again_ends_bitwise_as_one_that_was_not(tmp_path: Path) -> None:
    draw = random.Random(0)
    finish(2, tmp_path, "whole")
    for kill in range(KILLS):
        kill_midway(2, tmp_path, "killed", (kill + 1) * STEPS // (KILLS + 1) - 1, draw)
    finish(2, tmp_path, "killed")
    one, other = (last_state(tmp_path / name, tmp_path / f"{name}.pt") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert [row["step"] for row in metrics(tmp_path / "killed")] == list(range(1, STEPS + 1))

    finish(1, tmp_path, "alone")
    alone = last_state(tmp_path / "alone", tmp_path / "alone.pt")
    for name, tensor in alone.items():
        if name.startswith("model."):
            torch.testing.assert_close(one[name], tensor, rtol=0, atol=5e-6, msg=name)  # 2 % of what a step moves
    for row, expected in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "alone"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert row["tokens"] == expected["tokens"]
