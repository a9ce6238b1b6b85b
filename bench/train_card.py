"""A training step of a V3-wide model on one card: tokens/s and the share of the card's peak, in BF16 and in FP8.

    python -m bench.train_card [--ways bf16,fp8,transformers] [--rows 2] [--length 4096] [--steps 5] [--profile]

The layers are DeepSeek-V3's, number for number; fewer of them, and fewer experts, so that FP32 masters, gradients and
moments fit one card: one dense layer, two with 16 routed experts, of which a token takes 8; 2.7 billion parameters.
Each way is built, warmed up and timed alone, one after the other, on the same rows of random tokens:

- `bf16`: FP32 masters and gradients, BF16 activations and moments.
- `fp8`: the same with the three products of every Linear and expert in FP8 (the report's recipe).
- `transformers`: DeepseekV3ForCausalLM, all in BF16, with fused AdamW, sdpa and the grouped product over experts.

The share divides a step's FLOPs (`kvern.plan.flops`) by the dense BF16 peak of the card's data sheet, also for FP8,
whose own peak is twice that. A step is forward, backward, clipping and AdamW; the three are timed with events, too.
`--device cpu --tiny` runs the same code on a model that a CPU trains, to try the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from bench.transformers_peer import deepseek_v3
from torch import Tensor

from kvern.config import ModelConfig
from kvern.data.row_stream import Row
from kvern.model import Transformer
from kvern.model.linear import RMSNorm
from kvern.ops import Fp8Recipe
from kvern.plan.flops import active_weights, step_flops
from kvern.train.balance import LoadBalancer, RoutingLog
from kvern.train.loss import training_loss
from kvern.train.model import make_trainable
from kvern.train.optim import AdamW, clip_gradients, parameter_groups
from kvern.train.peak import peak
from kvern.train.step import pack

RATE, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
PARTS = ("forward", "backward", "update")

Step = Callable[[Tensor], tuple[float, list[float]]]
"""One step over the rows [B, T] of a batch: its loss, and when each of `PARTS` was over, from `Clock`."""


@dataclass(frozen=True)
class Measured:
    """One way: medians of the timed steps. seconds of each of `PARTS`; gigabytes at most allocated."""

    way: str
    tokens_per_s: float
    of_peak: float
    seconds: dict[str, float]
    gigabytes: float
    loss: float


def config(tiny: bool = False) -> ModelConfig:
    """V3's layers: hidden 7168, 128 heads, experts of 2048; three layers, 16 experts, a small vocabulary."""
    narrow = {
        "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_attention_heads": 2,
        "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "vocab_size": 512,
    }  # fmt: skip
    wide = {
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_attention_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": 16384,
    }  # fmt: skip
    sizes: dict[str, Any] = narrow if tiny else wide
    return ModelConfig(
        **sizes,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=0,
        max_position_embeddings=4096,
        torch_dtype="float32",
    )


@torch.no_grad()
def fresh_model(shape: ModelConfig, device: torch.device, recipe: Fp8Recipe | None = None) -> Transformer:
    """Weights that are always the same on one device; drawn there, for billions take long on a CPU."""
    model = Transformer(shape, device="meta", activation_dtype=torch.bfloat16)
    make_trainable(model, recipe)
    model.to_empty(device=device.type)
    generator = torch.Generator(device).manual_seed(0)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    for parameter in model.parameters():
        if id(parameter) in norms:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.006, generator=generator)  # the report's 0.006
    for buffer in model.buffers():
        buffer.zero_()
    return model


