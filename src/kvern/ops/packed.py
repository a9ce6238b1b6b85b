"""Weights packed into tiles, and decoder layers over them: the fast path of the CPU kernels (csrc/kvern_layer.h).

A panel holds 16 rows of W side by side, so no sum crosses lanes, and each weight is read once, as it is stored, from
one stream. All layers are one call on the step's buffers, no torch op inside. A row of the result depends on its own
token and context alone, bit for bit, whatever else is in the batch.

Activations stay FP32 between products; what enters a product is rounded to BF16, or, for FP32, split into the two BF16
numbers that hold 16 bits of its mantissa (on CPUs without BF16 dot products: not rounded at all). What this gives up:
autograd, devices other than the CPU, and a second copy of the weights on disk (see checkpoint.packed).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from kvern.errors import KvernError
from kvern.ops.library import CODES, library, loaded
from kvern.ops.reference import BLOCK

FP8 = torch.float8_e4m3fn
HAS_NAN = 3
LEAST_PAGES = 1 << 18
COUNTERS = ("project", "attend", "output", "route", "experts", "head", "weight_bytes", "cache_bytes")
"""What a step counts: nanoseconds of each stage; bytes of weights and of cache rows that had to be read."""


class Kind(IntEnum):
    """How a packed weight is stored; the first three are the codes of the dtypes."""

    F32 = 0
    BF16 = 1
    E4M3 = 2
    INT4 = 3
    INT4_TURNED = 4
    PICKS = 5


class Weight(ctypes.Structure):
    """`kvern_packed`."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("picks", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class Expert(ctypes.Structure):
    """`kvern_expert`."""

    _fields_ = (("gate", Weight), ("up", Weight), ("down", Weight))


