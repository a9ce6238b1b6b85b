"""A training step: Kvern against transformers' DeepseekV3ForCausalLM with the same weights, in alternating pairs.

    python -m bench.train [--dtypes bf16,f32] [--pairs 5] [--rows 8] [--length 512] [--compile] [--json]

A step is forward, backward, clipping and AdamW over rows of random tokens, each one document, on the CPU's threads;
every step has new rows, the same for all. Without MTP and balance losses, which transformers does not train;
`--balanced` gives Kvern its balance loss and bias update all the same. What a dtype means:

- `bf16`: Kvern has FP32 masters and gradients, BF16 activations, BF16 moments. transformers is measured twice, in the
  two usual ways: `autocast` (FP32 parameters under torch.autocast) and `weights` (parameters, gradients and moments all
  in BF16). The ratio is to the faster of the two.
- `f32`: FP32 everywhere on both sides; Kvern's moments are FP32, too.

transformers has its best settings: torch's fused AdamW, sdpa attention, the grouped product over experts
(`--experts eager` for its loop). `--compile` measures one peer more: Kvern's own step with torch.compile over
attention, the part that it takes (docs/LOG.md). The share of peak divides the FLOPs of a step by those of a product of
two square matrices of 3072 in the same dtype (`kvern.plan.flops`).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from bench.transformers_peer import deepseek_v3
from torch import Tensor

from kvern.config import ModelConfig
from kvern.model import Transformer
from kvern.model.attention import Attention
from kvern.plan.flops import step_flops
from kvern.plan.hardware import default_threads, machine
from kvern.train.balance import LoadBalancer, RoutingLog
from kvern.train.loss import training_loss
from kvern.train.model import make_trainable
from kvern.train.optim import AdamW, clip_gradients, parameter_groups
from kvern.train.packed_rows import PackedRows
from kvern.train.weights import initialise

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0

Step = Callable[[Tensor], float]
"""One step over the rows [B, T] of a batch; its loss."""


@dataclass(frozen=True)
class Row:
    """Medians over the pairs: tokens a second of both and of their ratio; shares of peak; the loss of the last step."""

    dtype: str
    peer: str
    kvern: float
    transformers: float
    ratio: float
    kvern_of_peak: float
    transformers_of_peak: float
    losses: tuple[float, float]
    pairs: tuple[tuple[float, float], ...]


def config() -> ModelConfig:
    """37 million parameters, 9 million of them active: V3's form, 4 of 32 experts a token beside the shared one."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=4096,
        torch_dtype="float32",
    )


def fresh_model(dtype: torch.dtype) -> Transformer:
    """The bench's model with weights that are always the same."""
    model = Transformer(config(), device="cpu", activation_dtype=dtype)
    initialise(model, 0, std=0.02)
    make_trainable(model)
    return model


def kvern_step(dtype: torch.dtype, balanced: bool, compiled: bool = False) -> Step:
    """Kvern's step."""
    model = fresh_model(dtype)
    for module in model.modules() if compiled else ():
        if isinstance(module, Attention):
            module.compile(dynamic=False)
    named = dict(model.named_parameters())
    optimizer = AdamW(parameter_groups(model, DECAY), RATE, betas=BETAS, moments=dtype)
    log, balancer = (RoutingLog(model), LoadBalancer(model)) if balanced else (None, None)

    def step(ids_BT: Tensor) -> float:
        losses = training_loss(model, PackedRows.of(*ids_BT.tolist()), log)
        torch.autograd.backward(losses.total)
        clip_gradients(named, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.count(losses.routings)
            balancer.step()
        return float(losses.main)

    return step


def transformers_step(dtype: torch.dtype, weights: torch.dtype, experts: str) -> Step:
    """transformers' step with the same weights: parameters in `weights`, computed in `dtype`."""
    model = deepseek_v3(fresh_model(torch.float32), torch.float32, torch.device("cpu"), experts).to(weights).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATE, betas=BETAS, eps=1e-8, fused=True)

    def step(ids_BT: Tensor) -> float:
        with torch.autocast("cpu", dtype, enabled=weights is not dtype):
            loss: Tensor = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def peak(dtype: torch.dtype, size: int = 3072) -> float:
    """FLOP/s of a product of two square matrices, median of five."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / median(_seconds(lambda: a @ b) for _ in range(6))


def measure(name: str, args: argparse.Namespace) -> list[Row]:
    """Kvern and each peer of one dtype, step by step in turn."""
    dtype = DTYPES[name]
    ways = {"autocast": torch.float32, "weights": dtype} if name == "bf16" else {"weights": dtype}
    ours = kvern_step(dtype, args.balanced)
    peers = {way: transformers_step(dtype, weights, args.experts) for way, weights in ways.items()}
    if args.compile:
        peers["compiled"] = kvern_step(dtype, args.balanced, compiled=True)
    losses = dict.fromkeys(("kvern", *peers), 0.0)
    times: dict[str, list[float]] = {way: [] for way in losses}
    generator = torch.Generator().manual_seed(1)
    for index in range(args.pairs + args.warmup):
        ids_BT = torch.randint(0, config().vocab_size, (args.rows, args.length), generator=generator)
        for way, step in {"kvern": ours, **peers}.items():
            start = time.perf_counter()
            losses[way] = step(ids_BT)
            if index >= args.warmup:
                times[way].append(time.perf_counter() - start)
    tokens, share = ids_BT.numel(), step_flops(config(), 1, args.length / 2) / peak(dtype)
    rows = []
    for way in peers:
        pairs = tuple((tokens / a, tokens / b) for a, b in zip(times["kvern"], times[way], strict=True))
        left, right = (median(column) for column in zip(*pairs, strict=True))
        ratio = median(a / b for a, b in pairs)
        rows.append(
            Row(name, way, left, right, ratio, left * share, right * share, (losses["kvern"], losses[way]), pairs)
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bf16,f32", help="bf16, f32 or both")
    parser.add_argument("--pairs", type=int, default=5, help="measured steps of each")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts implementation")
    parser.add_argument("--balanced", action="store_true", help="Kvern also balances its experts")
    parser.add_argument("--compile", action="store_true", help="one peer more: Kvern's step, compiled")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    load_at_start = os.getloadavg()[0]
    torch.set_num_threads(default_threads())
    rows = [row for name in args.dtypes.split(",") for row in measure(name, args)]
    if args.json:
        print(json.dumps({"load": load_at_start, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print_table(rows, load_at_start)


def print_table(rows: list[Row], load_at_start: float) -> None:
    """One line a peer."""
    total = sum(p.numel() for p in Transformer(config()).parameters()) / 1e6
    threads = f"{torch.get_num_threads()} threads"
    print(f"{total:.1f}M parameters, {machine().cpu}, {threads}, load {load_at_start:.1f} at the start")
    print(f"{'':<6}{'beside':<14}{'Kvern tok/s':>12}{'theirs':>8}{'ratio':>7}{'of peak':>9}{'theirs':>8}  of pairs")
    for row in rows:
        each = " ".join(f"{a / b:.2f}" for a, b in row.pairs)
        shares = f"{row.kvern_of_peak:>9.3f}{row.transformers_of_peak:>8.3f}"
        print(
            f"{row.dtype:<6}{row.peer:<14}{row.kvern:>12.0f}{row.transformers:>8.0f}{row.ratio:>7.2f}{shares}  {each}"
        )
        print(f"{'':<6}losses of the last step: {row.losses[0]:.4f} and {row.losses[1]:.4f}")


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
