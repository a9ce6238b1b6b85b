"""An engine whose cache holds 8-bit records: answers, prefixes, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.model.oracle import random_config
from tests.model.test_packed import pack, stored_as

from kvern.engine import Engine, EngineSettings, SamplingParams
from kvern.engine import engine as engine_module
from kvern.engine.cache import RECORDS, PagedCache, Span
from kvern.engine.engine import cache_blocks
from kvern.engine.settings import CacheDtype
from kvern.errors import ConfigError
from kvern.llm import LLM
from kvern.model import Transformer
from kvern.ops import packed, reference_latent8
from kvern.plan import hardware
from kvern.plan.memory import account, latent8_bytes

CACHE_DTYPES: tuple[CacheDtype, ...] = ("auto", "fp8")
KINDS = [
    "plain",
    pytest.param("packed", marks=pytest.mark.skipif(not packed.available(), reason="the kernels were not built")),
]


def engine(kind: str, *, seed: int = 3, **settings: object) -> Engine:
    model: Transformer = stored_as(seed, torch.bfloat16, torch.float32)
    chosen = EngineSettings(
        **{"cache_dtype": "fp8", "cache_tokens": 512, "block_size": 4, "check_every_step": True, **settings}  # type: ignore[arg-type]
    )
    return Engine(pack(model) if kind == "packed" else model, settings=chosen)


def answers(running: Engine, prompts: Sequence[Sequence[int]], count: int = 12) -> list[list[int]]:
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    found: dict[int, list[int]] = {running.add(prompt, params): [] for prompt in prompts}
    while running.has_work():
        for update in running.step():
            assert update.error is None
            found[update.request_id] += update.tokens
    return list(found.values())


PROMPTS = [[(7 * i + 13 * number) % 60 + 2 for i in range(9 + 8 * number)] for number in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_the_one_it_has_alone(kind: str) -> None:
    together = answers(engine(kind, step_tokens=16, max_running=4), PROMPTS)
    assert together == [answers(engine(kind), [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_prefix_gives_the_same_answer(kind: str) -> None:
    running = engine(kind)
    first = answers(running, [PROMPTS[3]])
    assert answers(running, [PROMPTS[3]]) == first
    assert running.stats().prefix_hits == len(PROMPTS[3]) // 4 * 4
    running.reset()
    assert answers(running, [PROMPTS[3]]) == first
    assert running.cache.dtype is RECORDS


def test_kinds_of_rows_never_meet_in_one_engine() -> None:
    running = engine("plain")
    running.cache = PagedCache(running.model.config, 128, 4, torch.float32)
    with pytest.raises(AssertionError, match="mix dtypes"):
        running.reset()


def test_the_view_of_a_step_gives_back_what_the_records_hold() -> None:
    config = random_config(0)
    cache = PagedCache(config, 6, 4, RECORDS)
    assert cache.rows.shape[2] == latent8_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
    latents = torch.randn(9, config.latent_dim, generator=torch.Generator().manual_seed(0))
    records = reference_latent8.encode_latents(latents, config.kv_lora_rank)
    expected = reference_latent8.decode_latents(records, config.kv_lora_rank, config.qk_rope_head_dim)
    for blocks in ([5, 0, 2], [1, 2, 3]):
        view = cache.step([Span(blocks, 0, 9)])
        view.extend(1, latents)
        assert torch.equal(view.context(1, 0, slice(0, 9)), expected)


def test_memory_holds_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stored_as(0, torch.bfloat16, torch.bfloat16)
    config, counted = model.config, account(model.config)
    layers = (config.num_hidden_layers + config.num_nextn_predict_layers) / config.num_hidden_layers
    free = replace(hardware.machine(), memory_available=int(2 * 100 * counted.latent_bytes_per_token * layers))
    monkeypatch.setattr(engine_module, "machine", lambda: free)
    tokens = [cache_blocks(model, EngineSettings(cache_dtype=dtype, block_size=1)) for dtype in CACHE_DTYPES]
    assert tokens == [100, 100 * counted.latent_bytes_per_token // counted.latent8_bytes_per_token]


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache_dtype must be one of auto, fp8, not 'fp4'"):
        EngineSettings(cache_dtype="fp4")  # type: ignore[arg-type]


def test_from_the_folder_to_text(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, settings=EngineSettings(cache_dtype="fp8", check_every_step=True))
    assert llm.engine.cache.dtype is RECORDS
    one, other = llm.generate(["def add", "the cat"], max_tokens=8, temperature=0)
    assert [one.text, other.text] == [llm.generate(p, max_tokens=8, temperature=0).text for p in ("def add", "the cat")]
