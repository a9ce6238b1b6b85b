"""Choices of one request, with a real engine: their prompt is computed once, and each is what it is alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.serving import serving

from kvern.checkpoint.load import load
from kvern.engine import Engine, EngineSettings
from kvern.engine.runner import Computed
from kvern.engine.scheduler import Chunk
from kvern.llm import LLM

PROMPT = list(range(30, 130))
BODY: dict[str, Any] = {
    "model": "tiny-v3",
    "prompt": PROMPT,
    "max_tokens": 6,
    "temperature": 1.0,
    "ignore_eos": True,
}


@pytest.mark.parametrize("stream", [False, True])
def test_n_cold_choices_compute_their_prompt_once(
    tiny_folder: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(load(tiny_folder), settings=EngineSettings(cache_tokens=2048, step_tokens=512))
    run, computed = engine.runner.run, []

    def counting(chunks: Sequence[Chunk]) -> Computed:
        computed.append(sum(chunk.count for chunk in chunks))
        return run(chunks)

    monkeypatch.setattr(engine.runner, "run", counting)
    with serving(lambda: LLM(tiny_folder, engine=engine)) as server:
        url = f"{server.url}/v1/completions"
        response = httpx.post(url, json={**BODY, "n": 5, "seed": 7, "stream": stream}, timeout=20)
        assert response.status_code == 200
        rest = len(PROMPT) % 16
        assert sum(computed) == len(PROMPT) + 4 * rest + 5 * 5
        if stream:
            return
        texts = [choice["text"] for choice in response.json()["choices"]]
        alone = [
            httpx.post(url, json={**BODY, "seed": 7 + i}, timeout=20).json()["choices"][0]["text"] for i in range(5)
        ]
    assert texts == alone
    assert len(set(texts)) > 1
