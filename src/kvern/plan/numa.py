"""Which cores and how much memory belong together on a machine with several sockets, and the policy for new pages.

Linux gives a page of memory to the node of the thread that touches it first. Packed weights are read through the page
cache, so without a policy all of them may end beside one socket, and the threads of the other read through the link
between the two. `interleave` deals new pages out to all nodes in turn: every thread then reads a part from far, but all
memory channels work. It has no effect on pages that are in memory already: a packed file that another run left in the
page cache stays where it is.

What it gives up: the better placement, where each thread finds the rows that it multiplies on its own node (chunks are
claimed by whoever is free, so no row has a thread of its own), and systems other than Linux.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from pathlib import Path

MPOL_DEFAULT, MPOL_INTERLEAVE = 0, 3
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""Number of the system call, by processor; the C library has no function for it."""


@dataclass(frozen=True)
class Node:
    """A socket, or a part of one: its number and those of its cores that this process may use."""

    number: int
    cores: tuple[int, ...]
    has_memory: bool


def nodes(root: Path = Path("/")) -> tuple[Node, ...]:
    """The machine's nodes in order; empty where the kernel does not say. `root` as in `plan.hardware.machine`."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    found = []
    for folder in sorted(folders, key=lambda one: int(one.name.removeprefix("node"))):
        cores = tuple(core for core in parse_list(_text(folder / "cpulist")) if core in allowed)
        found.append(Node(int(folder.name.removeprefix("node")), cores, _has_memory(folder)))
    return tuple(found)


def parse_list(text: str) -> tuple[int, ...]:
    """The numbers of a kernel list such as "0-3,8,10-11"; what is no number or no range is left out."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if first.isdigit() and last.isdigit():
            numbers += range(int(first), int(last) + 1)
    return tuple(numbers)


def spread(of: tuple[Node, ...], count: int) -> tuple[int, ...]:
    """A core for each of `count` threads, the nodes in turn, so that few threads still reach every memory channel.

    Fewer than `count` where there are not so many cores.
    """
    columns = [node.cores for node in of if node.cores]
    longest = max((len(cores) for cores in columns), default=0)
    return tuple(cores[i] for i in range(longest) for cores in columns if i < len(cores))[:count]


def interleave(of: tuple[Node, ...]) -> str | None:
    """Deal the pages that this thread, and threads it starts from now on, touch first out to all nodes in turn.

    Returns None when that was set, or there is one node only; else why it could not be (containers often forbid it).
    """
    numbers = [node.number for node in of if node.has_memory]
    return None if len(numbers) < 2 else _set_policy(MPOL_INTERLEAVE, numbers)


def _set_policy(policy: int, numbers: list[int]) -> str | None:
    call = SET_MEMPOLICY.get(platform.machine())
    if platform.system() != "Linux" or call is None:
        return f"no memory policies on {platform.system()} {platform.machine()}"
    words = max(numbers, default=0) // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    for number in numbers:
        mask[number // 64] |= 1 << number % 64
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_long(call), ctypes.c_int(policy), mask if numbers else None)
    if libc.syscall(*arguments, ctypes.c_ulong(words * 64 + 1 if numbers else 0)) == 0:
        return None
    return f"the system refused: {os.strerror(ctypes.get_errno())}"


def _has_memory(folder: Path) -> bool:
    fields = (line.split() for line in _text(folder / "meminfo").splitlines())
    return any(len(words) > 3 and words[2] == "MemTotal:" and words[3] != "0" for words in fields)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
