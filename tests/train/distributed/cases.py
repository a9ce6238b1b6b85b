"""What the processes of `test_parallelize` compute: the same steps sharded and whole, and how far they lie apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tests.tiny import tiny_config, tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kvern.errors import KvernError
from kvern.model import Transformer
from kvern.ops import Fp8Recipe
from kvern.train import muon
from kvern.train.balance import LoadBalancer, RoutingLog
from kvern.train.loss import LossOptions, training_loss
from kvern.train.mesh import DATA, EXPERT, Ranks
from kvern.train.model import make_trainable
from kvern.train.muon import Muon, matrix_groups, orthogonal
from kvern.train.optim import AdamW, clip_gradients, parameter_groups
from kvern.train.packed_rows import IGNORED, PackedRows
from kvern.train.parallelize import parallelize
from kvern.train.weights import initialise

EXPERTS = 8
STARVED = 3
"""An expert that no token chooses."""


@dataclass(frozen=True)
class Case:
    """One comparison. together: the whole model computes that many ranks' rows as one micro-batch."""

    name: str
    expert: int = 1
    recipe: Fp8Recipe | None = None
    dtype: torch.dtype = torch.float32
    mtp: int = 1
    lengths: tuple[int, ...] = (9, 5, 1, 12, 7, 3, 8, 10)
    together: int = 1
    muon: bool = False


