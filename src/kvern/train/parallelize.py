"""A trainable model spread over ranks: FSDP2 for every parameter, expert parallel for the routed experts.

    embedding, head, norms between  [whole]  cut over all ranks; gathered once a forward pass, as the root
    each layer                      [whole]  cut over all ranks; gathered for the layer, forward and backward
    routed experts                  [N, ..]  experts over `expert` ranks, then their rows over the `data` ranks left

Masters, gradients and their sums over ranks are FP32. Layers are gathered in FP32, because FP8 codes are made from the
masters, and norms and gates compute in FP32; routed experts without FP8, 97 % of V3's weights, are gathered in the
activations' dtype, which is what they are multiplied in anyway. Gradients are added over ranks, never averaged: the
loss is already divided by the targets of the global batch. Gates' biases are buffers, whole and equal on all ranks.

Nothing here depends on what a rank's tokens are: every rank gathers and reduces in the same order, also with experts
that no token chose. What it gives up: tensor and pipeline parallelism, and gathering weights as FP8 codes. A layer's
low-precision copies of its weights wait for the backward pass whole, unless blocks are recomputed: do that for large
models.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from kvern.errors import ConfigError, TrainingError
from kvern.model import Transformer
from kvern.model.moe import MoE
from kvern.model.mtp import MTPLayer
from kvern.train.expert_parallel import ParallelExperts
from kvern.train.experts import GroupedExperts
from kvern.train.mesh import DATA, EXPERT, Ranks

WHOLE = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)


def parallelize(model: Transformer, ranks: Ranks) -> None:
    """Cut a model that `make_trainable` has prepared, and whose weights are equal on all ranks; alone, nothing happens.

    Afterwards parameters are DTensors of the same names and global shapes: make the optimizer now, not before. Raises
    ConfigError where the mesh does not divide the experts, TrainingError where ranks hold different weights.
    """
    if ranks.mesh is None:
        return
    _check_experts(model, ranks)
    _check_equal(model)
    for layer in model.model.layers:
        _shard_experts(layer.mlp, model.activation_dtype, ranks)
        # What an MTP layer has beside a decoder layer runs outside its forward(), so it belongs to the root.
        for unit in (layer.self_attn, layer.mlp) if isinstance(layer, MTPLayer) else (layer,):
            fully_shard(unit, mesh=ranks.everyone, mp_policy=WHOLE, reshard_after_forward=True)
    fully_shard(model, mesh=ranks.everyone, mp_policy=WHOLE)
    register_fsdp_forward_method(model, "within")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True, recurse=False)


def _shard_experts(mlp: nn.Module | Tensor, dtype: torch.dtype, ranks: Ranks) -> None:
    if not isinstance(mlp, MoE) or ranks.mesh is None:
        return
    assert isinstance(mlp.experts, GroupedExperts)
    lower = dtype if mlp.experts.recipe is None else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if ranks.mesh.size(1) == 1:
        fully_shard(mlp.experts, mesh=ranks.everyone, mp_policy=policy, reshard_after_forward=True)
        return
    experts = ParallelExperts(mlp.experts, ranks.mesh[EXPERT])
    mlp.add_module("experts", experts)
    fully_shard(
        experts,
        mesh=ranks.mesh[DATA],
        mp_policy=policy,
        reshard_after_forward=True,
        shard_placement_fn=lambda stack: Shard(1),
    )


def _check_experts(model: Transformer, ranks: Ranks) -> None:
    """Experts over the ranks that share them; a stack's rows (dimension 1) over the ranks left."""
    assert ranks.mesh is not None
    data, expert = ranks.mesh.shape
    for name, module in model.named_modules():
        if not isinstance(module, GroupedExperts) or expert == 1:
            continue
        experts, hidden, _ = module.down_proj.shape
        if experts % expert:
            raise ConfigError(
                f"{name} has {experts} experts, which {expert} ranks cannot share evenly",
                hint="mesh.expert must divide n_routed_experts",
                param="mesh.expert",
            )
        for rows in (hidden, module.gate_up_proj.shape[1]):
            if rows % data:
                raise ConfigError(
                    f"{name} has a stack of {rows} rows, which {data} ranks cannot share evenly",
                    hint=f"that are {ranks.world} ranks over mesh.expert = {expert}",
                    param="mesh.expert",
                )


@torch.no_grad()
def _check_equal(model: Transformer) -> None:
    """All ranks must begin with one model: compares a sum of each parameter and buffer."""
    whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: tensor for name, tensor in whole.items() if not tensor.is_meta}
    if not tensors:
        return
    sums = torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors.values()]).cpu()
    least, most = sums.clone(), sums.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for name, differs in zip(tensors, (least != most).tolist(), strict=True):
        if differs:
            raise TrainingError(
                f"the ranks begin with different values of {name}", hint="one seed, or one checkpoint, for all of them"
            )
