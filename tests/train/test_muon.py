"""Muon against torch's, on stacks of experts against each matrix alone, and what AdamW keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny import tiny_config, tiny_model
from torch import Tensor, nn

from kvern.errors import ConfigError
from kvern.model import Transformer
from kvern.train.checkpoint import training_state
from kvern.train.model import make_trainable
from kvern.train.muon import PARTS, Muon, matrix_groups, orthogonal
from kvern.train.optim import AdamW, parameter_groups


def v3() -> Transformer:
    """Two layers, one of them routed, and MTP, which shares embedding and head."""
    model = tiny_model(tiny_config(num_nextn_predict_layers=1))
    make_trainable(model)
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_a_matrix_goes_where_torchs_muon_takes_it(shape: tuple[int, int]) -> None:
    ours, theirs = nn.Parameter(draw(*shape)), nn.Parameter(draw(*shape))
    left = Muon([{"params": [ours], PARTS: 1}], 1e-2, moments=torch.float32)
    right = torch.optim.Muon([theirs], 1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(8):
        for parameter, optimizer in ((ours, left), (theirs, right)):
            parameter.grad = draw(*shape, seed=step + 1)
            optimizer.step()
    moved = (theirs - draw(*shape)).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # theirs multiplies in BF16 on every processor


def test_singular_values_become_about_one_and_directions_stay() -> None:
    matrix = draw(3, 20, 48)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.mT @ orthogonal(matrix) @ v.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert s.max() > 3 * s.min()
    assert 0.65 < values.min() < values.max() < 1.25
    assert (found - torch.diag_embed(values)).abs().max() < 0.03
    assert torch.equal(orthogonal(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_each_matrix_of_a_stack_steps_as_it_would_alone() -> None:
    stack = nn.Parameter(draw(3, 2 * 8, 12))
    stack.grad = draw(3, 2 * 8, 12, seed=1)
    before = stack.detach().clone()
    Muon([{"params": [stack], PARTS: 2}], 0.1).step()
    for expert in range(3):
        for half in (slice(8), slice(8, 16)):
            alone = nn.Parameter(before[expert, half].clone())
            alone.grad = stack.grad[expert, half].clone()
            Muon([{"params": [alone], PARTS: 1}], 0.1).step()
            torch.testing.assert_close(stack[expert, half], alone, rtol=0, atol=1e-6)


def test_an_expert_without_a_token_only_decays() -> None:
    stack = nn.Parameter(draw(2, 8, 12))
    before = stack.detach().clone()
    stack.grad = torch.stack([draw(8, 12, seed=1), torch.zeros(8, 12)])
    Muon([{"params": [stack], PARTS: 1}], 0.1, weight_decay=0.5).step()
    assert torch.equal(stack[1], before[1] * 0.95)
    assert not torch.allclose(stack[0], before[0], atol=0.01)


def test_groups_of_a_v3_model() -> None:
    model = v3()
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        (group[PARTS], group["weight_decay"]): {names[parameter] for parameter in group["params"]}
        for group in matrix_groups(model)
    }
    assert set(found) == {(0, 0.1), (1, 0.1), (2, 0.1), (0, 0.0)}
    assert {name.rpartition("head.")[2] for name in found[0, 0.1]} == {"model.embed_tokens.weight", "weight"}
    assert all(name.endswith("experts.gate_up_proj") for name in found[2, 0.1])
    assert all(name.endswith(("norm.weight", "layernorm.weight")) for name in found[0, 0.0])
    assert sum(map(len, found.values())) == len(names)
    ends = {name.split(".", 3)[-1] for name in found[1, 0.1]}
    assert {"self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.gate.weight", "eh_proj.weight"} <= ends


def test_what_is_no_matrix_of_a_layer_steps_by_adamw() -> None:
    model = v3()
    other = copy.deepcopy(model)
    for net, optimizer in ((model, Muon(matrix_groups(model), 1e-2)), (other, AdamW(parameter_groups(other), 1e-2))):
        for number, parameter in enumerate(net.parameters()):
            parameter.grad = draw(*parameter.shape, seed=number)
        optimizer.step()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        is_adamws = one.dim() < 2 or name.endswith(("tokens.weight", "head.weight"))
        assert torch.equal(one, two) == is_adamws, name


def test_state_has_one_moment_of_a_matrix_and_a_resumed_run_is_bitwise_the_same() -> None:
    first = v3()
    second = copy.deepcopy(first)
    optimizer = Muon(matrix_groups(first), 1e-2)
    state = training_state(first, optimizer)
    assert "optimizer.exp_avg_sq.model.embed_tokens.weight" in state
    assert "optimizer.exp_avg.model.layers.0.self_attn.o_proj.weight" in state
    assert "optimizer.exp_avg_sq.model.layers.0.self_attn.o_proj.weight" not in state

    def descend(net: nn.Module, by: Muon, seed: int) -> None:
        for number, parameter in enumerate(net.parameters()):
            parameter.grad = draw(*parameter.shape, seed=seed + number)
        by.step()

    descend(first, optimizer, 100)
    second.load_state_dict(first.state_dict())
    resumed = Muon(matrix_groups(second), 1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    descend(first, optimizer, 200)
    descend(second, resumed, 200)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_impossible_momentum_is_refused(momentum: float) -> None:
    with pytest.raises(ConfigError, match="impossible Muon"):
        Muon([{"params": [nn.Parameter(draw(2, 2))], PARTS: 1}], 1e-3, momentum=momentum)