@dataclass(frozen=True)
class Outcome:
    """Of some steps: losses, norms before clipping, loads by gate, gradients of the first step, weights at the end."""

    losses: list[float]
    norms: list[float]
    loads: list[dict[str, list[int]]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """Sharded from whole: relative to the whole one's largest number, for all parameters of a model together."""

    loss: float
    norm: float
    gradient: float
    weight: float
    loads_equal: bool
    idle: int
    sharded: bool


def build(case: Case) -> Transformer:
    """A model of three layers, two of them routed, and `case.mtp` MTP layers."""
    config = tiny_config(num_hidden_layers=3, n_routed_experts=EXPERTS, num_nextn_predict_layers=case.mtp)
    model = tiny_model(config)
    model.activation_dtype = case.dtype
    initialise(model, 1, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[STARVED] = -100.0
    make_trainable(model, case.recipe)
    return model


def row(index: int, length: int, marked: bool) -> PackedRows:
    """Row number `index`: two documents, or one; where `marked`, some rows teach half their tokens, and one none."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, 300, (length,), generator=generator).tolist()
    learned = None
    if marked and index % 3 == 1:
        learned = [index != 4 and place % 2 == 0 for place in range(length)]
    documents = [tokens[:3], tokens[3:]] if length > 4 else [tokens]
    return PackedRows.of(*documents, learned=learned)


def joined(rows: Sequence[PackedRows]) -> PackedRows:
    """Rows without marks as one micro-batch; a single row as it is."""
    if len(rows) == 1:
        return rows[0]
    batches = [one.batch for one in rows]
    documents = [b.tokens[b.span(i)].tolist() for b in batches for i in range(len(b.query_starts) - 1)]
    return replace(PackedRows.of(*documents), rows=(0, *accumulate(len(b.tokens) for b in batches)))


def steps(
    model: Transformer,
    micro_batches: Sequence[PackedRows],
    rows: int,
    targets: int,
    reduce: Callable[[Tensor], None] | None,
    muon: bool = False,
    count: int = 3,
) -> Outcome:
    """Train `count` steps on the same rows."""
    log, balancer = RoutingLog(model), LoadBalancer(model)
    optimizer = Muon(matrix_groups(model), lr=1e-3) if muon else AdamW(parameter_groups(model), lr=1e-3)
    outcome = Outcome([], [], [], {}, {})
    for step in range(count):
        loss = torch.zeros(2, dtype=torch.float64)
        for micro in micro_batches:
            options = LossOptions(balance=0.01 * (len(micro.rows) - 1) / rows)
            part = training_loss(model, micro, log, options=options, divide_by=targets)
            torch.autograd.backward(part.total)
            balancer.count(part.routings)
            loss += torch.stack([part.total.detach(), part.mtp]).double()
        if reduce:
            reduce(loss)
        if step == 0:
            outcome.gradients.update({name: whole(gradient(p)) for name, p in model.named_parameters()})
        outcome.losses.append(float(loss[0]))
        outcome.norms.append(clip_gradients(dict(model.named_parameters()), 1.0, reduce))
        optimizer.step()
        optimizer.zero_grad()
        loads = balancer.step(0.001, reduce)
        outcome.loads.append({name: load.counts_N.tolist() for name, load in loads.items()})
    outcome.weights.update({name: whole(tensor) for name, tensor in model.state_dict().items()})
    return outcome


def gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros where a parameter had no part in the loss."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def compare(ranks: Ranks, case: Case) -> Distance:
    """Train a model on all ranks and another one here alone, on the same rows."""
    lengths = case.lengths[: 2 * ranks.world]
    rows = [row(index, length, case.together == 1) for index, length in enumerate(lengths)]
    targets = sum(int((one.targets() != IGNORED).sum()) for one in rows)
    alone = [joined(rows[first : first + case.together]) for first in range(0, len(rows), case.together)]
    expected = steps(build(case), alone, len(rows), targets, None, case.muon)

    model = build(case)
    parallelize(model, regrid(ranks, case.expert))
    got = steps(model, rows[ranks.rank :: ranks.world], len(rows), targets, ranks.sum, case.muon)
    return Distance(
        apart(dict(enumerate(got.losses)), dict(enumerate(expected.losses))),
        apart(dict(enumerate(got.norms)), dict(enumerate(expected.norms))),
        apart(got.gradients, expected.gradients),
        apart(got.weights, expected.weights),
        got.loads == expected.loads,
        min(load[STARVED] for step in got.loads for load in step.values()),
        all(isinstance(parameter, DTensor) for parameter in model.parameters()),
    )


def apart(got: Mapping[Any, Any], expected: Mapping[Any, Any]) -> float:
    """The largest difference of a number over the largest number of its tensor, or of all tensors / 1000."""
    pairs = [(torch.as_tensor(got[key]), torch.as_tensor(expected[key])) for key in expected]
    largest = max(float(right.abs().max()) for _, right in pairs)
    return max(float((left - right).abs().max() / right.abs().max().clamp(min=largest / 1000)) for left, right in pairs)


def regrid(ranks: Ranks, expert: int) -> Ranks:
    """The same ranks in another grid."""
    shape = (ranks.world // expert, expert)
    return replace(ranks, mesh=init_device_mesh("cpu", shape, mesh_dim_names=(DATA, EXPERT)))


ALIGNED = (128,) * 8
"""Rows as long as FP8's tiles, so that joined rows are tiled as they are apart."""
SHORT = (2,) * 8
"""Rows so short that some ranks' experts see no token at all."""


def two(ranks: Ranks, folder: Path) -> dict[str, Distance]:
    """FSDP and expert parallel, and FP8."""
    return distances(
        ranks,
        Case("FSDP, FP8", recipe=Fp8Recipe()),
        Case("EP", expert=2),
        Case("FSDP, Muon", muon=True),
    )


def more_of_2(ranks: Ranks, folder: Path) -> dict[str, Distance]:
    """Other precisions."""
    return distances(
        ranks,
        Case("FSDP"),
        Case("FSDP, BF16", dtype=torch.bfloat16),
        Case("EP, BF16", expert=2, dtype=torch.bfloat16),
        Case("EP, FP8", expert=2, recipe=Fp8Recipe(), mtp=0, lengths=ALIGNED, together=2),
        Case("EP, Muon", expert=2, muon=True),
    )


def four(ranks: Ranks, folder: Path) -> dict[str, Distance]:
    """Both at once."""
    return distances(ranks, Case("FSDP x EP", expert=2))


def more_of_4(ranks: Ranks, folder: Path) -> dict[str, Distance]:
    """Each alone, hardly a token, and FP8."""
    return distances(
        ranks,
        Case("FSDP"),
        Case("EP", expert=4),
        Case("FSDP x EP, Muon", expert=2, muon=True),
        Case("EP, hardly a token", expert=4, lengths=SHORT, mtp=2),
        Case("FSDP x EP, FP8", expert=2, recipe=Fp8Recipe(), mtp=0, lengths=ALIGNED, together=2),
    )


def distances(ranks: Ranks, *cases: Case) -> dict[str, Distance]:
    """By the cases' names."""
    return {case.name: compare(ranks, case) for case in cases}


def dealt(ranks: Ranks, folder: Path) -> tuple[list[int], float]:
    """How many matrices this rank makes orthogonal a call, and how far the weights end from where one process's do."""
    counts: list[int] = []

    def counted(matrices: Tensor) -> Tensor:
        counts.append(len(matrices))
        return orthogonal(matrices)

    def stepped(model: nn.Module) -> dict[str, Tensor]:
        optimizer = Muon([{"params": list(model.parameters()), muon.PARTS: 1}], 0.1)
        torch.autograd.backward(model(torch.ones(2, 5)).square().sum())
        optimizer.step()
        return {name: whole(parameter) for name, parameter in model.named_parameters()}

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(5)), nn.Linear(5, 3, bias=False))
    expected = stepped(copy.deepcopy(model))
    fully_shard(model, mesh=ranks.everyone)
    with patch.object(muon, "orthogonal", counted):
        return counts, apart(stepped(model), expected)


def refusals(ranks: Ranks, folder: Path) -> list[tuple[type[KvernError], str]]:
    """What four ranks raise for experts that do not divide, for rows that do not, and for ranks that differ."""
    odd, wide, plain = tiny_config(n_routed_experts=5, n_group=1), tiny_config(hidden_size=33), tiny_config()
    errors = []
    for config, expert in ((odd, 2), (wide, 2), (plain, 1)):
        model = tiny_model(config)
        make_trainable(model)
        if config is plain:
            model.model.norm.weight.data += ranks.rank
        try:
            parallelize(model, regrid(ranks, expert))
        except KvernError as error:
            errors.append((type(error), error.message))
    return errors
