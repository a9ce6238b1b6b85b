"""transformers' own Qwen2 with the weights of a pulled GGUF file, to compare Kvern with; and its static batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvern.checkpoint.gguf import GGUFSource
from kvern.checkpoint.known_models import find_model
from kvern.checkpoint.local import pulled_path
from kvern.errors import NotFoundError
from kvern.model import Transformer
from kvern.train.experts import checkpoint_state


@dataclass(frozen=True)
class Work:
    """One request: prompt ids, and how many tokens to generate."""

    prompt: tuple[int, ...]
    tokens: int


class Static:
    """transformers' Qwen2 with the same weights: whole batches, padded on the left."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def generate(self, work: Sequence[Work]) -> list[list[int]]:
        """The answers of one batch that lasts until the longest is complete."""
        width = max(len(one.prompt) for one in work)
        pads = [width - len(one.prompt) for one in work]
        ids = torch.tensor([[0] * pad + list(one.prompt) for pad, one in zip(pads, work, strict=True)])
        steps = max(one.tokens for one in work)
        mask = (torch.arange(width + steps) >= torch.tensor(pads)[:, None]).long() if any(pads) else None
        out = self._forward(ids, mask, None)
        tokens = [out.logits[:, -1].argmax(-1)]
        for _ in range(steps - 1):
            out = self._forward(tokens[-1][:, None], mask, out.cache)
            tokens.append(out.logits[:, -1].argmax(-1))
        return [row[: one.tokens] for row, one in zip(torch.stack(tokens, 1).tolist(), work, strict=True)]

    def run(self, work: Sequence[Work]) -> float:
        """Tokens/s of one batch, counting those that were asked for."""
        start = time.perf_counter()
        drawn = sum(len(answer) for answer in self.generate(work))
        return drawn / (time.perf_counter() - start)

    def run_all(self, work: Sequence[Work], places: int) -> float:
        """Tokens/s over batches of `places` in order."""
        start = time.perf_counter()
        batches = [work[first : first + places] for first in range(0, len(work), places)]
        drawn = sum(len(answer) for batch in batches for answer in self.generate(batch))
        return drawn / (time.perf_counter() - start)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> Any:
        """One pass over ids [B, T] behind what is in the cache; mask [B, longest] of a padded batch."""
        padded = {}
        if mask is not None:
            seen = mask[:, : ids.shape[1] + (0 if cache is None else cache.get_seq_length())]
            padded = {"attention_mask": seen, "position_ids": (seen.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
        return self.model(ids, cache=cache, use_cache=True, logits_to_keep=1, **padded)


def deepseek_v3(ours: Transformer, dtype: torch.dtype, device: torch.device, experts: str = "grouped_mm") -> Any:
    """transformers' DeepseekV3ForCausalLM in `dtype` with the weights of `ours`, a trainable model without MTP.

    experts: its experts_implementation, grouped_mm, or eager for the loop.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = {k: v for k, v in ours.config.to_dict().items() if k not in ("architectures", "torch_dtype")}
    with torch.device(device):
        model: Any = DeepseekV3ForCausalLM._from_config(
            DeepseekV3Config(**fields), dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
        )
    state = checkpoint_state(ours)
    for name, target in model.state_dict().items():
        stem, _, stack = name.rpartition(".")
        if stem.endswith(".experts"):
            parts = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
            for index, expert in enumerate(target):
                expert.copy_(torch.cat([state[f"{stem}.{index}.{part}.weight"] for part in parts]))
        else:
            target.copy_(state[name])
    return model


def load_qwen2(name: str, dtype: torch.dtype, *, rounded: bool = False) -> Any:
    """The pulled model `name` with the file's dequantised weights in `dtype`, in eval mode.

    `rounded`: to BF16 first, as the import has them. Raises NotFoundError when it was not pulled.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    pulled = pulled_path(find_model(name))
    if pulled is None:
        raise NotFoundError(f"{name} has not been pulled", hint=f"run `kvern pull {name}`")
    source = GGUFSource(pulled if pulled.is_file() else next(pulled.glob("*.gguf")))
    config = Qwen2Config(**source.config)
    with torch.device("meta"):
        model: Any = Qwen2ForCausalLM(config)
    weights = {name: source.tensor(name).to(torch.bfloat16 if rounded else dtype).to(dtype) for name in source.names()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()
