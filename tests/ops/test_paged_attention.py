"""Attention over latents in blocks, against a loop written out in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvern import ops
from kvern.ops import library, native_attention, reference

BF16_HALF_ULP = 2.0**-8
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
"""Of queries and rows: BF16 over BF16 has kernels of its own on avx512bf16 and amx."""


@dataclass(frozen=True)
class Paged:
    """Arguments of `paged_latent_attention`."""

    q: Tensor
    rows: Tensor
    tables: Tensor
    contexts: Tensor
    starts: Tensor
    block_size: int
    rank: int
    scale: float

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float]:
        """In the order of the op."""
        return (
            self.q,
            self.rows,
            self.tables,
            self.contexts,
            self.starts,
            self.block_size,
            self.rank,
            self.scale,
        )


def make(
    contexts: Sequence[int],
    queries: Sequence[int] | None = None,
    *,
    heads: int = 3,
    rank: int = 8,
    rope: int = 4,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    rows_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Paged:
    """Random latents in shuffled blocks; unused blocks and unused table entries hold what must never be read."""
    generator = torch.Generator().manual_seed(seed)
    queries = queries or [1] * len(contexts)
    needed = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(needed) + 3, generator=generator).to(torch.int32)
    tables = torch.full((len(contexts), max(needed, default=0) + 2), -7, dtype=torch.int32)
    rows = torch.full((len(order) * block_size, rank + rope), float("nan"))
    first = 0
    for sequence, (count, context) in enumerate(zip(needed, contexts, strict=True)):
        tables[sequence, :count] = order[first : first + count]
        first += count
        at = reference.paged_rows(tables[sequence], context, block_size)
        rows[at] = torch.randn(context, rank + rope, generator=generator)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(queries), heads, rank + rope, generator=generator).to(dtype)
    return Paged(
        q,
        rows.to(rows_dtype or dtype),
        tables,
        torch.tensor(contexts, dtype=torch.int32),
        starts,
        block_size,
        rank,
        (rank + rope) ** -0.5,
    )


TILES = (64, 32)
"""A rank and a size of the rotated part that are whole tiles, for which AMX has kernels of its own."""


def alone(case: Paged, query: int, sequence: int, context: int) -> Paged:
    """One query of a sequence that sees `context` rows, as if there were no other."""
    return replace(
        case,
        q=case.q[query : query + 1],
        tables=case.tables[sequence : sequence + 1],
        contexts=torch.tensor([context], dtype=torch.int32),
        starts=torch.tensor([0, 1], dtype=torch.int32),
    )


def exact(case: Paged) -> tuple[Tensor, Tensor]:
    """(softmax(q k * scale) v, the same with |v|) row by row in double precision."""
    out = torch.zeros(*case.q.shape[:2], case.rank, dtype=torch.double)
    bound = torch.zeros_like(out)
    for sequence, context in enumerate(case.contexts.tolist()):
        first, last = case.starts[sequence : sequence + 2].tolist()
        for query in range(first, last):
            seen = context - (last - 1 - query)
            latent = case.rows[[_place(case, sequence, row) for row in range(seen)]].double()
            weights = (case.q[query].double() @ latent.T * case.scale).softmax(-1)
            out[query] = weights @ latent[:, : case.rank]
            bound[query] = weights @ latent[:, : case.rank].abs()
    return out, bound


def _place(case: Paged, sequence: int, row: int) -> int:
    return int(case.tables[sequence, row // case.block_size]) * case.block_size + row % case.block_size


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_reference_is_the_loop(block_size: int) -> None:
    case = make([1, 7, 33, 16], [1, 3, 1, 16], block_size=block_size)
    expected, _ = exact(case)
    torch.testing.assert_close(reference.paged_latent_attention(*case.arguments()), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_rows(dtype: torch.dtype) -> None:
    case = make([5, 40], dtype=dtype, rows_dtype=torch.bfloat16)
    expected, bound = exact(case)
    out = reference.paged_latent_attention(*case.arguments())
    assert out.dtype is dtype
    allowed = 1e-5 * bound if dtype is torch.float32 else 2 * BF16_HALF_ULP * bound
    assert ((out.double() - expected).abs() <= allowed).all()


def test_a_sequence_without_queries_and_an_empty_batch() -> None:
    case = make([5, 9, 3], [2, 0, 1])
    expected, _ = exact(case)
    torch.testing.assert_close(ops.paged_latent_attention(*case.arguments()), expected.float())
    empty = make([5], [0])
    assert ops.paged_latent_attention(*empty.arguments()).shape == (0, 3, 8)


def test_it_equals_latent_attention_over_the_gathered_rows() -> None:
    case = make([21], [4])
    latent = case.rows[reference.paged_rows(case.tables[0], 21, case.block_size)]
    expected = reference.latent_attention(case.q, latent, case.rank, case.scale)
    assert torch.equal(reference.paged_latent_attention(*case.arguments()), expected)


has_kernels = pytest.mark.skipif(library.library() is None, reason=str(library.why_absent()))

TOLERANCE = 3e-6
"""Of sum p|v|."""


def check(case: Paged) -> None:
    out = native_attention.paged_latent_attention(*case.arguments())
    expected, bound = exact(case)
    assert out.dtype is case.q.dtype
    if out.dtype is torch.float32:
        allowed = TOLERANCE * bound
    else:  # weights may be BF16 too, and so their sum
        weights = (
            2 * BF16_HALF_ULP if library.isa() in ("amx", "avx512bf16") and case.rows.dtype is torch.bfloat16 else 0.0
        )
        allowed = (TOLERANCE + weights) * bound + BF16_HALF_ULP * expected.abs()
    assert ((out.double() - expected).abs() <= allowed).all()


@has_kernels
@pytest.mark.parametrize(
    ("heads", "rank", "rope"), [(14, 128, 128), (128, 512, 64), (1, 1, 1), (17, 40, 6), (70, 65, 2)]
)
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
def test_kernel_shapes(heads: int, rank: int, rope: int, rows_dtype: torch.dtype) -> None:
    for contexts in ([1], [15, 16, 17], [300, 2]):
        check(make(contexts, heads=heads, rank=rank, rope=rope, block_size=16, rows_dtype=rows_dtype))


@has_kernels
@pytest.mark.parametrize(
    ("heads", "rank", "rope"), [(14, 128, 128), (12, 512, 64), (128, 64, 8), (1, 1, 1), (17, 40, 6), (70, 65, 2)]
)
def test_kernel_with_bfloat16_queries(heads: int, rank: int, rope: int) -> None:
    for contexts, queries in (([1], [1]), ([31, 32, 33], [1, 1, 1]), ([300, 20], [7, 2])):
        check(make(contexts, queries, heads=heads, rank=rank, rope=rope, block_size=16, dtype=torch.bfloat16))


@has_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_over_a_long_context(threads: int) -> None:
    before = library.threads()
    library.set_threads(threads)
    check(make([20_000], heads=3, rank=16, rope=4, block_size=16))
    library.set_threads(before)


@st.composite
def batches(draw: st.DrawFn, most_rank: int) -> Paged:
    """Sequences with some queries each, of any sizes: one time in three of such that make whole tiles."""
    heads = draw(st.integers(1, 40))
    odd = st.tuples(st.integers(1, most_rank), st.integers(0, 20))
    rank, rope = draw(st.one_of(odd, odd, st.sampled_from([(32, 0), (32, 32), (64, 32)])))
    contexts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    queries = [draw(st.integers(0, min(context, 9))) for context in contexts]
    block_size = draw(st.sampled_from([1, 3, 16]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return make(contexts, queries, heads=heads, rank=rank, rope=rope, block_size=block_size, dtype=dtype, seed=heads)


@has_kernels
@settings(max_examples=45, deadline=None)
@given(batches(80))
def test_any_batch(case: Paged) -> None:
    check(case)


@has_kernels
def test_large_scores_do_not_overflow_and_late_maxima_take_over() -> None:
    case = make([400], heads=14, rank=16, rope=8)
    ramp = torch.linspace(-60, 60, 400)[:, None]
    at = reference.paged_rows(case.tables[0], 400, case.block_size)
    case.rows[at] = case.rows[at] + ramp
    out = native_attention.paged_latent_attention(*case.arguments())
    expected, bound = exact(case)
    sizes = (case.q.double().abs() @ case.rows[at].double().abs().T * case.scale).amax()
    assert sizes > 100  # exp(100) is near the end of FP32, and each score is itself rounded to 2^-24 of that
    assert ((out.double() - expected).abs() <= (TOLERANCE + 2.0**-22 * sizes) * bound).all()


@has_kernels
@BOTH
@pytest.mark.parametrize(("rank", "rope"), [(24, 8), TILES])
def test_a_query_does_not_depend_on_its_batch_or_the_threads(rank: int, rope: int, dtype: torch.dtype) -> None:
    queries = [9, 1, 4]  # some share lanes; the part of the context ends at 768 and 8192
    case = make([772, 33, 8194], queries, heads=14, rank=rank, rope=rope, block_size=16, dtype=dtype)
    before = library.threads()
    results = []
    for threads in (1, 2):
        library.set_threads(threads)
        results.append(native_attention.paged_latent_attention(*case.arguments()))
    library.set_threads(before)
    assert torch.equal(*results)
    sees = [(0, context) for context in range(764, 773)] + [(1, 33)] + [(2, context) for context in range(8191, 8195)]
    for query, (sequence, context) in enumerate(sees):
        one = alone(case, query, sequence, context)
        assert torch.equal(native_attention.paged_latent_attention(*one.arguments())[0], results[0][query])


@has_kernels
@BOTH
@pytest.mark.parametrize("column", [0, -2])
@pytest.mark.parametrize("row", [37, 38, 39])
@pytest.mark.parametrize(("rank", "rope"), [(8, 4), TILES])
def test_a_nan_spoils_those_who_see_it_and_nobody_else(
    row: int, column: int, rank: int, rope: int, dtype: torch.dtype
) -> None:
    case = make([40, 40], [4, 1], heads=14, rank=rank, rope=rope, dtype=dtype)
    case.rows[reference.paged_rows(case.tables[0], 40, case.block_size)[row], column] = float("nan")
    is_nan = native_attention.paged_latent_attention(*case.arguments()).isnan()
    first = row - 36  # the query whose last row it is
    assert not is_nan[:first].any()
    assert is_nan[first:4].all()
    assert not is_nan[4].any()
    case.q[0, 5, 0] = float("nan")
    is_nan = native_attention.paged_latent_attention(*case.arguments()).isnan()
    assert is_nan[0, 5].all()
    assert is_nan[0].sum() == case.rank


@has_kernels
@BOTH
def test_infinite_scores_weigh_nothing_or_spoil_the_head(dtype: torch.dtype) -> None:
    case = make([600], heads=2, dtype=dtype)
    at = reference.paged_rows(case.tables[0], 600, case.block_size)
    case.q[:] = 1.0
    case.rows[at[:300], -1] = float("-inf")  # a whole part of the context, and more
    expected = reference.paged_latent_attention(*case.arguments())
    torch.testing.assert_close(native_attention.paged_latent_attention(*case.arguments()), expected)
    case.rows[at, -1] = float("-inf")
    assert native_attention.paged_latent_attention(*case.arguments()).isnan().all()


@has_kernels
def test_rows_may_be_a_slice_of_wider_rows() -> None:
    case = make([50, 20], heads=14, rank=32, rope=16)
    wide = torch.full((len(case.rows), 70), float("nan"))
    wide[:, :48] = case.rows
    check(replace(case, rows=wide[:, :48]))


@has_kernels
def test_kernel_without_queries() -> None:
    case = make([5, 9], [0, 0])
    assert native_attention.paged_latent_attention(*case.arguments()).shape == (0, 3, 8)
    nobody = replace(case, tables=case.tables[:0], contexts=case.contexts[:0], starts=torch.zeros(1, dtype=torch.int32))
    assert native_attention.paged_latent_attention(*nobody.arguments()).shape == (0, 3, 8)


@has_kernels
def test_books_that_do_not_add_up_are_refused() -> None:
    case = make([9, 5], [2, 1])
    negative, outside = case.tables.clone(), case.tables.clone()
    negative[0, 1] = -1
    outside[1, 0] = len(case.rows) // case.block_size
    wrong = [
        replace(case, tables=negative),
        replace(case, tables=outside),
        replace(case, tables=case.tables[:, :2]),
        replace(case, contexts=torch.tensor([9, 0], dtype=torch.int32)),
        replace(case, contexts=torch.tensor([1, 5], dtype=torch.int32)),
        replace(case, contexts=torch.tensor([-9, 5], dtype=torch.int32)),
        replace(case, starts=torch.tensor([0, 2, 4], dtype=torch.int32)),
        replace(case, starts=torch.tensor([1, 2, 3], dtype=torch.int32)),
        replace(case, starts=torch.tensor([0, 5, 3], dtype=torch.int32)),
    ]
    for one in wrong:
        with pytest.raises(IndexError, match="outside the cache"):
            native_attention.paged_latent_attention(*one.arguments())


@has_kernels
def test_gradients_and_other_dtypes_go_through_the_reference() -> None:
    case = make([9, 5])
    case.q.requires_grad_()
    out = native_attention.paged_latent_attention(*case.arguments())
    (gradient,) = torch.autograd.grad(out.sum(), case.q)
    assert gradient.isfinite().all()
    wide = replace(case, q=case.q.detach().double(), rows=case.rows.double(), tables=case.tables.long())
    assert torch.equal(
        native_attention.paged_latent_attention(*wide.arguments()), reference.paged_latent_attention(*wide.arguments())
    )


@has_kernels
def test_the_kernel_is_registered() -> None:
    assert ops.paged_latent_attention.backend("cpu") == "native_attention"