class Layer(ctypes.Structure):
    """`kvern_layer`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "nope", "rope", "value", "rank", "q_rank")),
        *((name, ctypes.c_float) for name in ("norm_eps", "latent_eps", "softmax_scale")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "q_norm", "kv_norm", "post_norm")),
        *((name, Weight) for name in ("q_a", "kv_a")),
        *((name, ctypes.c_void_p) for name in ("q_a_bias", "kv_a_bias")),
        ("q_b", Weight),
        *((name, ctypes.POINTER(Weight)) for name in ("absorb", "keys", "values")),
        ("o_proj", Weight),
        ("o_bias", ctypes.c_void_p),
        ("experts", ctypes.POINTER(Expert)),
        *((name, ctypes.c_int64) for name in ("common", "routed", "top_k", "groups", "kept_groups", "normalise")),
        ("factor", ctypes.c_float),
        ("gate", Weight),
        ("gate_bias", ctypes.c_void_p),
    )


class Step(ctypes.Structure):
    """`kvern_step`."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "rotation", "slots", "tables", "contexts", "starts", "expanded")),
        *((name, ctypes.c_int64) for name in ("table_stride", "sequences", "block_size", "row_count", "row_stride")),
        *((name, ctypes.c_int32) for name in ("rows_dtype", "activations")),
        ("counters", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Packed:
    """A weight [n, k]: `tiles` and `scales` uint8, or `picks` int32 [n] and `factors` float32 [n]."""

    kind: Kind
    n: int
    k: int
    group: int = 0
    tiles: Tensor | None = None
    scales: Tensor | None = None
    picks: Tensor | None = None
    factors: Tensor | None = None

    def struct(self) -> Weight:
        """The C struct; the tensors must outlive it."""
        tensors = (self.tiles, self.scales, self.picks, self.factors)
        return Weight(*(address(one) for one in tensors), self.n, self.k, self.kind, self.group)

    @property
    def bytes(self) -> int:
        """Bytes that a product reads."""
        tensors = (self.tiles, self.scales, self.picks, self.factors)
        return sum(one.numel() * one.element_size() for one in tensors if one is not None)

    @property
    def is_whole(self) -> bool:
        """Whether the tensors have the bytes that kind, n, k and group ask for."""
        if self.kind is Kind.PICKS:
            return all(one is not None and len(one) == self.n for one in (self.picks, self.factors))
        sizes = _storage(self.kind, self.n, self.k, self.group)
        return sizes == tuple(0 if one is None else len(one) for one in (self.tiles, self.scales))


def available() -> bool:
    """Whether there are kernels for packed weights."""
    return library() is not None


def order() -> str:
    """The arrangement of tiles that the instruction set in use wants."""
    return str(loaded().kvern_packed_order().decode())


def pack(weight: Tensor, scale: Tensor | None = None, *, find_picks: bool = False) -> Packed:
    """Pack weight [N, K] (float32, bfloat16, or E4M3 with its block scales) in its own kind.

    E4M3 with a NaN becomes F32. `find_picks`: look whether each row has one number other than zero, at most, as the
    selection matrices of exact imports do.
    """
    if find_picks and is_selection(weight):
        return _picks(weight, scale)
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    packed, code = _pack(Kind(CODES[weight.dtype]), weight, scale)
    if code == HAS_NAN:
        packed, code = _pack(Kind.F32, weight, scale)
    if code:
        raise KvernError(f"weight {tuple(weight.shape)} of {weight.dtype} cannot be packed")
    return packed


def pack_int4(words: Tensor, scale: Tensor) -> Packed:
    """Pack 4-bit groups: words int32 [N, K/8] (value + 8, the first in the lowest bits), scale bfloat16 [N, groups]."""
    n, k = words.shape[0], words.shape[1] * 8
    group = k // scale.shape[1]
    packed, code = _pack(Kind.INT4, words.contiguous(), scale.contiguous(), k=k, group=group)
    if code:
        raise KvernError(f"4-bit weight {n} x {k} in groups of {group} cannot be packed")
    return packed


def pack_int4_turned(words: Tensor, scale: Tensor) -> Packed:
    """Pack the transpose of 4-bit groups, words int32 [K, N/8] and scale bfloat16 [K, groups], as a weight [N, K]."""
    k, n = words.shape[0], words.shape[1] * 8
    group = n // scale.shape[1]
    scales = scale.T.clone(memory_format=torch.contiguous_format)  # a single row has no stride to trust
    packed, code = _pack(Kind.INT4_TURNED, _transposed(words), scales, k=k, group=group)
    if code:
        raise KvernError(f"4-bit weight {n} x {k} in groups of {group} rows cannot be packed")
    return packed


def _transposed(words: Tensor) -> Tensor:
    """int32 words [K, N/8] of a matrix [K, N] to those of its transpose [N, ceil(K/8)], the last padded."""
    shifts = torch.arange(0, 32, 4)
    values = (words.unsqueeze(-1) >> shifts & 15).flatten(1).T
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 8)).reshape(len(values), -1, 8)
    return (padded << shifts).sum(-1).to(torch.int32, memory_format=torch.contiguous_format)


def multiply(x: Tensor, packed: Packed, bias: Tensor | None = None, activations: torch.dtype = torch.float32) -> Tensor:
    """x [M, K] float32 times a packed weight [N, K] transposed (+ bias [N] float32): [M, N] float32."""
    if x.shape[1] != packed.k:
        raise KvernError(f"x {tuple(x.shape)} cannot be multiplied with a packed weight of {packed.n} x {packed.k}")
    x = x.contiguous()
    out = torch.empty(len(x), packed.n)
    if not len(x):
        return out
    weight = packed.struct()
    code = loaded().kvern_multiply(
        ctypes.byref(weight), x.data_ptr(), len(x), CODES[activations], address(bias), out.data_ptr()
    )
    if code:
        raise KvernError("kvern_multiply refused its arguments")
    return out


def check_layer(layer: Layer) -> None:
    """Raise KvernError unless every size of the layer fits together."""
    if loaded().kvern_check_layer(ctypes.byref(layer)):
        raise KvernError("the shapes of a packed layer do not fit together")


def begin_step(
    step: Step, frequencies: Tensor, factor: float, table: Tensor | None = None, ids: Tensor | None = None
) -> None:
    """Fill the step's slots and rotations; its x as well, from a table [vocab_size, hidden] and ids [T] int64."""
    code = loaded().kvern_begin_step(
        ctypes.byref(step),
        frequencies.data_ptr(),
        2 * len(frequencies),
        factor,
        address(table),
        0 if table is None else CODES[table.dtype],
        *((0, 0) if table is None else table.shape),
        address(ids),
    )
    if code:
        raise IndexError("an id lies outside the vocabulary, a context is too short, or a block outside the cache")


