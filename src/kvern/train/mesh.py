"""The processes that train together: who they are, how they add numbers up, and how they are arranged.

`torchrun` starts one process a card (or a few a CPU) and tells each its rank through the environment; without torchrun
there is one process, and everything here costs nothing. Ranks lie in a grid of two dimensions, the experts' inside:

    world 8, expert 4          expert 0  1  2  3
                       data 0        0   1  2  3      a row shares one set of routed experts (all-to-all),
                       data 1        4   5  6  7      a column holds the same experts (FSDP)

Every rank takes data of its own, so expert parallel costs no batch. CPUs talk over gloo, cards over NCCL, and there CPU
tensors still go over gloo. What it gives up: tensor parallelism, which V3's training had none of, and pipelines, whose
seam `docs/training-cluster.md` names. NCCL has not been run: only gloo is tested, and one card.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kvern.errors import ConfigError, TrainingError

DATA, EXPERT = "data", "expert"


@dataclass(frozen=True)
class MeshOptions:
    """How ranks are arranged.

    expert: ranks that share one set of routed experts; divides the ranks and the experts of a layer.
    timeout_minutes: how long a rank waits for the others before it gives up, and with it the run.
    """

    expert: int = 1
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        if self.expert < 1:
            raise ConfigError(f"{self.expert} ranks cannot share experts; 1 is the least", param="mesh.expert")
        if not 0 < self.timeout_minutes < float("inf"):
            raise ConfigError(f"nobody waits {self.timeout_minutes} minutes", param="mesh.timeout_minutes")


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them.

    mesh: [world / expert, expert]; everyone: [world]. Both are None where it is alone.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None
    everyone: DeviceMesh | None = None

    @property
    def data_rank(self) -> int:
        """Which share of a batch is this rank's."""
        return self.rank

    @property
    def data_size(self) -> int:
        """Into how many shares a batch is cut: all ranks take data."""
        return self.world

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Add `tensor` up over all ranks, in place; every rank gets the same bits. TrainingError without the others."""
        if self.world == 1:
            return
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise TrainingError(
                f"rank {self.rank} has lost the other ranks: {' '.join(str(error).split())[:300]}",
                hint="one of them failed or hangs: look for the first error of another rank",
            ) from error

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(torch.zeros(1))

    def close(self) -> None:
        """Leave. No rank is to be spoken to after that."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start(options: MeshOptions | None = None, environment: Mapping[str, str] = os.environ) -> Ranks:
    """Meet the other ranks that torchrun's environment names; a process without torchrun is alone.

    Raises ConfigError where the arrangement does not divide the ranks, TrainingError where they do not find each other.
    """
    options = options or MeshOptions()
    world = _number(environment, "WORLD_SIZE", 1)
    if world % options.expert:
        raise ConfigError(
            f"{world} ranks cannot be cut into sets of {options.expert} that share experts",
            hint="mesh.expert must divide torchrun's machines times --nproc-per-node",
            param="mesh.expert",
        )
    device = _device(_number(environment, "LOCAL_RANK", 0))
    if world == 1:
        return Ranks(0, 1, device)
    _meet(environment, device, timedelta(minutes=options.timeout_minutes))
    shape = (world // options.expert, options.expert)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=(DATA, EXPERT))
    everyone = init_device_mesh(device.type, (world,))
    return Ranks(dist.get_rank(), world, device, mesh, everyone)


def _meet(environment: Mapping[str, str], device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        raise TrainingError(
            f"the ranks do not find each other at {where}: {error}",
            hint="torchrun sets MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE; all machines must reach that port",
        ) from error


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    cards = torch.cuda.device_count()
    if local_rank >= cards:
        raise ConfigError(
            f"process {local_rank + 1} of this machine has no card: there are {cards}",
            hint=f"start torchrun with --nproc-per-node {cards}",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r} in the environment, and must be a number", param=name)
    return int(text)
