"""The native attention of a training step (csrc/train_attention.h) against the formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvern import ops
from kvern.errors import KvernError
from kvern.ops import library, native_training, reference

HAS_DOTS = native_training.kernels() is not None and library.isa() in ("avx512bf16", "amx")
needs_dots = pytest.mark.skipif(not HAS_DOTS, reason="no BF16 dot products on this CPU, or another set is forced")

SCALE, HEADS = 0.3, 3
SIZES = {"plain": (64, 32, 64), "v3": (128, 64, 128), "odd": (5, 2, 3), "no_rope": (33, 0, 40), "no_nope": (0, 16, 65)}
"""Nope, rope and value sizes of a head."""
STARTS = {
    "one_token": (0, 1),
    "a_tile": (0, 64),
    "around_a_tile": (0, 63, 128, 193),
    "ragged": (0, 50, 51, 70, 330),
    "an_empty_one": (0, 10, 10, 30),
}


def drawn(tokens: int, sizes: tuple[int, int, int], seed: int = 0) -> list[Tensor]:
    """q, kv, rope and the gradient of the result."""
    nope, shared, value = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, HEADS, nope + shared), (tokens, HEADS, nope + value), (tokens, shared), (tokens, HEADS, value)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def by_kernel(inputs: Sequence[Tensor], starts: Sequence[int], scale: float = SCALE) -> list[Tensor]:
    """The result, and the gradients of q, kv and rope."""
    q, kv, rope, dout = inputs
    out, lse = native_training.document_attention(q, kv, rope, starts, scale)
    return [out, *native_training.document_attention_backward(dout, out, lse, q, kv, rope, starts, scale)]


def by_formula(inputs: Sequence[Tensor], starts: Sequence[int], scale: float = SCALE) -> list[Tensor]:
    *leaves, dout = [one.double() for one in inputs]
    for one in leaves:
        one.requires_grad_()
    spans = [(a, b) for a, b in pairwise(starts) if b > a]
    q, kv, rope = leaves
    out = torch.cat([reference.expanded_attention(q[a:b], kv[a:b], rope[a:b], scale) for a, b in spans])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item() if exact.numel() else 0.0


@needs_dots
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_results_and_gradients_are_the_formulas(sizes: tuple[int, int, int], starts: tuple[int, ...]) -> None:
    inputs = drawn(starts[-1], sizes)
    got, exact = by_kernel(inputs, starts), by_formula(inputs, starts)
    for one, other, like in zip(got, exact, [inputs[3], *inputs[:3]], strict=True):
        assert one.shape == like.shape
        assert one.dtype is torch.bfloat16
        assert error(one, other) < 7e-3 or (other.abs().max() < 1e-12 and one.abs().max() < 1e-2)


@needs_dots
@pytest.mark.parametrize("scale", [1e-6, 30.0])
def test_flat_and_steep_softmax(scale: float) -> None:
    """All weights alike; one weight of 1 (scores of thousands, far beyond what e^x takes)."""
    inputs = drawn(200, SIZES["plain"])
    for one, other in zip(by_kernel(inputs, (0, 200), scale), by_formula(inputs, (0, 200), scale), strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).abs().max() < 2e-2 * max(1.0, other.abs().max().item())


@needs_dots
def test_the_largest_score_comes_last_or_first() -> None:
    """Sums of earlier tiles are brought to each new largest score."""
    q, kv, rope, dout = drawn(256, SIZES["plain"])
    size = torch.linspace(0.1, 4, 256)[:, None, None]
    for grows in (size, size.flip(0)):
        inputs = [q.abs(), (kv.abs() * grows).bfloat16(), rope, dout]
        for one, other in zip(by_kernel(inputs, (0, 256)), by_formula(inputs, (0, 256)), strict=True):
            assert error(one, other) < 2e-2


@needs_dots
def test_a_document_depends_on_itself_alone_and_not_on_threads() -> None:
    starts = (0, 70, 300, 301, 512)
    inputs = drawn(512, SIZES["plain"])
    together, before = by_kernel(inputs, starts), library.threads()
    try:
        for threads in (1, 3):
            library.set_threads(threads)
            assert all(map(torch.equal, by_kernel(inputs, starts), together))
    finally:
        library.set_threads(before)
    for first, last in pairwise(starts):
        alone = by_kernel([one[first:last].contiguous() for one in inputs], (0, last - first))
        assert all(torch.equal(one, all_of[first:last]) for one, all_of in zip(alone, together, strict=True))


@needs_dots
def test_a_later_token_changes_nothing_before_it() -> None:
    inputs = drawn(130, SIZES["plain"])
    before = by_kernel(inputs, (0, 130))[0]
    for one in inputs[:3]:
        one[100] = 7
    after = by_kernel(inputs, (0, 130))[0]
    assert torch.equal(after[:100], before[:100])
    assert not torch.equal(after[100:], before[100:])


@needs_dots
def test_nan_is_not_lost() -> None:
    """Where it lies and after; a tile is multiplied before it is masked, so from its start on."""
    for place in range(3):
        inputs = drawn(130, SIZES["plain"])
        inputs[place][70] = float("nan")
        out, dq, *_ = by_kernel(inputs, (0, 130))
        assert out[:64].isfinite().all()
        assert out[70].isnan().all()
        assert dq[70].isnan().all()


@needs_dots
def test_rows_of_rope_that_lie_apart() -> None:
    inputs = drawn(90, SIZES["plain"])
    wide = torch.randn(90, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    apart = [*inputs[:2], wide[:, 9:41], inputs[3]]
    dense = [*inputs[:2], wide[:, 9:41].contiguous(), inputs[3]]
    assert all(map(torch.equal, by_kernel(apart, (0, 90)), by_kernel(dense, (0, 90))))


@needs_dots
@pytest.mark.parametrize("starts", [(0, 5), (0, 11), (1, 10), (0, 7, 3, 10), (0, -1, 10)])
def test_documents_that_do_not_cover_the_tokens_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(KvernError, match="refused"):
        by_kernel(drawn(10, SIZES["odd"]), starts)


@needs_dots
def test_the_op_takes_it_where_it_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what torch's attention does, which computes otherwise, FP32 included."""
    *leaves, dout = drawn(200, SIZES["plain"])
    starts = (0, 90, 200)

    def gradients() -> list[Tensor]:
        q, kv, rope = (one.detach().clone().requires_grad_() for one in leaves)
        out = ops.document_attention(q, kv, rope, starts, SCALE)
        return [out.detach(), *torch.autograd.grad(out, (q, kv, rope), dout)]

    assert native_training.takes_documents(*leaves) == (library.isa() == "avx512bf16")
    assert not native_training.takes_documents(*(one.float() for one in leaves))
    monkeypatch.setattr(native_training, "takes_documents", lambda *_: True)
    ours = gradients()
    assert all(map(torch.equal, ours, by_kernel([*leaves, dout], starts)))
    monkeypatch.setattr(native_training, "takes_documents", lambda *_: False)
    for one, other in zip(ours, gradients(), strict=True):
        assert error(one, other.double()) < 1e-2
