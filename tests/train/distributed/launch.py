"""Runs a function of the tests in several processes over gloo: `launch(4, "tests.train.distributed.cases:f", folder)`.

Each process calls it with its Ranks and the folder, writes what it returns, and leaves by `os._exit`: torch's own exit
now and then aborts in a process that has talked over gloo, long after all was right.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kvern.train.mesh import MeshOptions, start

ROOT = Path(__file__).parents[3]


def environments(world: int) -> list[dict[str, str]]:
    """What torchrun would tell each process of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return [
        {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
        for rank in range(world)
    ]


def launch(world: int, function: str, folder: Path, expert: int = 1, seconds: float = 600.0) -> list[Any]:
    """What `function` ("module:name") returned in each rank; fails with a rank's output where one failed or hung."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.train.distributed.launch", function, str(folder), str(expert)]
    processes = [
        subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for environment in environments(world)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    failed = [(rank, output) for rank, output in enumerate(outputs) if processes[rank].returncode]
    assert not failed, "\n".join(f"rank {rank}:\n{output}" for rank, output in failed)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _child(function: str, folder: str, expert: str) -> None:
    torch.set_num_threads(1)
    ranks = start(MeshOptions(expert=int(expert), timeout_minutes=10.0))
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(ranks, Path(folder))
    torch.save(result, Path(folder) / f"{ranks.rank}.pt")
    ranks.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _child(*sys.argv[1:])
