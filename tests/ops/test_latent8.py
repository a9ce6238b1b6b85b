"""Cache rows in 8 bits: what comes back, to the bit, from torch and from the kernels; attention over such rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.test_paged_attention import BF16_HALF_ULP, TOLERANCE, Paged, alone, batches, exact, has_kernels, make
from torch import Tensor

from kvern import ops
from kvern.errors import KvernError
from kvern.ops import library, native_attention, native_latent8, reference, reference_latent8
from kvern.plan.memory import latent8_bytes

FP8 = torch.float8_e4m3fn
SIZES = [(512, 64), (128, 128), (192, 192), (1, 0), (7, 3), (127, 1), (129, 2), (300, 66)]


def latents(count: int, dim: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator)
    return rows * torch.exp2(torch.randint(-30, 30, (count, 1), generator=generator))


def test_the_record_of_deepseek_v3_has_the_published_size() -> None:
    assert latent8_bytes(512, 64) == 656
    assert latent8_bytes(128, 128) == 388


@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_the_layout_written_out(rank: int, rope: int) -> None:
    latent = latents(5, rank + rope)
    for row, record in zip(latent, reference_latent8.encode_latents(latent, rank), strict=True):
        assert len(record) == latent8_bytes(rank, rope)
        assert record[len(record) - 2 * rope :].tolist() == row[rank:].bfloat16().view(torch.uint8).tolist()
        for block, first in enumerate(range(0, rank, 128)):
            numbers = row[first : min(first + 128, rank)]
            scale = record[rank + 4 * block : rank + 4 * block + 4].clone().view(torch.float32)[0]
            assert scale == numbers.abs().max() / 448
            assert torch.equal(record[first : first + len(numbers)].view(FP8), (numbers / scale).to(FP8))


@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_numbers_come_back_within_half_a_step(rank: int, rope: int) -> None:
    latent = latents(9, rank + rope)
    back = reference_latent8.decode_latents(reference_latent8.encode_latents(latent, rank), rank, rope)
    assert torch.equal(back[:, rank:], latent[:, rank:].bfloat16().float())
    amax = latent[:, :rank].abs().amax(1, keepdim=True)
    bound = torch.maximum(latent[:, :rank].abs() * 2.0**-4, amax / 448 * 2.0**-10)
    assert ((back - latent)[:, :rank].abs() <= bound * (1 + 1e-5)).all()


def test_every_code_comes_back_as_itself() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F].view(FP8).float()
    for count in (127, 128, 254):  # 448 is in each block, so that its scale is 1
        rows = torch.cat([numbers[:count], numbers[-1:]])[None]
        rows[:, 0], rows[:, -1] = 448.0, -448.0
        for encode, decode in both():
            assert torch.equal(decode(encode(rows, count + 1), count + 1, 0), rows)
    for decode in [decode for _, decode in both()]:
        record = torch.cat([codes, torch.tensor([0.5, 4.0]).view(torch.uint8)])[None]
        expected = codes.view(FP8).float() * torch.tensor([0.5, 4.0]).repeat_interleave(128)
        torch.testing.assert_close(decode(record, 256, 0)[0], expected, rtol=0, atol=0, equal_nan=True)


def both() -> list[tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    """(encode, decode) of torch, and of the kernels where there are any."""
    forms: list[tuple[Callable[..., Tensor], Callable[..., Tensor]]] = [
        (reference_latent8.encode_latents, reference_latent8.decode_latents)
    ]
    if library.library() is not None:
        forms.append((native_latent8.encode_latents, native_latent8.decode_latents))
    return forms


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(broken: float) -> None:
    latent = latents(3, 300)
    latent[1, 130] = broken
    latent[2, 299] = broken
    for encode, decode in both():
        back = decode(encode(latent, 280), 280, 20)
        assert back[1, 128:256].isnan().all()
        assert back.isnan().sum() == 128 + int(broken != broken)
        torch.testing.assert_close(back[2, 299], torch.tensor(broken), equal_nan=True)


def test_zeros_and_the_smallest_numbers() -> None:
    rows = torch.zeros(4, 130)
    rows[1:, 3] = torch.tensor([1e-45, 2.0**-126, -3e-37])
    for encode, decode in both():
        records = encode(rows, 128)
        assert records[0, 128:132].clone().view(torch.float32).item() == 2.0**-126
        back = decode(records, 128, 2)
        assert (back[0] == 0).all()
        assert ((back - rows).abs() <= torch.maximum(rows.abs() * 2.0**-4, torch.tensor(2.0**-136))).all()


@has_kernels
@given(
    numbers=st.lists(st.floats(width=32), min_size=1, max_size=300),
    rope=st.integers(0, 9),
    power=st.integers(-120, 100),
)
def test_kernels_and_torch_agree_to_the_bit(numbers: list[float], rope: int, power: int) -> None:
    latent = torch.tensor([numbers + [1.5] * rope, [2.0**power * (i % 97 - 48) for i in range(len(numbers) + rope)]])
    rank = len(numbers)
    records = reference_latent8.encode_latents(latent, rank)
    assert torch.equal(native_latent8.encode_latents(latent, rank), records)
    for dtype in (torch.float32, torch.bfloat16):
        found, expected = (
            form.decode_latents(records, rank, rope, dtype) for form in (native_latent8, reference_latent8)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@has_kernels
def test_records_may_lie_apart_and_too_short_ones_are_refused() -> None:
    latent = latents(40, 150)
    wide = torch.full((40, 200), 0x7F, dtype=torch.uint8)
    wide[:, : latent8_bytes(140, 10)] = ops.encode_latents(latent, 140)
    expected = reference_latent8.decode_latents(wide, 140, 10)
    assert torch.equal(native_latent8.decode_latents(wide, 140, 10), expected)
    assert torch.equal(native_latent8.decode_latents(wide[::2], 140, 10), expected[::2])
    with pytest.raises(KvernError, match="do not hold latents"):
        native_latent8.decode_latents(wide[:, :100], 140, 10)
    with pytest.raises(KvernError, match="rotated"):
        native_latent8.encode_latents(latent, 151)


def in_records(case: Paged) -> tuple[Paged, Paged]:
    """The case over records, and over the numbers that these hold, as its dtype sees them."""
    rope = case.q.shape[2] - case.rank
    records = reference_latent8.encode_latents(case.rows.float(), case.rank)
    numbers = reference_latent8.decode_latents(records, case.rank, rope)
    if library.isa() in (None, "amx", "avx512bf16"):
        numbers = numbers.to(case.q.dtype)
    return replace(case, rows=records), replace(case, rows=numbers)


def check(case: Paged) -> None:
    stored, seen = in_records(case)
    expected, bound = exact(seen)
    # weights may be BF16, and so may their sum; the reference's products and sums are BF16 as well
    weights = 2 * BF16_HALF_ULP if case.q.dtype is torch.bfloat16 else 0.0
    for form, more in ((native_attention, 1), (reference, 3)):
        if form is native_attention and library.library() is None:
            continue
        out = form.paged_latent_attention(*stored.arguments())
        assert out.dtype is case.q.dtype
        allowed = (more * TOLERANCE + more * weights) * bound + (weights > 0) * BF16_HALF_ULP * expected.abs()
        assert ((out.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_attention_over_records(rank: int, rope: int, dtype: torch.dtype) -> None:
    for heads in (1, 14, 70):
        check(make([33, 130, 2], [3, 1, 2], heads=heads, rank=rank, rope=rope, block_size=16, dtype=dtype))


@settings(max_examples=30, deadline=None)
@given(batches(150))
def test_any_batch_over_records(case: Paged) -> None:
    check(case)


@has_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    case, _ = in_records(make([772, 33], [9, 1], heads=14, rank=130, rope=8, block_size=16, dtype=dtype))
    together = native_attention.paged_latent_attention(*case.arguments())
    for query, (sequence, context) in enumerate([(0, context) for context in range(764, 773)] + [(1, 33)]):
        one = alone(case, query, sequence, context)
        assert torch.equal(native_attention.paged_latent_attention(*one.arguments())[0], together[query])


@has_kernels
@pytest.mark.parametrize("column", [0, 140])
def test_a_nan_spoils_those_who_see_it_and_nobody_else(column: int) -> None:
    case = make([40, 40], [4, 1], heads=14, rank=130, rope=20, dtype=torch.bfloat16)
    case.rows[reference.paged_rows(case.tables[0], 40, case.block_size)[38], column] = float("nan")
    is_nan = native_attention.paged_latent_attention(*in_records(case)[0].arguments()).isnan()
    assert not is_nan[:2].any()
    assert is_nan[2:4].all()
    assert not is_nan[4].any()


def test_the_kernels_are_registered() -> None:
    native = "reference_latent8" if library.library() is None else "native_latent8"
    assert {ops.encode_latents.backend("cpu"), ops.decode_latents.backend("cpu")} == {native}
