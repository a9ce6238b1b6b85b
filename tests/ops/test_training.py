"""Ops with gradients of their own against torch's autograd over the references, in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvern import ops
from kvern.errors import KvernError
from kvern.ops import native_training, reference, reference_experts
from kvern.ops.grouped_linear import grouped_linear, whole_size
from kvern.ops.linear_cross_entropy import linear_cross_entropy
from kvern.train.optim import AdamW

ROTATION = torch.polar(torch.ones(70, 4), torch.randn(70, 4, generator=torch.Generator().manual_seed(9)))
ORDER = torch.randperm(70 * 3, generator=torch.Generator().manual_seed(8))
STARTS = (0, 14, 28, 42, 56, 70)
Compute = Callable[..., Tensor]

CASES: dict[str, tuple[Compute, Compute, list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(x, w, 1e-6), [(70, 37), (37,)]),
    "swiglu": (ops.swiglu, reference.swiglu, [(70, 45), (70, 45)]),
    "swiglu_halves": (ops.swiglu_halves, reference.swiglu_halves, [(70, 90)]),
    "rope": (
        lambda x: ops.apply_rope(x, ROTATION.to(x.device)),
        lambda x: reference.apply_rope(x, ROTATION),
        [(70, 3, 8)],
    ),
    "rope_key": (
        lambda x: ops.apply_rope(x, ROTATION.to(x.device)),
        lambda x: reference.apply_rope(x, ROTATION),
        [(70, 8)],
    ),
    "expert_rows": (
        lambda x: ops.expert_rows(x, ORDER.to(x.device), 3),
        lambda x: reference_experts.expert_rows(x, ORDER, 3),
        [(70, 300)],
    ),
    "combine_experts": (
        lambda rows, w: ops.combine_experts(rows, w, ORDER.to(w.device), [100, 0, 110]),
        lambda rows, w: reference_experts.combine_experts(rows, w, ORDER, [100, 0, 110]),
        [(210, 300), (70, 3)],
    ),
    "linear": (ops.linear, reference.linear, [(70, 24), (18, 24)]),
    "documents": (
        lambda q, kv, rope: ops.document_attention(q, kv, rope, STARTS, 0.3),
        lambda q, kv, rope: reference.document_attention(q, kv, rope, STARTS, 0.3),
        [(70, 2, 12), (70, 2, 16), (70, 4)],
    ),
    "ragged_documents": (
        lambda q, kv, rope: ops.document_attention(q, kv, rope, (0, 50, 51, 70), 0.3),
        lambda q, kv, rope: reference.document_attention(q, kv, rope, (0, 50, 51, 70), 0.3),
        [(70, 2, 12), (70, 2, 16), (70, 4)],
    ),
}
WEIGHTS = {"rms_norm": 1, "combine_experts": 1, "linear": 1}
"""Which input is in float32 whatever the activations are in."""


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype, exact: int | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [v if index == exact else v.to(dtype) for index, v in enumerate(values)]


def gradients(compute: Compute, inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradient of each input."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    out = compute(*leaves)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    torch.autograd.backward(out, dy)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


on_card = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", on_card])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_the_references(name: str, dtype: torch.dtype, device: str) -> None:
    ours, specified, shapes = CASES[name]
    inputs = drawn(shapes, dtype, WEIGHTS.get(name))
    exact = gradients(specified, [one.float() for one in inputs])
    got = [one.cpu() for one in gradients(ours, [one.to(device) for one in inputs])]
    assert len(got) == len(exact) == len(inputs) + 1
    assert got[0].dtype is dtype
    for one, other in zip(got, exact, strict=True):
        if dtype is torch.float32:
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
        else:
            assert (one.float() - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("name", ["rms_norm", "swiglu_halves", "rope"])
def test_without_a_gradient_the_reference_computes(name: str) -> None:
    ours, specified, shapes = CASES[name]
    inputs = drawn(shapes, torch.bfloat16, WEIGHTS.get(name))
    assert torch.equal(ours(*inputs), specified(*inputs))
    with torch.no_grad():
        assert torch.equal(ours(*(one.requires_grad_() for one in inputs)), specified(*inputs))


def test_rows_that_lie_apart() -> None:
    wide = torch.randn(20, 3, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for compute in (reference, ops):
        out = compute.rms_norm(wide[:, 0, :16], torch.ones(16), 1e-6).sum()
        out = out + compute.apply_rope(wide[:, :, 16:24], ROTATION[:20]).square().sum()
        out = out + compute.swiglu(wide[:, 1, 24:32], wide[:, 1, 32:]).sum()
        torch.autograd.backward(out)
        assert wide.grad is not None
        if compute is reference:
            expected, wide.grad = wide.grad, None
    torch.testing.assert_close(wide.grad, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(native_training, "kernels", lambda: None)
    hidden, weight = drawn([(23, 16), (50, 16)], dtype, 1)
    targets = torch.randint(0, 50, (23,), generator=torch.Generator().manual_seed(3))
    targets[[4, 22]] = -100

    def by_torch(h: Tensor, w: Tensor) -> Tensor:
        return 0.3 * F.cross_entropy(F.linear(h, w), targets, reduction="sum")

    exact = gradients(by_torch, [hidden.float(), weight])
    got = gradients(lambda h, w: 0.3 * linear_cross_entropy(h, w, targets, rows=10), [hidden, weight])
    near = 2e-5 if dtype is torch.float32 else 5e-2
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=near, atol=near)
    assert not got[1][[4, 22]].any()
    with torch.no_grad():
        assert float(0.3 * linear_cross_entropy(hidden, weight, targets)) == pytest.approx(float(got[0]), rel=1e-3)


def test_scores_far_apart_and_nan() -> None:
    hidden, targets = torch.tensor([[1e4], [-1e4], [float("nan")]]), torch.tensor([0, 0, 0])
    weight = torch.tensor([[1.0], [0.0]])
    losses = [float(linear_cross_entropy(hidden[i : i + 1], weight, targets[:1])) for i in range(3)]
    assert losses[:2] == [0.0, 1e4]
    assert losses[2] != losses[2]


def test_a_bad_target_is_refused() -> None:
    if native_training.kernels() is None:
        pytest.skip("no kernels")
    with pytest.raises(KvernError, match="refused"):
        linear_cross_entropy(torch.ones(1, 4), torch.ones(3, 4), torch.tensor([3]))


def test_rows_of_bf16_come_in_few_sizes() -> None:
    sizes = {whole_size(rows) for rows in range(1, 5000)}
    assert len(sizes) < 80
    assert all(rows <= whole_size(rows) < max(rows + 16, rows * 1.125 + 1) for rows in range(1, 5000))


def test_nothing_leaks_between_experts_whose_products_overlap() -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(90, 8, generator=generator).bfloat16(), torch.randn(5, 6, 8, generator=generator)
    counts = [1, 33, 0, 17, 39]
    x.requires_grad_(), weight.requires_grad_()
    y = grouped_linear(x, weight, counts)
    torch.autograd.backward(y, torch.ones_like(y))
    assert x.grad is not None
    assert weight.grad is not None
    first = 0
    for expert, count in enumerate(counts):
        rows = slice(first, first + count)
        torch.testing.assert_close(y[rows], x[rows] @ weight[expert].bfloat16().T)
        torch.testing.assert_close(x.grad[rows].float(), weight[expert].sum(0).expand(count, 8), rtol=2e-2, atol=3e-2)
        wanted = x[rows].float().sum(0).expand(6, 8)
        torch.testing.assert_close(weight.grad[expert], wanted, rtol=2e-2, atol=3e-2)
        first += count


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_adamw_is_the_same_with_and_without_kernels(moments: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(native_training, "kernels", lambda: None)
        generator = torch.Generator().manual_seed(5)
        parameter = torch.nn.Parameter(torch.randn(40, 17, generator=generator))
        optimizer = AdamW([parameter], 1e-2, moments=moments)
        for _ in range(5):
            parameter.grad = torch.randn(40, 17, generator=generator)
            optimizer.step()
        results.append(
            (parameter.detach(), *(optimizer.state[parameter][n].float() for n in ("exp_avg", "exp_avg_sq")))
        )
    near = 1e-6 if moments is torch.float32 else 1e-2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near / 10)
