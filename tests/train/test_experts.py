"""Grouped experts against the separate ones: results, gradients, names, first weights; FP8 with shared codes."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny import tiny_config, tiny_model
from torch import Tensor, nn

from kvern.config import ModelConfig
from kvern.model import Transformer
from kvern.model.linear import MLP
from kvern.model.moe import MoE, SeparateExperts
from kvern.ops import Fp8Recipe
from kvern.train.experts import GroupedExperts, checkpoint_state, group_experts, part, place, ungrouped
from kvern.train.model import Fp8Linear, make_trainable
from kvern.train.weights import initialise

COUNTS = [3, 0, 140, 1, 0]


def separate(hidden: int, intermediate: int) -> SeparateExperts:
    generator = torch.Generator().manual_seed(0)
    experts = SeparateExperts(MLP(hidden, intermediate, torch.float32, "cpu") for _ in COUNTS)
    for weight in experts.parameters():
        weight.data.normal_(0, 0.1, generator=generator)
    return experts.requires_grad_(True)


def gradients(experts: nn.Module, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(result, the gradient of its input); those of the weights are left in them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(COUNTS), hidden, generator=generator).to(dtype).requires_grad_()
    y = experts(x, COUNTS)
    y.backward(torch.randn(y.shape, generator=generator).to(dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def assert_same_gradients(grouped: GroupedExperts, experts: SeparateExperts, rtol: float, atol: float) -> None:
    ours: dict[str, Tensor] = {}
    for name, stack in grouped.named_parameters():
        assert stack.grad is not None
        ours |= ungrouped(f"a.experts.{name}", stack.grad)
    for name, weight in experts.named_parameters():
        wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(ours[f"a.experts.{name}"], wanted, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_those_of_separate_experts(dtype: torch.dtype) -> None:
    experts = separate(24, 20)
    grouped = GroupedExperts.of(experts).requires_grad_(True)
    near = 1e-5 if dtype is torch.float32 else 2e-2
    for one, other in zip(gradients(grouped, 24, dtype), gradients(experts, 24, dtype), strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near)
    assert_same_gradients(grouped, experts, near, near)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8_is_that_of_separate_experts_with_ragged_blocks(power_of_two: bool) -> None:
    """160 rows a projection: 1.25 blocks, whose borders must be those of gate and of up."""
    recipe, experts = Fp8Recipe(power_of_two=power_of_two), separate(136, 160)
    grouped = GroupedExperts.of(experts, recipe).requires_grad_(True)
    for mlp in experts:
        for name, linear in list(mlp.named_children()):
            setattr(mlp, name, Fp8Linear(linear, recipe))  # type: ignore[arg-type]
    for one, other in zip(gradients(grouped, 136), gradients(experts, 136), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert_same_gradients(grouped, experts, 1e-5, 1e-5)


def test_a_stack_that_needs_no_gradient_gets_none() -> None:
    grouped = GroupedExperts.of(separate(8, 4)).requires_grad_(True)
    grouped.down_proj.requires_grad_(False)
    gradients(grouped, 8)
    assert grouped.down_proj.grad is None
    assert grouped.gate_up_proj.grad is not None


def test_no_rows() -> None:
    for experts in (separate(8, 4), GroupedExperts.of(separate(8, 4))):
        assert experts(torch.zeros(0, 8), [0] * 5).shape == (0, 8)


def test_names_go_both_ways() -> None:
    model = tiny_model(tiny_config(num_nextn_predict_layers=1))
    before = copy.deepcopy(model.state_dict())
    group_experts(model)
    after = checkpoint_state(model)
    assert set(after) == set(before)
    stacks = model.state_dict()
    assert stacks["model.layers.2.mlp.experts.gate_up_proj"].shape == (4, 32, 32)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        where = place(name)
        assert (where is None) == (name in stacks)
        if where is not None:
            stack, expert, projection = where
            assert part(stacks[stack], expert, projection).data_ptr() == after[name].data_ptr()
    assert place("model.layers.1.mlp.shared_experts.up_proj.weight") is None


def test_names_of_a_rank_that_holds_the_later_experts() -> None:
    names = [name for name, _ in ungrouped("a.experts.down_proj", torch.zeros(2, 4, 3), first=6)]
    assert names == ["a.experts.6.down_proj.weight", "a.experts.7.down_proj.weight"]


def test_first_weights_are_the_same_grouped_or_not() -> None:
    def fresh(grouped: bool) -> dict[str, Tensor]:
        model = Transformer(tiny_config(num_nextn_predict_layers=1), device="cpu")
        if grouped:
            group_experts(model)
        initialise(model, 0)
        return checkpoint_state(model)

    separately, grouped = fresh(False), fresh(True)
    assert all(torch.equal(grouped[name], tensor) for name, tensor in separately.items())


def loop_over_experts(moe: MoE, x_TE: Tensor) -> Tensor:
    """Expert by expert, each adding its rows to the result."""
    weights_TK, experts_TK = moe.gate(x_TE)
    out_TE = torch.zeros_like(x_TE)
    assert isinstance(moe.experts, SeparateExperts)
    for index, expert in enumerate(moe.experts):
        tokens, ranks = (experts_TK == index).nonzero(as_tuple=True)
        scaled = weights_TK[tokens, ranks].to(x_TE.dtype)[:, None]
        if len(tokens):
            out_TE.index_add_(0, tokens, expert(x_TE[tokens]) * scaled)
    shared_TE: Tensor = moe.shared_experts(x_TE)
    return out_TE + shared_TE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_serving_computes_as_expert_after_expert_does(dtype: torch.dtype, tokens: int) -> None:
    config: ModelConfig = tiny_config(n_routed_experts=16, num_experts_per_tok=6, n_group=4, topk_group=3)
    model = tiny_model(config)
    moe = model.model.layers[1].mlp
    assert isinstance(moe, MoE)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    with torch.inference_mode():
        assert torch.equal(moe(x), loop_over_experts(moe, x))


def test_a_trained_model_has_stacks_with_gradients() -> None:
    model = tiny_model(tiny_config(num_nextn_predict_layers=1))
    make_trainable(model)
    stacks = [p for name, p in model.named_parameters() if "mlp.experts." in name]
    assert len(stacks) == 4
    assert all(stack.requires_grad and stack.dtype is torch.float32 for stack in stacks)
