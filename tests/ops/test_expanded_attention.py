"""Expanded causal attention against a formula in double precision; run on every instruction set by test_native."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvern import ops
from kvern.ops import library, native_attention, reference

BF16_HALF_ULP = 2.0**-8
TOLERANCE = 3e-6
"""Of sum p|v|."""

has_kernels = pytest.mark.skipif(library.library() is None, reason=str(library.why_absent()))


@dataclass(frozen=True)
class Expanded:
    """Arguments of `expanded_attention`."""

    q: Tensor
    kv: Tensor
    rope: Tensor
    scale: float

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """In the order of the op."""
        return self.q, self.kv, self.rope, self.scale


SIZES = [(16, 8, 24), (32, 32, 64)]
"""Of nope, rope and value; the second are whole tiles, for which AMX has kernels of its own."""


def make(
    tokens: int,
    context: int,
    heads: int = 2,
    *,
    nope: int = 16,
    rope: int = 8,
    value: int = 24,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Expanded:
    """Random queries, keys and values; `rope` is a slice of wider rows, as the model's is."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, nope + rope, generator=generator).to(dtype)
    kv = torch.randn(context, heads, nope + value, generator=generator).to(dtype)
    latent = torch.randn(context, 5 + rope, generator=generator).to(dtype)
    return Expanded(q, kv, latent[:, 5:], max(1, nope + rope) ** -0.5)


def exact(case: Expanded) -> tuple[Tensor, Tensor]:
    """(softmax(q k * scale) v, the same with |v|) in double precision."""
    (tokens, heads, size), context = case.q.shape, len(case.kv)
    nope = size - case.rope.shape[1]
    q, kv, rope = case.q.double(), case.kv.double(), case.rope.double()
    out = torch.zeros(tokens, heads, kv.shape[2] - nope, dtype=torch.double)
    bound = torch.zeros_like(out)
    for token in range(tokens):
        seen = context - tokens + token + 1
        for head in range(heads):
            keys = torch.cat([kv[:seen, head, :nope], rope[:seen]], dim=1)
            weights = (keys @ q[token, head] * case.scale).softmax(0)
            out[token, head] = weights @ kv[:seen, head, nope:]
            bound[token, head] = weights @ kv[:seen, head, nope:].abs()
    return out, bound


def check(case: Expanded) -> None:
    out = native_attention.expanded_attention(*case.arguments())
    expected, bound = exact(case)
    assert out.dtype is case.q.dtype
    assert out.shape == expected.shape
    if out.dtype is torch.float32:
        allowed = TOLERANCE * bound
    else:
        weights = 2 * BF16_HALF_ULP if library.isa() in ("amx", "avx512bf16") else 0.0
        allowed = (TOLERANCE + weights) * bound + BF16_HALF_ULP * expected.abs()
    assert ((out.double() - expected).abs() <= allowed).all()


def test_the_reference_is_the_formula() -> None:
    for tokens, context in ((1, 1), (7, 7), (3, 20)):
        case = make(tokens, context)
        torch.testing.assert_close(reference.expanded_attention(*case.arguments()), exact(case)[0].float())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = library.threads()
    library.set_threads(request.param)
    yield request.param
    library.set_threads(before)


@has_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("nope", "rope", "value"), [(128, 64, 128), (64, 32, 64), (65, 3, 71), (0, 7, 33), (5, 0, 1), (0, 0, 4), (1, 1, 1)]
)
def test_shapes(nope: int, rope: int, value: int, dtype: torch.dtype, threads: int) -> None:
    for tokens, context in ((1, 1), (33, 33), (5, 100), (66, 130)):
        check(make(tokens, context, nope=nope, rope=rope, value=value, dtype=dtype))


@has_kernels
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    context=st.integers(1, 90),
    heads=st.integers(1, 4),
    nope=st.integers(0, 70),
    rope=st.integers(0, 20),
    value=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    data: st.DataObject, context: int, heads: int, nope: int, rope: int, value: int, dtype: torch.dtype
) -> None:
    tokens = data.draw(st.integers(1, context))
    check(make(tokens, context, heads, nope=nope, rope=rope, value=value, dtype=dtype, seed=context))


@has_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("nope", "rope", "value"), SIZES)
def test_a_query_does_not_depend_on_the_others_or_the_threads(
    nope: int, rope: int, value: int, dtype: torch.dtype
) -> None:
    case = make(150, 333, 3, nope=nope, rope=rope, value=value, dtype=dtype)
    before = library.threads()
    results = []
    for threads in (1, 2):
        library.set_threads(threads)
        results.append(native_attention.expanded_attention(*case.arguments()))
    library.set_threads(before)
    assert torch.equal(*results)
    for query in (0, 1, 17, 63, 64, 100, 149):
        seen = 333 - 150 + query + 1
        alone = replace(case, q=case.q[query : query + 1], kv=case.kv[:seen], rope=case.rope[:seen])
        assert torch.equal(native_attention.expanded_attention(*alone.arguments())[0], results[0][query])


@has_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [30, 31])
@pytest.mark.parametrize(("nope", "rope", "value"), SIZES)
def test_a_bad_row_spoils_those_who_see_it_and_nobody_else(
    nope: int, rope: int, value: int, dtype: torch.dtype, bad: float, row: int
) -> None:
    case = make(40, 40, 2, nope=nope, rope=rope, value=value, dtype=dtype)
    case.kv[row, 1, nope + 3] = bad  # a value of head 1
    finite = native_attention.expanded_attention(*case.arguments()).isfinite()
    assert finite[:, 0].all()
    assert finite[:row, 1].all()
    assert not finite[row:, 1, 3].any()
    assert finite[row:, 1, :3].all()
    case.rope[row, 0] = float("nan")  # a key of every head
    is_nan = native_attention.expanded_attention(*case.arguments()).isnan()
    assert not is_nan[:row].any()
    assert is_nan[row:].all()


@has_kernels
def test_large_scores_do_not_overflow_and_hidden_rows_do_not_count() -> None:
    case = make(50, 50)
    case.rope[:] = case.rope + torch.linspace(-200, 200, 50)[:, None]
    out = native_attention.expanded_attention(*case.arguments())
    expected, bound = exact(case)
    assert ((out.double() - expected).abs() <= 1e-4 * bound).all()


@has_kernels
def test_views_empty_batches_gradients_and_other_dtypes() -> None:
    case = make(6, 9)
    check(replace(case, q=case.q.transpose(0, 1).contiguous().transpose(0, 1)))
    check(replace(case, rope=case.rope.T.contiguous().T))
    assert native_attention.expanded_attention(case.q[:0], case.kv, case.rope, 1.0).shape == (0, 2, 24)
    wide = Expanded(case.q.double(), case.kv.double(), case.rope.double(), case.scale)
    assert torch.equal(
        native_attention.expanded_attention(*wide.arguments()), reference.expanded_attention(*wide.arguments())
    )
    case.q.requires_grad_()
    (gradient,) = torch.autograd.grad(native_attention.expanded_attention(*case.arguments()).sum(), case.q)
    assert gradient.isfinite().all()


@has_kernels
def test_it_is_registered() -> None:
    assert ops.expanded_attention.backend("cpu") == "native_attention"
