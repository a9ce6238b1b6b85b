"""What this machine is: processor, instruction sets, the cores and the memory that this process may use.

Read from /proc and /sys; limits that a container sets (CPU affinity, cgroup quota, cgroup memory) count, because a
thread or a byte past them is slower than none. Elsewhere than on Linux the standard library's answers stand in and the
instruction sets are unknown. It gives up GPUs (the serving engine asks torch for those).
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KNOWN_ISA = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_bf16", "avx512_vnni",
             "amx_bf16", "amx_int8", "amx_tile", "asimd", "bf16", "i8mm", "sve")  # fmt: skip
"""Flags of /proc/cpuinfo that matter to matrix products; `Machine.isa` keeps this order."""


@dataclass(frozen=True)
class Machine:
    """Processor, cores and memory. Sizes are bytes; `usable_cores` is what threads should be counted by."""

    cpu: str
    logical_cores: int
    physical_cores: int
    usable_cores: int
    isa: tuple[str, ...]
    memory_total: int
    memory_available: int
    numa_nodes: int


def machine(root: Path = Path("/")) -> Machine:
    """Describe the machine; `root` holds the proc and sys trees (tests point it at a made-up machine)."""
    cpuinfo = _cpuinfo(root)
    logical = len(cpuinfo) or os.cpu_count() or 1
    total, available = _memory(root)
    return Machine(
        cpu=_cpu_name(cpuinfo),
        logical_cores=logical,
        physical_cores=_physical_cores(cpuinfo) or logical,
        usable_cores=usable_cores(root),
        isa=_isa(cpuinfo),
        memory_total=total,
        memory_available=available,
        numa_nodes=max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*")))),
    )


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: the affinity mask, cut by the cgroup's CPU quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, *(math.ceil(quota) for quota in _cpu_quotas(root)), cores))


def default_threads(root: Path = Path("/")) -> int:
    """Threads for kernels: OMP_NUM_THREADS where it is set and sane, never more than `usable_cores`."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    cores = usable_cores(root)
    return min(int(wanted), cores) if wanted.isdigit() and int(wanted) > 0 else cores


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """One dict a logical core."""
    cores = []
    for block in _text(root / "proc/cpuinfo").split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
        core = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in core:
            cores.append(core)
    return cores


def _cpu_name(cpuinfo: list[dict[str, str]]) -> str:
    return next((core["model name"] for core in cpuinfo if "model name" in core), platform.processor() or "unknown")


def _physical_cores(cpuinfo: list[dict[str, str]]) -> int:
    """0 where the kernel does not say."""
    return len({(core.get("physical id"), core["core id"]) for core in cpuinfo if "core id" in core})


def _isa(cpuinfo: list[dict[str, str]]) -> tuple[str, ...]:
    first = cpuinfo[0] if cpuinfo else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    return tuple(name for name in KNOWN_ISA if name in flags)


def _memory(root: Path) -> tuple[int, int]:
    """(total, available) bytes, both cut by the tightest cgroup limit above this process."""
    fields = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" not in fields:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit, used in _memory_limits(root):
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _memory_limits(root: Path) -> Iterable[tuple[int, int]]:
    """(limit, used) of each cgroup that has a limit; page cache that can be dropped does not count as used."""
    for folder in _cgroups(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _text(folder / limit_name).strip()
            if limit.isdigit() and int(limit) < 1 << 60:  # version 1 writes a huge number for "no limit"
                used = int(_text(folder / used_name).strip() or 0)
                stat = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
                cache = int(stat.get("inactive_file") or stat.get("total_inactive_file") or 0)
                yield int(limit), max(0, used - cache)


def _cpu_quotas(root: Path) -> Iterable[float]:
    """Cores' worth of time that each cgroup with a quota allows."""
    for folder in _cgroups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield int(quota) / int(period)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and of those above it, versions 2 and 1."""
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names == "":
            base = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        below = [part for part in path.split("/") if part and part != ".."]
        folders += [base.joinpath(*below[:depth]) for depth in range(len(below) + 1)]
    return folders


def _text(path: Path) -> str:
    """A pseudo file's text; empty where this kernel has no such file or hides it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
