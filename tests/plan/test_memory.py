"""The closed forms against the report's figures and against the layout of the model itself."""

from __future__ import annotations

import pytest
from tests.model.oracle import random_config

from kvern.config import ModelConfig, known_configurations
from kvern.model import Transformer
from kvern.plan.memory import account


def test_deepseek_v3_weighs_what_the_report_says() -> None:
    v3 = account(ModelConfig.named("deepseek-v3"))
    assert v3.parameters == 671_026_419_200
    assert abs(v3.active_parameters / 36.6e9 - 1) < 0.005
    assert v3.latent_bytes_per_token == 70_272
    assert v3.latent8_bytes_per_token == 61 * 656
    assert v3.cache_bytes(3, fp8=True) == 3 * 61 * 656
    assert v3.mha_bytes_per_token == 3_997_696
    assert v3.checkpoint_bytes == 688_574_839_360
    assert abs(v3.mtp_parameters / 11.61e9 - 1) < 0.001


@pytest.mark.parametrize(
    "name", sorted(set(known_configurations()) - {"deepseek-v3-0324", "deepseek-r1", "deepseek-v3.1"})
)
def test_known_sizes(name: str) -> None:
    billions = {"deepseek-v3": 671.0, "moonlight-16b-a3b": 16.0, "kimi-k2": 1026.4}
    assert account(ModelConfig.named(name)).parameters / 1e9 == pytest.approx(billions[name], rel=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_closed_forms_equal_the_model(seed: int) -> None:
    config = random_config(seed)
    state = Transformer(config).state_dict()
    counted = account(config)
    mtp = f".layers.{config.num_hidden_layers}."
    assert counted.parameters == sum(t.numel() for name, t in state.items() if mtp not in name)
    assert counted.checkpoint_bytes == sum(t.numel() * t.element_size() for t in state.values())
