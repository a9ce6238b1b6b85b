"""Runs the real 671B configuration from a sparse checkpoint on this machine, and measures what it takes.

    python bench/run_671b.py [--tokens 2] [--no-parity] [--json]

Writes 689 GB of holes (0.3 GB on disk) into a temporary folder, opens it, generates from a one-token prompt, and
compares the seeded dense and MoE layer with transformers' DeepseekV3DecoderLayer in float32 on the same dequantised
tensors. transformers' MoE layer is built with the 15 experts that the gate can choose, in their 5 groups: the other 241
lose against them whatever the input (asserted), so the choice is the same. Every product goes through the page cache
like real weights do; the answer means nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RotaryEmbedding

from kvern.checkpoint.load import load
from kvern.checkpoint.sparse import Seeded, apparent_bytes, disk_bytes, write_sparse
from kvern.config import ModelConfig
from kvern.engine import Engine, EngineSettings, SamplingParams
from kvern.model import ForwardBatch, Transformer
from kvern.model.linear import Linear


@dataclass
class Report:
    """Seconds, bytes, and the largest difference to transformers relative to what the layer adds to its input."""

    apparent_bytes: int
    disk_bytes: int
    write_seconds: float
    open_seconds: float = 0.0
    token_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logits_min: float = 0.0
    logits_max: float = 0.0
    logits_std: float = 0.0
    anonymous_bytes: int = 0
    anonymous_peak_bytes: int = 0
    layer_differences: dict[int, float] = field(default_factory=dict)


class AnonymousPeak:
    """Samples this process's anonymous memory (RssAnon, without mapped files) twenty times a second."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run(folder: Path, config: ModelConfig, *, tokens: int = 2, parity: bool = True) -> Report:
    """Write, open, generate, compare.

    64 ids have embedding and head rows: the prompt is one of them, and so is the greedy answer, whose logits are not 0.
    """
    step = max(1, config.vocab_size // 64)
    started = time.perf_counter()
    seeded = write_sparse(folder, config, token_ids=range(step // 2, config.vocab_size, step))
    report = Report(apparent_bytes(folder), disk_bytes(folder), time.perf_counter() - started)
    with AnonymousPeak() as memory:
        started = time.perf_counter()
        model = load(folder)
        report.open_seconds = time.perf_counter() - started
        _generate(model, seeded.token_ids[0], tokens, report)
        report.anonymous_bytes = anonymous_bytes()
    report.anonymous_peak_bytes = memory.peak
    if parity:
        for layer in (seeded.dense_layer, seeded.moe_layer):
            report.layer_differences[layer] = layer_difference(model, layer, seeded)
    return report


def _generate(model: Transformer, prompt: int, tokens: int, report: Report) -> None:
    spread: list[Tensor] = []
    engine = Engine(model, settings=EngineSettings(max_context=16))
    with _logits_into(model, spread):
        started = time.perf_counter()
        for token in engine.generate([prompt], SamplingParams(max_tokens=tokens, ignore_eos=True)):
            report.token_seconds.append(time.perf_counter() - started)
            report.tokens.append(token)
            started = time.perf_counter()
    logits = torch.cat(spread)
    assert torch.isfinite(logits).all()
    report.logits_min, report.logits_max = float(logits.min()), float(logits.max())
    report.logits_std = float(logits.std(dim=-1).min())


@contextmanager
def _logits_into(model: Transformer, kept: list[Tensor]) -> Iterator[None]:
    hook = model.register_forward_hook(lambda module, inputs, logits: kept.append(logits))
    try:
        yield
    finally:
        hook.remove()


@torch.inference_mode()
def layer_difference(model: Transformer, layer: int, seeded: Seeded, *, length: int = 6) -> float:
    """Largest difference between our layer and transformers' on random input, over the largest that the layer adds.

    Both in float32: ours reads FP8 and scales, transformers' has the dequantised weights. Positions 0 to `length` - 1.
    """
    config = model.config
    x = torch.randn(length, config.hidden_size, generator=torch.Generator().manual_seed(layer))
    batch = ForwardBatch.of(list(range(length)))
    module: Any = model.model.layers[layer]
    ours = module(x, model.model.rotation(batch), batch)
    if config.is_moe(layer):
        hidden = x + module.self_attn(module.input_layernorm(x), model.model.rotation(batch), batch)
        chosen = module.mlp.gate(module.post_attention_layernorm(hidden))[1]
        assert set(chosen.flatten().tolist()) <= set(seeded.experts)
    theirs = _transformers_layer(config, module, layer, seeded)(x)
    return float((ours - theirs).abs().max() / (theirs - x).abs().max())


def _transformers_layer(config: ModelConfig, module: Any, layer: int, seeded: Seeded) -> Any:
    """transformers' layer over the same tensors, dequantised; of the experts only those that can be chosen."""
    groups = {expert // (config.n_routed_experts // config.n_group) for expert in seeded.experts}  # type: ignore[operator]
    reduced = replace(config, n_routed_experts=len(seeded.experts), n_group=len(groups), quantization_config=None)
    values = {k: v for k, v in reduced.to_dict().items() if k not in ("architectures", "torch_dtype")}
    hf_config = DeepseekV3Config(**values, attn_implementation="eager", experts_implementation="eager")
    with torch.device("meta"):
        hf_layer = DeepseekV3DecoderLayer(hf_config, layer)
    hf_layer.load_state_dict(_dequantised(module, seeded), assign=True)
    rotary = DeepseekV3RotaryEmbedding(hf_config)

    def forward(x: Tensor) -> Tensor:
        mask = torch.full((len(x), len(x)), float("-inf")).triu(1)[None, None]
        embeddings = rotary(x[None], torch.arange(len(x))[None])
        out: Tensor = hf_layer(x[None], attention_mask=mask, position_embeddings=embeddings)[0]
        return out

    return forward


def _dequantised(module: Any, seeded: Seeded) -> dict[str, Tensor]:
    """The float32 state dict of transformers' layer, experts stacked as it wants them."""
    state: dict[str, Tensor] = {}
    for name, child in module.named_modules():
        if ".experts." in f".{name}.":
            continue
        if isinstance(child, Linear):
            state[f"{name}.weight"] = child.dense(torch.float32)
        else:
            for key, value in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
                state[f"{name}.{key}"] = value.float()
    if hasattr(module.mlp, "experts"):
        picked = list(seeded.experts)
        experts = [module.mlp.experts[expert] for expert in picked]
        for name in ("weight", "e_score_correction_bias"):
            state[f"mlp.gate.{name}"] = state[f"mlp.gate.{name}"][picked]
        down = [expert.down_proj.dense(torch.float32) for expert in experts]
        both = [torch.cat([e.gate_proj.dense(torch.float32), e.up_proj.dense(torch.float32)]) for e in experts]
        state["mlp.experts.gate_up_proj"], state["mlp.experts.down_proj"] = torch.stack(both), torch.stack(down)
    return state


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2)
    parser.add_argument("--no-parity", action="store_true", help="do not compare with transformers (needs 5 GB)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--in", dest="parent", type=Path, help="where to make the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvern-671b-", dir=args.parent) as folder:
        config = ModelConfig.named("deepseek-v3")
        report = run(Path(folder), config, tokens=args.tokens, parity=not args.no_parity)
    if args.json:
        print(json.dumps(asdict(report)))
        return
    print(f"checkpoint   {report.apparent_bytes / 1e9:.1f} GB apparent, {report.disk_bytes / 1e9:.2f} GB on disk, "
          f"written in {report.write_seconds:.1f} s")  # fmt: skip
    print(f"open         {report.open_seconds:.1f} s")
    print(f"tokens       {report.tokens}, seconds each: {', '.join(f'{s:.1f}' for s in report.token_seconds)}")
    print(f"logits       {report.logits_min:.3f} to {report.logits_max:.3f}, std {report.logits_std:.3f}")
    after, peak = report.anonymous_bytes / 2**30, report.anonymous_peak_bytes / 2**30
    print(f"anonymous    {after:.2f} GiB after, {peak:.2f} GiB peak")
    for layer, difference in report.layer_differences.items():
        print(f"layer {layer:<6} differs from transformers by {difference:.1e} of what it adds")


if __name__ == "__main__":
    main()
