"""The gate's bias and the sequence loss: by hand, and that an unbalanced router becomes balanced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import tiny_config, tiny_model
from torch import Tensor

from kvern.checkpoint.save import save_model
from kvern.config import ModelConfig
from kvern.errors import ConfigError
from kvern.model import Transformer
from kvern.model.moe import Gate
from kvern.train.balance import (
    GAMMA_TOKENS,
    Load,
    LoadBalancer,
    Routing,
    RoutingLog,
    expert_counts,
    gamma_at,
    move_bias,
    sequence_balance_loss,
)
from kvern.train.loss import LossOptions, training_loss
from kvern.train.model import make_trainable
from kvern.train.packed_rows import PackedRows
from kvern.train.weights import initialise

DOCUMENTS = [[5, 9, 3, 7, 2, 8], [1, 4, 6], [10, 11]]


def trainable(config: ModelConfig | None = None) -> Transformer:
    model = tiny_model(config or tiny_config(num_nextn_predict_layers=1))
    initialise(model, 0, std=0.2)
    make_trainable(model)
    return model


def test_the_bias_moves_by_sign() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.25])
    move_bias(bias, torch.tensor([9, 4, 0, 3]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.0, -0.499, 0.251]), rtol=0, atol=1e-7)


def test_gamma_ends() -> None:
    assert [gamma_at(tokens) for tokens in (0, GAMMA_TOKENS - 1, GAMMA_TOKENS)] == [0.001, 0.001, 0.0]


def test_load() -> None:
    assert Load(torch.tensor([6, 2, 0, 0])).max_over_mean == 3.0
    assert Load(torch.tensor([6, 2, 0, 0])).idle == 2
    assert Load(torch.zeros(4, dtype=torch.int64)).max_over_mean == 0.0


@pytest.mark.parametrize("by_choice", [False, True])
def test_the_sequence_loss_by_hand(by_choice: bool) -> None:
    scores = torch.rand(7, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    chosen = torch.tensor([[0, 1], [1, 2], [3, 0], [0, 2], [2, 3], [0, 1], [1, 3]])
    expected = torch.zeros(())
    for first, last in ((0, 3), (3, 7)):
        row, length = scores[first:last], last - first
        for expert in range(4):
            if by_choice:
                count = sum(expert in pair for pair in chosen[first:last].tolist())
            else:
                count = sum(expert in token.topk(2).indices.tolist() for token in row)
            share = sum(token[expert] / token.sum() for token in row) / length
            expected = expected + 0.5 * 0.01 * (4 / (2 * length) * count) * share
    got = sequence_balance_loss({"gate": Routing(scores, chosen)}, (0, 3, 3, 7), 0.01, by_choice)
    torch.testing.assert_close(got, expected)
    torch.autograd.backward(got)
    assert scores.grad is not None
    assert scores.grad.any()


def test_a_balanced_router_has_the_least_loss() -> None:
    even = Routing(torch.full((4, 4), 0.5), torch.tensor([[0], [1], [2], [3]]))
    skewed = Routing(torch.tensor([[0.9, 0.1, 0.1, 0.1]] * 4), torch.zeros(4, 1, dtype=torch.int64))
    assert float(sequence_balance_loss({"g": even}, (0, 4), 1.0, True)) == pytest.approx(1.0)
    assert float(sequence_balance_loss({"g": skewed}, (0, 4), 1.0, True)) == pytest.approx(3.0)


def test_an_unbalanced_router_is_balanced_by_step_500() -> None:
    gate = Gate(tiny_config(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4), "cpu").train()
    generator = torch.Generator().manual_seed(0)
    gate.weight.data.copy_(0.1 * torch.randn(16, 32, generator=generator))
    gate.weight.data[:4, 0] += 1.0
    balancer, loads = LoadBalancer(gate), []
    for _ in range(500):
        x = torch.randn(64, 32, generator=generator)
        x[:, 0] = 1.0
        _, experts = gate(x)
        balancer.count({"": Routing(torch.empty(0), experts)})
        loads.append(balancer.step()[""].max_over_mean)
    assert sum(loads[:5]) / 5 > 3.0  # 4 is the most: four experts with every token
    assert sum(loads[-20:]) / 20 < 2.0


def test_every_gate_is_heard_in_training_alone_and_moved(tmp_path: Path) -> None:
    model = trainable()
    log, balancer = RoutingLog(model), LoadBalancer(model)
    names = ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    losses = training_loss(model, PackedRows.of(*DOCUMENTS), log)
    assert {name: len(routing.experts_TK) for name, routing in losses.routings.items()} == dict(
        zip(names, (11, 8), strict=True)
    )
    balancer.count(losses.routings)
    loads = balancer.step(0.5)
    assert [int(loads[name].counts_N.sum()) for name in names] == [22, 16]
    for name, gate in balancer.gates.items():
        mean = loads[name].counts_N.float().mean()
        torch.testing.assert_close(gate.e_score_correction_bias, 0.5 * torch.sign(mean - loads[name].counts_N))
    assert not any(load.counts_N.any() for load in balancer.step(0.5).values())
    model.eval()
    assert training_loss(model, PackedRows.of(*DOCUMENTS), log).routings == {}
    save_model(model, tmp_path, config=model.config, force=True)
    for name, gate in balancer.gates.items():
        saved = load_file(tmp_path / "model.safetensors")[f"{name}.e_score_correction_bias"]
        assert torch.equal(saved, gate.e_score_correction_bias)
        assert saved.dtype is torch.float32


def test_loads_of_all_ranks_count() -> None:
    gate = Gate(tiny_config(), "cpu")
    balancer = LoadBalancer(gate)
    balancer.count({"": Routing(torch.empty(0), torch.tensor([[0, 1], [0, 1]]))})

    def reduce(counts: Tensor) -> None:
        counts += torch.tensor([0, 0, 6, 4])

    assert balancer.step(1.0, reduce)[""].counts_N.tolist() == [2, 2, 6, 4]
    assert gate.e_score_correction_bias.tolist() == [1.0, 1.0, -1.0, -1.0]


def test_the_balance_loss_reaches_the_gates_and_counts() -> None:
    gradients = []
    for alpha in (0.0, 1.0):
        model = trainable()
        losses = training_loss(model, PackedRows.of(*DOCUMENTS), RoutingLog(model), options=LossOptions(balance=alpha))
        torch.autograd.backward(losses.total)
        torch.testing.assert_close(losses.total.detach(), losses.main + 0.3 * losses.mtp + losses.balance)
        gradients.append([model.get_parameter(f"model.layers.{n}.mlp.gate.weight").grad for n in (1, 2)])
    for without, with_loss in zip(*gradients, strict=True):
        assert without is not None
        assert with_loss is not None
        assert (without - with_loss).abs().max() > 1e-4


def test_counts_and_a_bias_that_is_not_float32() -> None:
    assert expert_counts(torch.tensor([[0, 3], [3, 1]]), 5).tolist() == [1, 1, 0, 2, 0]
    with pytest.raises(ConfigError, match="must be float32"):
        LoadBalancer(Gate(tiny_config(), "cpu").bfloat16())
