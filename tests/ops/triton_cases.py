"""The Triton kernels against the reference: cases that run on a card or, under Triton's interpreter, on the CPU.

`TRITON_INTERPRET=1 python -m tests.ops.triton_cases` runs all of them on CPU tensors and prints {case: error or null}.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from tests.ops.test_paged_attention import Paged, exact, make
from tests.ops.triton_training_cases import CASES as TRAINING_CASES
from torch import Tensor

from kvern.ops import reference, reference_experts, triton_attention, triton_experts, triton_linear

FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16)
STORED = (torch.float32, torch.bfloat16, FP8)
TOLERANCE = 2e-6
"""Of sum |x||w|, for a product accumulated in FP32."""

BF16_ULP = 2.0**-7
"""Of a number. Cards round to half of it; the interpreter cuts digits off."""

SHAPES = ((1, 1), (5, 300), (130, 250), (200, 128))
ROWS = (1, 3, 70)

CASES: dict[str, Callable[[str], None]] = dict(TRAINING_CASES)


def case(run: Callable[[str], None]) -> Callable[[str], None]:
    """Enter a function of the device into the table, under its name."""
    CASES[run.__name__] = run
    return run


def weights(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight or a stack of weights, stored in `dtype`, and its scales where it is E4M3."""
    dense = torch.randn(*shape)
    if dtype is not FP8:
        return dense.to(dtype), None
    stack = [reference.quantize_blocks(one) for one in dense.view(-1, *shape[-2:])]
    codes, scales = (torch.stack(parts) for parts in zip(*stack, strict=True))
    return codes.view(shape), scales.view(*shape[:-2], *scales.shape[-2:])


