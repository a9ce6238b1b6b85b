"""The Triton kernels of a training step against the CPU's references, for `triton_cases`, which runs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvern.ops import reference, reference_experts, reference_fp8, triton_fp8, triton_training
from kvern.ops.fp8_linear import COLUMN_TILE, ROW_TILE, SMALLEST_AMAX, WEIGHT_BLOCK
from kvern.ops.training import _places
from kvern.train.optim import AdamW, step_numbers

Case = Callable[[str], None]
CASES: dict[str, Case] = {}
DTYPES = (torch.float32, torch.bfloat16)
BF16_ULP = 2.0**-7
"""Of a number. Cards round to half of it; the interpreter cuts digits off."""


def case(run: Case) -> Case:
    """Enter a function of the device into the table, under its name."""
    CASES[run.__name__] = run
    return run


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within rounding of FP32 sums and, for BF16, of the result."""
    assert got.dtype is dtype
    got = got.cpu().double()
    assert got.shape == expected.shape
    allowed = 1e-5 * expected.abs().max().clamp(min=0.1) + (BF16_ULP * expected.abs() if dtype is torch.bfloat16 else 0)
    assert ((got - expected).abs() <= allowed).all()


def gradients(compute: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """In double precision: the result and the gradients of all inputs."""
    exact = [one.double().requires_grad_() for one in inputs]
    y = compute(*exact)
    y.backward(dy.double())  # type: ignore[no-untyped-call]
    return y.detach(), [one.grad for one in exact if one.grad is not None]


@case
def training_rms_norm(device: str) -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for dtype in DTYPES:
        for rows, size in ((1, 1), (300, 37), (5, 576)):
            wide, weight = torch.randn(rows, size + 3).to(dtype), torch.randn(size)
            dy = torch.randn(rows, size).to(dtype)
            x = wide[:, :size]
            y, (dx, dw) = gradients(norm, [x, weight], dy)
            there = wide.to(device)[:, :size], weight.to(device)
            got, inverse = triton_training.rms_norm(*there, 1e-6)
            near(got, y, dtype)
            back = triton_training.rms_norm_backward(dy.to(device), *there, inverse)
            near(back[0], dx, dtype)
            near(back[1], dw, torch.float32)


@case
def training_swiglu(device: str) -> None:
    for dtype in DTYPES:
        for rows, size in ((1, 1), (7, 45), (3, 1100)):
            both, dy = torch.randn(rows, 2 * size).to(dtype), torch.randn(rows, size).to(dtype)
            y, (dboth,) = gradients(reference.swiglu_halves, [both], dy)
            gate, up = both.to(device).chunk(2, dim=-1)
            near(triton_training.swiglu(gate, up), y, dtype)
            out = torch.full((rows, 2 * size), float("nan"), dtype=dtype, device=device)
            triton_training.swiglu_backward(*out.chunk(2, dim=-1), dy.to(device), gate, up)
            near(out, dboth, dtype)


@case
def training_rotate(device: str) -> None:
    for dtype in DTYPES:
        for tokens, heads, size in ((1, 1, 2), (5, 3, 8), (4, 20, 64)):
            wide = torch.randn(tokens, heads, size + 6).to(dtype)
            rotation = torch.polar(torch.ones(tokens, size // 2), torch.randn(tokens, size // 2))
            x = wide[..., 6:]
            turned = torch.view_as_real(
                torch.view_as_complex(x.double().reshape(tokens, heads, -1, 2)) * rotation[:, None]
            )
            got = triton_training.rotate(wide.to(device)[..., 6:], rotation.to(device))
            near(got, turned.flatten(-2), dtype)
            back = triton_training.rotate(turned.flatten(-2).to(dtype).to(device), rotation.to(device), back=True)
            if dtype is torch.float32:
                near(back, x.double(), dtype)


@case
def training_combine(device: str) -> None:
    for dtype in DTYPES:
        for tokens, top_k, size in ((1, 1, 1), (70, 3, 300), (5, 8, 1100)):
            order = torch.randperm(tokens * top_k)
            rows, weights = torch.randn(tokens * top_k, size).to(dtype), torch.rand(tokens, top_k)
            dy, counts = torch.randn(tokens, size).to(dtype), [tokens * top_k]
            places = _places(order, top_k)

            def combined(rows: Tensor, weights: Tensor, places: Tensor = places) -> Tensor:
                return (rows[places] * weights[..., None]).sum(1)

            y, (drows, dweights) = gradients(combined, [rows, weights], dy)
            assert torch.allclose(reference_experts.combine_experts(rows.double(), weights.double(), order, counts), y)
            there = rows.to(device), weights.to(device), places.to(device)
            near(triton_training.combine(*there), y, dtype)
            back = triton_training.combine_backward(dy.to(device), *there)
            near(back[0], drows, dtype)
            near(back[1], dweights, torch.float32)
            near(triton_training.combine(there[0], None, there[2]), rows[places].double().sum(1), dtype)


@case
def training_cross_entropy(device: str) -> None:
    for dtype in DTYPES:
        for rows, size in ((1, 1), (6, 50), (3, 9000)):
            logits, targets = (5 * torch.randn(rows, size)).to(dtype), torch.randint(0, size, (rows,))
            targets[rows // 2] = -100
            losses, (slopes,) = gradients(
                lambda z, t=targets: F.cross_entropy(z, t, reduction="none"), [logits], torch.ones(rows)
            )
            there = logits.to(device)
            near(triton_training.cross_entropy(there, targets.to(device), False), losses, torch.float32)
            assert torch.equal(there.cpu(), logits)
            near(triton_training.cross_entropy(there, targets.to(device), True), losses, torch.float32)
            assert ((there.cpu().double() - slopes).abs() < (1e-5 if dtype is torch.float32 else 5e-3)).all()
    far = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [float("nan"), 0.0], [float("-inf"), 0.0]], device=device)
    found = triton_training.cross_entropy(far, torch.tensor([0, 0, 0, 1], device=device), True)
    assert found[:2].tolist() == [0.0, 1e4]
    assert found[2].isnan()
    assert found[3] == 0
    assert triton_training.cross_entropy(far[:1], torch.tensor([2], device=device), False).isnan().all()


@case
def training_adamw(device: str) -> None:
    for moments in DTYPES:
        parameter = torch.nn.Parameter(torch.randn(3000))
        optimizer = AdamW([parameter], 1e-2, moments=moments)
        there = parameter.detach().clone().to(device)
        mean, square = torch.zeros(2, 3000, dtype=moments, device=device)
        for step in range(1, 6):
            parameter.grad = torch.randn(3000)
            optimizer.step()
            numbers = step_numbers((0.9, 0.95), step, 1e-2, 0.1, 1e-8)
            triton_training.adamw(there, parameter.grad.to(device), mean, square, numbers)
        state = optimizer.state[parameter]
        for got, expected in ((there, parameter.detach()), (mean, state["exp_avg"]), (square, state["exp_avg_sq"])):
            tolerance = 1e-6 if moments is torch.float32 else 5e-2  # five times cut off
            assert ((got.cpu().float() - expected.float()).abs() <= tolerance * (expected.float().abs() + 0.1)).all()


def spread(rows: int, columns: int) -> Tensor:
    """Numbers of very different sizes, some zero."""
    size = torch.exp2(torch.randint(-40, 20, (rows, 1)).float())
    x = torch.randn(rows, columns) * size * torch.exp(3 * torch.randn(1, columns))
    return torch.where(torch.rand(rows, columns) < 0.1, 0.0, x)


def same_codes(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Bit for bit, but for the sign of NaN, and with zeros behind the last row."""
    codes, wanted = (one[0].cpu().contiguous().view(torch.uint8) for one in (got, expected))
    assert not (codes[len(wanted) :] & 0x7F).any() or expected[1].isnan().any()
    codes = codes[: len(wanted)]
    assert torch.equal(got[1].cpu().nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
    assert torch.equal(codes.where(codes & 0x7F != 0x7F, 0x7F), wanted.where(wanted & 0x7F != 0x7F, 0x7F))


@case
def fp8_codes_and_scales_are_the_references(device: str) -> None:
    for rows, columns in ((1, 1), (3, 300), (130, 250), (257, 129)):
        for dtype in DTYPES:
            x = spread(rows, columns + 1).to(dtype)[:, :columns]
            x[rows // 2, columns // 2] = float("nan") if rows > 200 else 0.0
            for tile in (ROW_TILE, COLUMN_TILE, WEIGHT_BLOCK):
                for power_of_two in (True, False):
                    got = triton_fp8.quantize_tiles(x.to(device), tile, power_of_two, SMALLEST_AMAX)
                    same_codes(got, reference.quantize_tiles(x, tile, power_of_two, SMALLEST_AMAX))


@case
def fp8_every_number_goes_to_the_nearest_code(device: str) -> None:
    """Every BF16 number up to 448 in size, and the middles between codes, with a scale of one."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat([numbers[numbers.abs() <= 448], (codes[1:] + codes[:-1]) / 2])
    x = F.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], dim=1)
    codes_there, scale = triton_fp8.quantize_tiles(x.to(device), ROW_TILE, False, SMALLEST_AMAX)
    assert (scale == 1).all()
    same_codes((codes_there, scale), (x.to(torch.float8_e4m3fn), torch.ones_like(scale).cpu()))


@case
def fp8_tiles_again(device: str) -> None:
    for rows, columns in ((1, 1), (130, 250), (300, 384)):
        for power_of_two in (True, False):
            pair = reference.quantize_tiles(spread(rows, columns), ROW_TILE, power_of_two, SMALLEST_AMAX)
            got = triton_fp8.retile(*(one.to(device) for one in pair), power_of_two, SMALLEST_AMAX)
            same_codes(got, reference_fp8.retile(*pair, power_of_two, SMALLEST_AMAX))


@case
def fp8_transposed(device: str) -> None:
    for rows, columns in ((1, 1), (130, 250)):
        codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
        got = triton_fp8.transposed(codes.to(device))
        assert got.is_contiguous()
        assert torch.equal(got.cpu().view(torch.uint8), codes.view(torch.uint8).T)
