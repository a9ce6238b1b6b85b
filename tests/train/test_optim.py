"""AdamW against torch's, its moments in BF16, clipping; the schedules at the report's numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kvern.errors import ConfigError, TrainingError
from kvern.train.optim import AdamW, clip_gradients, parameter_groups
from kvern.train.schedule import BatchSize, LearningRate

T = 10**12


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.RMSNorm(20), nn.Linear(20, 3))


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.autograd.backward((net(x) - x[:, :3].sin()).square().mean())
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


def test_with_moments_in_float32_it_is_torchs() -> None:
    ours, theirs = model(), model()
    left = descend(ours, AdamW(parameter_groups(ours), 1e-2, moments=torch.float32), range(20))
    groups = parameter_groups(theirs)
    right = descend(theirs, torch.optim.AdamW(groups, 1e-2, betas=(0.9, 0.95), eps=1e-8), range(20))
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_moments_in_bf16_stay_near() -> None:
    exact, rounded = model(), model()
    descend(exact, AdamW(exact.parameters(), 1e-3, moments=torch.float32), range(50))
    optimizer = AdamW(rounded.parameters(), 1e-3)
    descend(rounded, optimizer, range(50))
    moved = sum((p - q).norm() for p, q in zip(exact.parameters(), model().parameters(), strict=True))
    apart = sum((p - q).norm() for p, q in zip(exact.parameters(), rounded.parameters(), strict=True))
    assert 0 < apart < 0.02 * moved
    assert {state[name].dtype for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")} == {
        torch.bfloat16
    }


def test_a_resumed_run_is_bitwise_the_same() -> None:
    whole = model()
    expected = descend(whole, AdamW(whole.parameters(), 1e-2), range(6))
    first = model()
    optimizer = AdamW(first.parameters(), 1e-2)
    descend(first, optimizer, range(3))
    second = model(1)
    second.load_state_dict(first.state_dict())
    resumed = AdamW(second.parameters(), 1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(descend(second, resumed, range(3, 6)), expected, strict=True):
        assert torch.equal(one, other)


def test_no_gradient_is_one_of_zeros_and_frozen_parameters_stay() -> None:
    nets = [model(), model()]
    optimizers = [AdamW(net.parameters(), 1e-2) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        descend(net, optimizer, range(2))
        next(net.parameters()).requires_grad_(False)
    frozen = next(nets[0].parameters()).clone()
    optimizers[0].zero_grad(set_to_none=True)
    optimizers[1].zero_grad(set_to_none=False)
    for optimizer in optimizers:
        optimizer.step()
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(next(nets[0].parameters()), frozen)


def test_norms_and_biases_do_not_decay() -> None:
    matrices, rest = parameter_groups(model())
    assert {tuple(parameter.shape) for parameter in matrices["params"]} == {(20, 12), (3, 20)}
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_clipping() -> None:
    net = model()
    named = dict(net.named_parameters())
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in named.values())
    assert clip_gradients(named) == pytest.approx(count**0.5)
    assert clip_gradients(named) == pytest.approx(1.0, rel=1e-4)
    before, bad = named["0.weight"].grad, named["2.bias"].grad
    assert before is not None
    assert bad is not None
    before = before.clone()
    bad[1] = float("nan")
    with pytest.raises(TrainingError, match=r"gradient of 2\.bias is not finite"):
        clip_gradients(named)
    assert named["0.weight"].grad is not None
    assert torch.equal(named["0.weight"].grad, before)


def test_rates_of_the_report() -> None:
    rate = LearningRate()
    assert rate.at(0, 0) == pytest.approx(2.2e-4 / 2000)
    assert rate.at(999, 10**9) == pytest.approx(1.1e-4)
    assert rate.at(10**6, 10 * T - 1) == 2.2e-4
    assert rate.at(10**6, 10 * T + 2_150_000_000_000) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert rate.at(10**6, 10 * T + 4_300_000_000_000) == 2.2e-5
    assert rate.at(10**6, 14_633_000_000_000 - 1) == 2.2e-5
    assert rate.at(10**6, 14_633_000_000_000) == 7.3e-6


def test_batches_of_the_report() -> None:
    batch = BatchSize(multiple=512)
    sizes = [batch.at(tokens) for tokens in range(0, 500 * 10**9, 10**9)]
    assert (sizes[0], batch.at(234_500_000_000), batch.at(469 * 10**9)) == (3072, 9216, 15360)
    assert sizes == sorted(sizes)
    assert not any(size % 512 for size in sizes)
    assert BatchSize(4, 4, 0).at(0) == 4


@pytest.mark.parametrize(
    "build",
    [
        lambda: LearningRate(peak=1e-5),
        lambda: LearningRate(warmup_steps=-1),
        lambda: BatchSize(0, 4),
        lambda: BatchSize(8, 4),
        lambda: BatchSize(6, 12, multiple=4),
        lambda: AdamW(model().parameters(), -1.0),
        lambda: AdamW(model().parameters(), float("nan")),
    ],
)
def test_impossible_settings_are_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(ConfigError):
        build()
