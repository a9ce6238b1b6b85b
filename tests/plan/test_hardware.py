"""`plan.hardware` on made-up machines: containers with limits, other processors, missing files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvern.plan import hardware

CPUINFO = """\
processor : 0
model name : Fast CPU 9000
physical id : 0
core id : 0
flags : fpu sse2 avx2 fma f16c avx512f

processor : 1
model name : Fast CPU 9000
physical id : 0
core id : 0
flags : fpu sse2 avx2 fma f16c avx512f
"""
MEMINFO = "MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    600 kB\n"
KB = 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/cpuinfo", CPUINFO)
    write(tmp_path, "proc/meminfo", MEMINFO)
    write(tmp_path, "proc/self/cgroup", "0::/team/job\n")
    for node in (0, 1):
        (tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    return tmp_path


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_processor_cores_and_nodes(root: Path) -> None:
    machine = hardware.machine(root)
    assert machine.cpu == "Fast CPU 9000"
    assert (machine.logical_cores, machine.physical_cores, machine.usable_cores, machine.numa_nodes) == (2, 1, 4, 2)
    assert machine.isa == ("avx2", "fma", "f16c", "avx512f")
    assert (machine.memory_total, machine.memory_available) == (1000 * KB, 600 * KB)


def test_memory_limits_of_every_cgroup_above_count(root: Path) -> None:
    write(root, "sys/fs/cgroup/team/job/memory.max", "max\n")
    write(root, "sys/fs/cgroup/team/memory.max", f"{500 * KB}\n")
    write(root, "sys/fs/cgroup/team/memory.current", f"{200 * KB}\n")
    write(root, "sys/fs/cgroup/team/memory.stat", f"anon 5\ninactive_file {50 * KB}\n")
    machine = hardware.machine(root)
    assert machine.memory_total == 500 * KB
    assert machine.memory_available == (500 - 200 + 50) * KB  # page cache can be dropped


def test_version_one_cgroups(root: Path) -> None:
    write(root, "proc/self/cgroup", "3:cpu,cpuacct:/job\n2:memory:/job\n")
    write(root, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", f"{300 * KB}\n")
    write(root, "sys/fs/cgroup/memory/job/memory.usage_in_bytes", f"{100 * KB}\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(root, "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", "150000\n")
    write(root, "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n")
    machine = hardware.machine(root)
    assert (machine.memory_total, machine.memory_available) == (300 * KB, 200 * KB)
    assert machine.usable_cores == 2  # one and a half cores of time keep two threads busy at most


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("800000 100000", 4)]
)
def test_cpu_quota(root: Path, quota: str, cores: int) -> None:
    write(root, "sys/fs/cgroup/team/cpu.max", quota + "\n")
    assert hardware.usable_cores(root) == cores


@pytest.mark.parametrize(("value", "threads"), [("2", 2), ("64", 4), ("3,1", 3), ("0", 4), ("many", 4), ("", 4)])
def test_omp_num_threads(root: Path, monkeypatch: pytest.MonkeyPatch, value: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert hardware.default_threads(root) == threads


@pytest.mark.parametrize(
    ("quota", "value", "threads"), [("150000 100000", "", 2), ("150000 100000", "64", 2), ("max 100000", "3", 3)]
)
def test_threads_under_a_quota(
    root: Path, monkeypatch: pytest.MonkeyPatch, quota: str, value: str, threads: int
) -> None:
    write(root, "sys/fs/cgroup/team/job/cpu.max", quota + "\n")
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert hardware.default_threads(root) == threads


def test_a_machine_without_proc(tmp_path: Path) -> None:
    machine = hardware.machine(tmp_path)
    assert machine.isa == ()
    assert machine.logical_cores >= 1
    assert machine.memory_total > 0


def test_arm_features(root: Path) -> None:
    write(root, "proc/cpuinfo", "processor : 0\nFeatures : fp asimd bf16\n")
    assert hardware.machine(root).isa == ("asimd", "bf16")


def test_this_machine() -> None:
    machine = hardware.machine()
    assert 0 < machine.memory_available <= machine.memory_total
    assert machine.usable_cores >= 1


def test_it_needs_no_torch() -> None:
    script = "import sys, kvern.plan.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
