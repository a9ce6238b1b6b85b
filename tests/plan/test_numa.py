"""Nodes of made-up machines, and the memory policy as the kernel reports it for a real thread."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvern.plan import numa
from kvern.plan.numa import Node

FIRST, SECOND = Node(0, (0, 1, 4), True), Node(1, (2, 3), True)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sockets of four cores, of which this process may use six, and a node that has memory alone."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 8, 9, 10})
    for number, cores, kilobytes in ((0, "0-3", 1000), (1, "8-11", 1000), (10, "", 500), (2, "12", 0)):
        folder = tmp_path / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
        (folder / "meminfo").write_text(f"\nNode {number} MemTotal:  {kilobytes} kB\nNode {number} MemFree: 1 kB\n")
    return tmp_path


def test_nodes_in_order_with_the_cores_that_may_be_used(root: Path) -> None:
    assert numa.nodes(root) == (
        Node(0, (0, 1, 2), True),
        Node(1, (8, 9, 10), True),
        Node(2, (), False),
        Node(10, (), True),
    )


def test_a_machine_that_does_not_say(tmp_path: Path) -> None:
    assert numa.nodes(tmp_path) == ()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-2,5,7-8\n", (0, 1, 2, 5, 7, 8)), ("", ()), ("\n", ()), ("4", (4,)), ("x,1-,-2,3-a,6", (6,)), ("3-1", ())],
)
def test_kernel_lists(text: str, numbers: tuple[int, ...]) -> None:
    assert numa.parse_list(text) == numbers


@given(
    st.text(alphabet="0123456789-, \nx", max_size=12).filter(lambda text: not any(len(n) > 3 for n in text.split("-")))
)
def test_any_text_is_a_list_or_none(text: str) -> None:
    assert all(number >= 0 for number in numa.parse_list(text))


@pytest.mark.parametrize(
    ("count", "cores"), [(1, (0,)), (3, (0, 2, 1)), (5, (0, 2, 1, 3, 4)), (9, (0, 2, 1, 3, 4)), (0, ())]
)
def test_threads_take_the_nodes_in_turn(count: int, cores: tuple[int, ...]) -> None:
    assert numa.spread((FIRST, SECOND, Node(2, (), True)), count) == cores


def test_one_node_needs_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "_set_policy", lambda *_: pytest.fail("set a policy"))
    assert numa.interleave((FIRST, Node(1, (2,), False))) is None
    assert numa.interleave(()) is None


@pytest.mark.skipif(platform.system() != "Linux", reason="the call is Linux's")
def test_a_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "SET_MEMPOLICY", {platform.machine(): 100_000})
    assert numa.interleave((FIRST, SECOND)) == "the system refused: Function not implemented"
    monkeypatch.setattr(numa, "SET_MEMPOLICY", {})
    assert "no memory policies on Linux" in (numa.interleave((FIRST, SECOND)) or "")


SCRIPT = """
import pathlib, threading
from kvern.plan import numa
reason = numa._set_policy(numa.MPOL_INTERLEAVE, [0])
import mmap
memory = mmap.mmap(-1, 1 << 20)
def touch(): memory.write(b"x" * (1 << 20))
thread = threading.Thread(target=touch); thread.start(); thread.join()
print(reason); print(pathlib.Path("/proc/self/numa_maps").read_text())
"""


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="this kernel reports no policies")
def test_the_kernel_knows_the_policy() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    reason, _, maps = done.stdout.partition("\n")
    if reason != "None":
        pytest.skip(reason)
    assert "interleave:0" in maps
