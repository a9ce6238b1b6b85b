"""Attention over latents in blocks, against a loop written out in double precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvern import ops
from kvern.ops import reference

BF16_ULP = 2.0**-8


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


def exact(case: Paged) -> tuple[Tensor, Tensor]:
    """(softmax(q k * scale) v, the same with |v|) row by row in double precision."""
    out = torch.zeros(*case.q.shape[:2], case.rank, dtype=torch.double)
    bound = torch.zeros_like(out)
    for sequence, context in enumerate(case.contexts.tolist()):
        first, last = case.starts[sequence : sequence + 2].tolist()
        for query in range(first, last):
            seen = context - (last - 1 - query)
            latent = torch.stack([_row(case, sequence, row) for row in range(seen)]).double()
            weights = (case.q[query].double() @ latent.T * case.scale).softmax(-1)
            out[query] = weights @ latent[:, : case.rank]
            bound[query] = weights @ latent[:, : case.rank].abs()
    return out, bound


def _row(case: Paged, sequence: int, row: int) -> Tensor:
    block = int(case.tables[sequence, row // case.block_size])
    return case.rows[block * case.block_size + row % case.block_size]


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
    allowed = 1e-5 * bound if dtype is torch.float32 else 2 * BF16_ULP * bound
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