def kvern_step(shape: ModelConfig, device: torch.device, recipe: Fp8Recipe | None) -> Step:
    """Kvern's step, with balance."""
    model = fresh_model(shape, device, recipe)
    named = dict(model.named_parameters())
    optimizer = AdamW(parameter_groups(model, DECAY), RATE, betas=BETAS)
    log, balancer = RoutingLog(model), LoadBalancer(model)

    def step(ids_BT: Tensor) -> tuple[float, list[float]]:
        clock = Clock(device)
        rows = pack([Row(ids.numpy(), (len(ids),), None) for ids in ids_BT], device)
        losses = training_loss(model, rows, log)
        clock.lap()
        torch.autograd.backward(losses.total)
        clock.lap()
        clip_gradients(named, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        balancer.count(losses.routings)
        balancer.step()
        clock.lap()
        return float(losses.main), clock.seconds()

    return step


def transformers_step(shape: ModelConfig, device: torch.device) -> Step:
    """transformers' step with the same weights, rounded to BF16."""
    model = deepseek_v3(fresh_model(shape, device), torch.bfloat16, device)
    parameters = list(model.train().parameters())
    optimizer = torch.optim.AdamW(parameters, RATE, betas=BETAS, weight_decay=DECAY, fused=True)

    def step(ids_BT: Tensor) -> tuple[float, list[float]]:
        clock = Clock(device)
        ids_BT = ids_BT.to(device)
        loss: Tensor = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        clock.lap()
        torch.autograd.backward(loss)
        clock.lap()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        clock.lap()
        return float(loss.detach()), clock.seconds()

    return step


class Clock:
    """Laps on the device: what a card does is timed by its own events, and the host waits once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self._on_card = device.type == "cuda"
        self._marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        """One part is over."""
        if self._on_card:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each lap."""
        if not self._on_card:
            return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in zip(self._marks, self._marks[1:], strict=False)]


def measure(way: str, shape: ModelConfig, device: torch.device, args: argparse.Namespace) -> Measured:
    """Build one way, warm it up, time it; it is gone afterwards."""
    on_card = device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    if way == "transformers":
        step = transformers_step(shape, device)
    else:
        step = kvern_step(shape, device, Fp8Recipe() if way == "fp8" else None)
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(0, shape.vocab_size, (args.rows, args.length), generator=generator)
        for _ in range(args.warmup + args.steps)
    ]
    for ids_BT in batches[: args.warmup]:
        step(ids_BT)
    laps, totals, loss = [], [], 0.0
    with profiled(args.profile and on_card, way):
        for ids_BT in batches[args.warmup :]:
            begin = time.perf_counter()
            loss, seconds = step(ids_BT)
            totals.append(time.perf_counter() - begin)
            laps.append(seconds)
    total = median(totals)
    tokens = args.rows * args.length
    flops = step_flops(shape, tokens, tokens * (args.length + 1) / 2)
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_card else 0.0
    parts = {part: median(column) for part, column in zip(PARTS, zip(*laps, strict=True), strict=True)}
    return Measured(way, tokens / total, flops / total / peak(device, torch.bfloat16).flops, parts, memory, loss)


@contextmanager
def profiled(wanted: bool, way: str) -> Iterator[None]:
    """Print where the card's time goes."""
    if not wanted:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    print(way)
    print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="bf16,fp8,transformers", help="of these three")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains")
    parser.add_argument("--profile", action="store_true", help="print where the card's time goes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    device, shape = torch.device(args.device), config(args.tiny)
    found = []
    for way in args.ways.split(","):
        found.append(measure(way, shape, device, args))
        gc.collect()
        torch.cuda.empty_cache()
    if args.json:
        print(json.dumps({"device": device_name(device), "ways": [asdict(one) for one in found]}, indent=2))
    else:
        print_table(found, shape, device, args)


def print_table(found: list[Measured], shape: ModelConfig, device: torch.device, args: argparse.Namespace) -> None:
    """One line a way."""
    total = sum(p.numel() for p in Transformer(shape).parameters()) / 1e9
    print(f"{total:.2f}B parameters, {active_weights(shape) / 1e9:.2f}B active, {device_name(device)}")
    print(f"{args.rows} rows of {args.length} tokens a step; torch {torch.__version__}")
    print(
        f"{'':<14}{'tokens/s':>10}{'of peak':>9}{'forward':>10}{'backward':>10}{'update':>10}{'memory':>9}{'loss':>9}"
    )
    for one in found:
        parts = "".join(f"{one.seconds[part] * 1e3:>7.0f} ms" for part in PARTS)
        speed = f"{one.tokens_per_s:>10,.0f}{one.of_peak:>9.1%}"
        print(f"{one.way:<14}{speed}{parts}{one.gigabytes:>6.1f} GB{one.loss:>9.4f}")


def device_name(device: torch.device) -> str:
    """The card's name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
