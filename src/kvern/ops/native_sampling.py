"""`reference_sampling` by the kernels of csrc/sample.cpp: rows in parallel, no pass over the vocabulary in Python.

Weights and sums are FP64, or FP32 where their error cannot decide: the same token comes out as from the reference
unless u, top_p or min_p lie within 1e-12, relative, of where the outcome changes. A row's outcome depends on that row
alone.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvern.ops import reference_sampling
from kvern.ops.library import loaded
from kvern.ops.reference_sampling import Draw, Logprobs, Scored


class DrawRow(ctypes.Structure):
    """`kvern_draw`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "edited", "scores")),
        *((name, ctypes.c_int64) for name in ("size", "edits", "top_k")),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p", "uniform")),
    )


class ScoredRow(ctypes.Structure):
    """`kvern_scored`."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("size", "token", "best")),
        *((name, ctypes.c_void_p) for name in ("ids", "logprobs")),
    )


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """`reference_sampling.draw`."""
    if not _takes(logits):
        return reference_sampling.draw(logits, draws)
    assert len(logits) == len(draws), "one row of logits for each draw"
    first, stride = logits.data_ptr(), logits.stride(0) * 4
    rows = (DrawRow * len(draws))(*(_draw_row(first + i * stride, logits.shape[1], one) for i, one in enumerate(draws)))
    ids = (ctypes.c_int64 * len(draws))()
    code = loaded().kvern_sample(rows, len(draws), ids)
    assert code == 0, "kvern_sample refused its arguments"
    return ids[:]


def logprobs(logits: Tensor, wanted: Sequence[Scored]) -> list[Logprobs | None]:
    """`reference_sampling.logprobs`, to 1e-12."""
    if not _takes(logits):
        return reference_sampling.logprobs(logits, wanted)
    assert len(logits) == len(wanted), "one row of logits for each token"
    width = logits.shape[1]
    sizes = [min(one.limit, width) for one in wanted]
    bests = [min(one.best, size) for one, size in zip(wanted, sizes, strict=True)]
    ids = [(ctypes.c_int64 * best)() for best in bests]
    values = [(ctypes.c_double * (1 + best))() for best in bests]
    first, stride = logits.data_ptr(), logits.stride(0) * 4
    rows = (ScoredRow * len(wanted))(
        *(
            ScoredRow(
                first + i * stride, sizes[i], one.token, bests[i], ctypes.addressof(ids[i]), ctypes.addressof(values[i])
            )
            for i, one in enumerate(wanted)
        )
    )
    code = loaded().kvern_logprobs(rows, len(wanted))
    assert code == 0, "kvern_logprobs refused its arguments"
    return [_logprobs(*pair) for pair in zip(ids, values, strict=True)]


def _takes(logits: Tensor) -> bool:
    return logits.dtype is torch.float32 and (logits.shape[1] <= 1 or logits.stride(1) == 1)


def _draw_row(at: int, width: int, one: Draw) -> DrawRow:
    edited, scores, edits = None, None, 0
    if one.edited is not None and one.scores is not None:
        edited, scores, edits = one.edited.ctypes.data, one.scores.ctypes.data, len(one.edited)
    size = min(one.limit, width)
    return DrawRow(at, edited, scores, size, edits, one.top_k, one.temperature, one.top_p, one.min_p, one.uniform)


def _logprobs(ids: ctypes.Array[ctypes.c_int64], values: ctypes.Array[ctypes.c_double]) -> Logprobs | None:
    if math.isnan(values[0]):
        return None
    return values[0], list(zip(ids, values[1:], strict=True))
