"""How many threads compute, and where; torch's in steps that the kernels compute and in others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvern.engine import threads
from kvern.engine.threads import threads_for, use_threads
from kvern.errors import ConfigError
from kvern.ops import library, native


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "kernel_rows", "count"), [(1, 64, 1), (64, 64, 1), (65, 64, 2), (1, 0, 2)])
def test_torch_gets_one_thread_where_the_kernels_compute(rows: int, kernel_rows: int, count: int) -> None:
    with threads_for(rows, kernel_rows):
        assert torch.get_num_threads() == count
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="in the step"), threads_for(1, 64):
        raise ValueError("in the step")
    assert torch.get_num_threads() == 2


def test_a_number_counts_for_kernels_and_torch() -> None:
    before = library.threads()
    use_threads(3)
    assert torch.get_num_threads() == 3
    assert library.threads() in (3, 1)  # 1: no kernels here
    with ThreadPoolExecutor(1) as other:  # the engine's thread is not the one that loaded the model
        assert other.submit(torch.get_num_threads).result() == 3
    library.set_threads(before)


def test_without_a_number_torch_keeps_to_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "default_threads", lambda: 1)  # a cgroup's quota, of which torch knows nothing
    use_threads(None)
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(threads, "default_threads", lambda: 8)
    use_threads(None)
    assert torch.get_num_threads() == 1  # whoever asked for fewer keeps them


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_an_impossible_number(count: int) -> None:
    with pytest.raises(ConfigError, match="not possible"):
        use_threads(count)
    assert torch.get_num_threads() == 2


needs_kernels = pytest.mark.skipif(library.library() is None, reason="no native kernels")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = library.threads()
    library.set_threads(3)
    yield
    library.set_threads(before)


@needs_kernels
@pytest.mark.usefixtures("three_threads")
def test_the_pool_has_the_threads_that_were_asked_for() -> None:
    library.start_workers()
    assert sorted(number for _, number in threads._workers()) == [1, 2]
    library.set_threads(1)
    assert not list(threads._workers())


@needs_kernels
@pytest.mark.usefixtures("three_threads")
def test_each_worker_gets_a_core_and_the_caller_keeps_its_own() -> None:
    mine = os.sched_getaffinity(0)
    core = min(mine)
    assert threads.pin_workers((core, core, core)) == 2
    assert [os.sched_getaffinity(thread) for thread, _ in threads._workers()] == [{core}, {core}]
    assert os.sched_getaffinity(0) == mine
    library.read_bandwidth(torch.zeros(1 << 22, dtype=torch.uint8))  # they still work
    library.set_threads(2)
    assert threads.pin_workers((core,)) == 0  # more workers than cores: the rest stays free


@needs_kernels
@pytest.mark.usefixtures("three_threads")
def test_a_core_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="core 1023"):
        threads.pin_workers((0, 1023, 1023))


SCRIPT = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}) if sys.argv[1] == "affinity" else None
import torch
from kvern.engine.threads import use_threads
from kvern.ops import library
use_threads(None)
print(library.threads(), torch.get_num_threads())
"""


@pytest.mark.parametrize("how", ["affinity", "environment"])
def test_a_process_keeps_to_its_affinity_and_environment(how: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if how == "environment":
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "1"]


@needs_kernels
def test_one_thread_takes_the_time_of_one_core() -> None:
    """Kernels with one thread beside torch with one: no second thread works or spins."""
    before = library.threads()
    use_threads(1)
    weight, x = torch.randn(2048, 2048), torch.randn(4, 2048)
    started, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < 0.3:
        native.linear(x, weight)
        torch.softmax(torch.randn(8, 50_000), -1)
    share = (time.process_time() - cpu) / (time.perf_counter() - started)
    library.set_threads(before)
    assert share < 1.15
