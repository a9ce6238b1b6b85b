"""How many tokens are drafted, and what a step is thought to cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.test_properties import model

from kvern.config import ModelConfig
from kvern.engine.draft_length import Chances, Load, best_length
from kvern.engine.step_cost import StepCost


class Linear:
    """Ten, and one a row."""

    def __call__(self, rows: int, attended: int) -> float:
        return 10.0 + rows

    def mtp_pass(self, rows: int) -> float:
        return 3.0


linear = Linear()


@given(st.lists(st.floats(0, 1), max_size=8), st.integers(1, 40), st.sampled_from([0.0, 0.5, 3.0]))
def test_no_other_length_is_better(chances: list[float], rows: int, making: float) -> None:
    load = Load(rows, 0, rows)
    count, chosen = best_length(chances, load, 5, linear, making)
    rates = []
    for k in range(len(chances) + 1):
        reach, gained = 1.0, 0.0
        for chance in chances[:k]:
            reach *= chance
            gained += reach
        rates.append((rows + gained) / (linear(rows + k, 0) + k * making))
    assert rates[count] == pytest.approx(max(rates))
    assert (chosen.rows, chosen.attended) == (rows + count, 5 * count)
    assert chosen.rate(linear) == pytest.approx(max(rates))


@pytest.mark.parametrize(
    ("chance", "rows", "length"), [(1.0, 1, 8), (0.0, 1, 0), (0.05, 1, 0), (0.5, 1, 2), (0.5, 30, 0), (0.9, 30, 2)]
)
def test_doubt_and_company_shorten_drafts(chance: float, rows: int, length: int) -> None:
    assert best_length([chance] * 8, Load(rows, 0, rows), 1, linear)[0] == length


def test_chances_follow_what_happens() -> None:
    chances = Chances([0.5, 0.9])
    assert (chances.of(0), chances.of(1), chances.of(7)) == (0.5, 0.9, 0.9)
    for _ in range(100):
        chances.learn(0, False)
        chances.learn(9, True)
    assert chances.of(0) < 0.01
    assert chances.of(1) > 0.99
    for _ in range(40):
        chances.learn(0, True)
    assert chances.of(0) > 0.5


def dense(**changes: object) -> ModelConfig:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "vocab_size": 50000, "intermediate_size": 4096}
    config = replace(model().config, **sizes, first_k_dense_replace=24, torch_dtype="bfloat16")  # type: ignore[arg-type]
    return replace(config, **changes)  # type: ignore[arg-type]


def test_rows_are_cheap_in_a_dense_model_and_dear_where_they_wake_experts() -> None:
    plain = StepCost(dense())
    sparse = StepCost(
        dense(first_k_dense_replace=1, n_routed_experts=64, num_experts_per_tok=4, moe_intermediate_size=1024)
    )
    assert plain(2, 2) / plain(1, 1) < 1.2
    assert sparse(2, 2) / sparse(1, 1) > 1.5


def test_costs_grow_with_rows_and_context() -> None:
    cost = StepCost(dense())
    assert all(cost(rows, 100) < cost(rows + 1, 100) for rows in range(1, 64))
    assert all(cost(4, a) < cost(4, b) for a, b in pairwise([0, 1000, 10000]))
    assert cost(2, 2 * 16000) / cost(1, 16000) > cost(2, 2) / cost(1, 1)


def test_drafts_that_cost_as_much_as_they_save_are_not_made() -> None:
    load = Load(1, 0, 1)
    assert best_length([0.9] * 8, load, 1, linear, making=9.0)[0] == 0
    assert best_length([0.9] * 8, load, 1, linear, making=3.0)[0] > 0
    assert best_length([0.9] * 8, load, 1, linear, making=3.0)[0] < best_length([0.9] * 8, load, 1, linear)[0]


def test_a_pass_of_the_mtp_layer_costs_a_layer_and_the_head() -> None:
    sparse = dense(first_k_dense_replace=1, n_routed_experts=64, num_experts_per_tok=4, moe_intermediate_size=1024)
    config = replace(sparse, num_nextn_predict_layers=1)
    cost = StepCost(config)
    assert 0.05 < cost.mtp_pass(1) / cost(1, 1) < 0.5
    assert cost.mtp_pass(1) < cost.mtp_pass(8) < 8 * cost.mtp_pass(1), "rows wake experts, and share the rest"