def widened(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The numbers of one weight, in double precision."""
    return (weight.float() if scale is None else reference.dequantize(weight, scale)).double()


def to(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def check_linear(device: str, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
    y = triton_linear.linear(*to(device, x, weight, scale, bias)).cpu()
    dense = widened(weight, scale)
    expected, bound = x.double() @ dense.T, x.double().abs() @ dense.T.abs()
    if bias is not None:
        expected, bound = expected + bias.double(), bound + bias.double().abs()
    assert y.dtype is x.dtype
    assert y.shape == expected.shape
    allowed = TOLERANCE * bound + (BF16_ULP * expected.abs() if x.dtype is torch.bfloat16 else 0)
    assert ((y.double() - expected).abs() <= allowed).all()


def linear(x_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    for n, k in SHAPES:
        weight, scale = weights(n, k, dtype=dtype)
        for rows in ROWS:
            check_linear(device, torch.randn(rows, k).to(x_dtype), weight, scale, None)
        check_linear(device, torch.randn(2, 3, k).to(x_dtype), weight, scale, torch.randn(n).to(x_dtype))


for _x in DTYPES:
    for _w in STORED:
        CASES[f"linear_{str(_x)[6:]}_times_{str(_w)[6:]}"] = partial(linear, _x, _w)


@case
def linear_decodes_every_code(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    weight, scale = codes.view(1, 256).view(FP8), torch.tensor([[0.37, 3e-5]])
    for dtype in DTYPES:
        y = triton_linear.linear(*to(device, torch.eye(256, dtype=dtype), weight, scale)).cpu()
        expected = reference.dequantize(weight, scale)[0]
        allowed = 0 if dtype is torch.float32 else BF16_ULP
        assert ((y[:, 0].float() - expected).abs() <= allowed * expected.abs()).all()


@case
def linear_keeps_nan_in_its_row(device: str) -> None:
    weight, scale = weights(40, 200, dtype=FP8)
    weight.view(torch.uint8)[7, 150], weight.view(torch.uint8)[9, 0] = 0x7F, 0xFF
    for dtype in DTYPES:
        y = triton_linear.linear(*to(device, torch.randn(3, 200, dtype=dtype), weight, scale)).cpu()
        rows = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([7, 9]), True)
        assert torch.equal(y.isnan(), rows.expand(3, -1))


@case
def linear_takes_slices_and_empty_tensors(device: str) -> None:
    weight, scale = weights(150, 300, dtype=FP8)
    assert scale is not None
    check_linear(device, torch.randn(3, 256), weight[:, :256], scale[:, :2], None)
    check_linear(device, torch.randn(3, 600)[:, ::2], weight, scale, None)
    check_linear(device, torch.randn(0, 300), weight, scale, None)


@case
def linear_leaves_the_rest_to_the_reference(device: str) -> None:
    x, weight = torch.randn(2, 8, device=device), torch.randn(4, 8, device=device, requires_grad=True)
    triton_linear.linear(x, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(4, -1))
    assert triton_linear.linear(x.double(), weight.detach().double()).dtype is torch.float64


def check_experts(
    device: str, x: Tensor, shares: Tensor, chosen: Tensor, width: int, count: int, dtype: torch.dtype
) -> None:
    size = x.shape[1]
    stacks, scales = zip(
        *(weights(*shape, dtype=dtype) for shape in ((count, width, size),) * 2 + ((count, size, width),)), strict=True
    )
    given = None if scales[0] is None else tuple(to(device, *scales))
    out = triton_experts.grouped_experts(*to(device, x, shares, chosen, *stacks), given).cpu()
    wide = [torch.stack([widened(one, None if scale is None else scale[e]) for e, one in enumerate(stack)])
            for stack, scale in zip(stacks, scales, strict=True)]  # fmt: skip
    expected = reference_experts.grouped_experts(x.double(), shares.double(), chosen, *wide)
    gate, up = (torch.einsum("td,eid->tei", x.double(), one) for one in wide[:2])
    bound = torch.einsum("tei,edi->ted", reference.swiglu(gate, up).abs(), wide[2].abs()).amax()
    assert out.dtype is x.dtype
    assert out.shape == x.shape
    allowed = (BF16_ULP if x.dtype is torch.bfloat16 else TOLERANCE) * bound
    assert ((out.double() - expected).abs() <= allowed).all()


def experts(x_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    for tokens, top_k, count, size, width in ((1, 2, 5, 40, 24), (9, 3, 6, 150, 130), (40, 1, 2, 20, 17)):
        chosen = torch.rand(tokens, count).topk(top_k).indices
        check_experts(
            device, torch.randn(tokens, size).to(x_dtype), torch.rand(tokens, top_k), chosen, width, count, dtype
        )


for _x in DTYPES:
    for _w in STORED:
        CASES[f"experts_{str(_x)[6:]}_times_{str(_w)[6:]}"] = partial(experts, _x, _w)


@case
def experts_all_tokens_to_one(device: str) -> None:
    chosen = torch.tensor([[4, 2]] * 35)
    check_experts(device, torch.randn(35, 33), torch.rand(35, 2), chosen, 16, 7, FP8)


@case
def experts_no_tokens(device: str) -> None:
    stacks = [torch.randn(3, 8, 8, device=device) for _ in range(3)]
    x, shares, chosen = to(device, torch.randn(0, 8), torch.rand(0, 2), torch.zeros(0, 2, dtype=torch.int64))
    assert triton_experts.grouped_experts(x, shares, chosen, *stacks).shape == (0, 8)


@case
def experts_same_bits_every_time(device: str) -> None:
    stacks = [torch.randn(4, 32, 32, device=device) for _ in range(3)]
    x, shares, chosen = to(device, torch.randn(20, 32), torch.rand(20, 2), torch.rand(20, 4).topk(2).indices)
    first, second = (triton_experts.grouped_experts(x, shares, chosen, *stacks) for _ in range(2))
    assert torch.equal(first, second)


def check_attention(device: str, case: Paged, parts: int | None = None) -> None:
    expected, bound = exact(case)
    tensors = to(device, *case.arguments()[:5])
    out = triton_attention.paged_latent_attention(*tensors, case.block_size, case.rank, case.scale, parts=parts).cpu()
    assert out.dtype is case.q.dtype
    assert out.shape == expected.shape
    allowed = 5e-6 * bound if out.dtype is torch.float32 else BF16_ULP * bound
    assert ((out.double() - expected).abs() <= allowed).all()


def attention(dtype: torch.dtype, device: str) -> None:
    for block_size in (1, 4, 16):
        for parts in (None, 1, 3):
            check_attention(device, make([1, 70, 16, 33], [1, 3, 16, 0], block_size=block_size, dtype=dtype), parts)
    check_attention(device, make([9, 1], [1, 1], heads=19, dtype=dtype, rows_dtype=torch.bfloat16))


for _x in DTYPES:
    CASES[f"attention_{str(_x)[6:]}"] = partial(attention, _x)


@case
def attention_sizes_of_models(device: str) -> None:
    for rank, rope in ((512, 64), (128, 128), (192, 192), (20, 6), (16, 0)):
        check_attention(device, make([1, 40], heads=2, rank=rank, rope=rope, block_size=16, dtype=torch.bfloat16), 2)


@case
def attention_more_parts_than_rows(device: str) -> None:
    check_attention(device, make([1, 2, 40]), 5)


@case
def attention_splits_long_contexts(device: str) -> None:
    check_attention(device, make([600, 3], heads=2, block_size=16))


@case
def attention_of_large_scores(device: str) -> None:
    case = make([50, 20])
    check_attention(device, replace(case, q=case.q * 0.0 + 100.0), 3)


@case
def attention_without_queries(device: str) -> None:
    check_attention(device, make([5], [0]))


def main() -> None:
    """Run every case under the interpreter; print the errors as one JSON object."""
    assert triton_linear.INTERPRETED, "set TRITON_INTERPRET=1"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    errors: dict[str, str | None] = {}
    for name, run in CASES.items():
        torch.manual_seed(0)
        try:
            run("cpu")
            errors[name] = None
        except Exception:
            errors[name] = traceback.format_exc()
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