def run_layers(layers: ctypes.Array[Layer], first: int, count: int, step: Step, rows: int, layer_bytes: int) -> None:
    """For `count` layers from `first` on: step.x += attention(norm(x)), then += feed_forward(norm(x)).

    The latents go to the layers' caches, of which the first lies at `rows`, the next `layer_bytes` further.
    """
    start = ctypes.addressof(layers) + first * ctypes.sizeof(Layer)
    if loaded().kvern_run_layers(start, count, ctypes.byref(step), rows, layer_bytes):
        raise IndexError("a context is too short, or a block or slot lies outside the cache")


def run_head(
    head: Weight | None, norm: Tensor, eps: float, step: Step, hidden: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """(normed states [L, hidden], logits [L, vocab_size] or [L, 0]) float32 of the step's tokens `rows` int64 [L]."""
    states = torch.empty(len(rows), hidden)
    logits = torch.empty(len(rows), int(head.n) if head else 0)
    if not len(rows):
        return states, logits
    weight = ctypes.byref(head) if head else None
    code = loaded().kvern_run_head(
        weight,
        norm.data_ptr(),
        eps,
        ctypes.byref(step),
        hidden,
        rows.data_ptr(),
        len(rows),
        states.data_ptr(),
        logits.data_ptr(),
    )
    if code:
        raise IndexError("a token whose logits are wanted is not in the step")
    return states, logits


def content_hash(data: Tensor) -> int:
    """64-bit hash of a dense tensor's bytes, for integrity, not against forgery."""
    return int(loaded().kvern_hash(data.data_ptr(), data.numel() * data.element_size()))


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's data begins; None of None."""
    return None if tensor is None else tensor.data_ptr()


def array(weights: Sequence[Packed]) -> ctypes.Array[Weight]:
    """The C array of some weights."""
    return (Weight * len(weights))(*(one.struct() for one in weights))


def _pack(kind: Kind, weight: Tensor, scale: Tensor | None, *, k: int = 0, group: int = 0) -> tuple[Packed, int]:
    n, k = weight.shape[0], k or weight.shape[1]
    tiles, scales = (_pages(size) for size in _storage(kind, n, k, group))
    dtype = kind if kind in (Kind.INT4, Kind.INT4_TURNED) else CODES[weight.dtype]
    stride = 0 if scale is None else scale.stride(0)
    code = loaded().kvern_pack(
        address(tiles),
        address(scales),
        kind,
        address(weight),
        dtype,
        weight.stride(0),
        address(scale),
        stride,
        group,
        n,
        k,
    )
    return Packed(kind, n, k, group, tiles, scales if len(scales) else None), code


def _storage(kind: Kind, n: int, k: int, group: int) -> tuple[int, int]:
    """Bytes of tiles and scales."""
    return int(loaded().kvern_packed_bytes(kind, n, k)), int(loaded().kvern_scale_bytes(kind, n, k, group))


def _pages(size: int) -> Tensor:
    """Bytes [size] uint8. Many come from the system and go back to it with the tensor.

    On the heap, weights that are packed and let go one after the other leave gaps that the next one does not fit into.
    """
    if size < LEAST_PAGES:
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def is_selection(weight: Tensor) -> bool:
    """Whether no row has more than one number other than zero."""
    return int(_used(weight).sum(1).max()) <= 1


def _picks(weight: Tensor, scale: Tensor | None) -> Packed:
    at = _used(weight).to(torch.uint8).argmax(1)
    rows = torch.arange(len(weight))
    factors = weight[rows, at].float()
    if scale is not None:
        factors = factors * scale[rows // BLOCK, at // BLOCK]
    return Packed(Kind.PICKS, weight.shape[0], weight.shape[1], picks=at.to(torch.int32), factors=factors)


def _used(weight: Tensor) -> Tensor:
    return (weight.view(torch.uint8) & 0x7F if weight.dtype == FP8 else weight) != 0
