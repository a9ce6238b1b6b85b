"""The engine's thread: requests from many threads, one delivery a step, a fault and the recovery, draining."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from tests.engine.test_properties import BASES, alone, model

from kvern.engine import Engine, EngineSettings, SamplingParams, Update
from kvern.engine.service import EngineThread
from kvern.errors import BadRequestError, UnavailableError

SETTINGS = EngineSettings(max_context=40, cache_tokens=400, block_size=4, step_tokens=64, check_every_step=True)
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=36, ignore_eos=True)
SECONDS = 20.0
"""How long a test waits for what must happen soon."""


class Watched(Engine):
    """Counts its steps, can be told to fail or to go slowly."""

    faults = 0
    pause = 0.0
    stepped = 0

    def step(self) -> list[Update]:
        self.stepped += 1
        if self.faults:
            self.faults -= 1
            raise RuntimeError("broken on purpose")
        time.sleep(self.pause)
        return super().step()


class Inbox:
    """Collects what is delivered."""

    def __init__(self) -> None:
        self.deliveries: list[list[Update]] = []
        self.threads: set[str] = set()
        self.changed = threading.Condition()
        self.faults = 0

    def __call__(self, updates: list[Update]) -> None:
        if self.faults:
            self.faults -= 1
            raise RuntimeError("nobody takes it")
        with self.changed:
            self.threads.add(threading.current_thread().name)
            self.deliveries.append(updates)
            self.changed.notify_all()

    def of(self, number: int) -> list[Update]:
        return [update for updates in list(self.deliveries) for update in updates if update.request_id == number]

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, SECONDS), "it did not happen in time"

    def ended(self, number: int) -> bool:
        return any(update.finish for update in self.of(number))


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def engine() -> Iterator[Watched]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Watched(model(), settings=SETTINGS)
    torch.set_num_threads(before)


@pytest.fixture
def service(engine: Watched, inbox: Inbox) -> Iterator[EngineThread]:
    service = EngineThread(engine, inbox, first_pause=0.5)
    yield service
    service.stop()


def answer(inbox: Inbox, number: int) -> tuple[int, ...]:
    return tuple(token for update in inbox.of(number) for token in update.tokens)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_many_threads_submit_and_cancel(service: EngineThread, inbox: Inbox) -> None:
    numbers: dict[int, tuple[int, ...]] = {}
    cancelled: set[int] = set()

    def client(which: int) -> None:
        for turn in range(4):
            prompt = BASES[which % 3][: 4 + 3 * turn]
            number = service.submit(prompt, PARAMS)
            numbers[number] = prompt
            if turn == 2:
                cancelled.add(number)
                service.cancel(number)

    clients = [threading.Thread(target=client, args=(which,)) for which in range(6)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    inbox.wait(lambda: all(inbox.ended(number) for number in numbers))
    assert len(numbers) == 24
    for number, prompt in numbers.items():
        expected, _ = alone(prompt, PARAMS, 40)
        ends = [update.finish for update in inbox.of(number) if update.finish]
        assert len(ends) == 1
        if number in cancelled:
            assert answer(inbox, number) == expected[: len(answer(inbox, number))]
        else:
            assert (answer(inbox, number), ends) == (expected, ["length"])


def test_one_delivery_a_step_from_the_engines_thread(service: EngineThread, engine: Watched, inbox: Inbox) -> None:
    numbers = [service.submit(base[:6], PARAMS) for base in BASES]
    inbox.wait(lambda: all(inbox.ended(number) for number in numbers))
    assert inbox.threads == {"kvern-engine"}
    assert len(inbox.deliveries) <= engine.stepped
    assert len(inbox.deliveries) <= 12 + 2
    for updates in inbox.deliveries:
        assert updates
        assert len({update.request_id for update in updates}) == len(updates)


def test_an_idle_engine_does_not_step(service: EngineThread, engine: Watched, inbox: Inbox) -> None:
    number = service.submit(BASES[0][:6], PARAMS)
    inbox.wait(lambda: inbox.ended(number))
    time.sleep(0.05)
    before = engine.stepped
    time.sleep(0.2)
    assert engine.stepped == before
    assert service.healthy


def test_what_cannot_be_served_is_refused_where_it_was_submitted(service: EngineThread) -> None:
    with pytest.raises(BadRequestError):
        service.submit([], PARAMS)
    assert service.healthy


def test_a_fault_ends_every_request_and_the_engine_comes_back(
    service: EngineThread, engine: Watched, inbox: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    engine.pause = 0.01
    numbers = [service.submit(base[:6], ENDLESS) for base in BASES]
    inbox.wait(lambda: all(inbox.of(number) for number in numbers))
    with caplog.at_level(logging.CRITICAL, logger="kvern.engine.service"):
        engine.faults = 1
        inbox.wait(lambda: all(inbox.ended(number) for number in numbers))
        for number in numbers:
            assert [update.finish for update in inbox.of(number) if update.finish] == ["error"]
            error = inbox.of(number)[-1].error
            assert error is not None
            assert error.code == "engine_fault"
        assert not service.healthy
        with pytest.raises(UnavailableError) as refused:
            service.submit(BASES[0][:6], PARAMS)
        assert refused.value.retry_after > 0
        until(lambda: service.healthy)
    again = service.submit(BASES[0][:6], PARAMS)
    inbox.wait(lambda: inbox.ended(again))
    assert answer(inbox, again) == alone(BASES[0][:6], PARAMS, 40)[0]
    assert inbox.of(again)[0].cached_tokens == 0


def test_the_pause_doubles_with_faults_in_a_row_and_a_good_step_resets_it(
    engine: Watched, inbox: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    service = EngineThread(engine, inbox, first_pause=0.1)
    for faults in (1, 1, 0, 1):
        engine.faults = faults
        begun = time.monotonic()
        number = service.submit(BASES[0][:6], PARAMS)
        inbox.wait(partial(inbox.ended, number))
        until(lambda: service.healthy)
        assert not faults or time.monotonic() - begun >= 0.1
    service.stop()
    assert [record.args for record in caplog.records] == [(0.1,), (0.2,), (0.1,)]
    assert all(record.exc_info for record in caplog.records)


def test_books_found_wrong_when_idle_are_a_fault_like_any_other(engine: Watched, inbox: Inbox) -> None:
    service = EngineThread(engine, inbox, first_pause=0.1)
    engine.blocks.allocate(1)
    service._wake.set()
    service._thread.join(0.3)
    assert service._thread.is_alive()
    until(lambda: service.healthy)
    number = service.submit(BASES[0][:6], PARAMS)
    inbox.wait(partial(inbox.ended, number))
    service.stop()
    assert answer(inbox, number) == alone(BASES[0][:6], PARAMS, 40)[0]


def test_a_delivery_that_fails_is_a_fault_and_everybody_hears_of_it(
    engine: Watched, inbox: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    service = EngineThread(engine, inbox, first_pause=0.3)
    last = SamplingParams(max_tokens=1)  # its only update is its end, which is lost
    engine.pause = 0.05
    inbox.faults = 1
    numbers = [service.submit(base[:6], params) for base, params in zip(BASES, (ENDLESS, last, PARAMS), strict=True)]
    inbox.wait(lambda: all(inbox.ended(number) for number in numbers))
    assert not service.healthy
    assert [[update.finish for update in inbox.of(number)] for number in numbers] == [["error"]] * 3
    until(lambda: service.healthy)
    again = service.submit(BASES[0][:6], PARAMS)
    inbox.wait(lambda: inbox.ended(again))
    service.stop()
    assert answer(inbox, again) == alone(BASES[0][:6], PARAMS, 40)[0]
    assert [record.args for record in caplog.records] == [(0.3,)]


def test_deliveries_that_go_on_failing_never_end_the_thread_and_the_pause_doubles(
    engine: Watched, inbox: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    service = EngineThread(engine, inbox, first_pause=0.05)
    for faults in (2, 1, 0):  # the second time of 2, not even the error can be told
        inbox.faults = faults
        service.submit(BASES[0][:6], PARAMS)
        until(lambda: not inbox.faults and service.healthy and not engine.has_work())
    service.stop()
    pauses = [record.args for record in caplog.records if "restarts" in record.message]
    assert pauses == [(0.05,), (0.1,)]
    assert [record.args for record in caplog.records if "not be delivered" in record.message] == [(1,)]
    assert len(inbox.deliveries[-1]) == 1


def test_a_delivery_that_fails_while_stopping_does_not_keep_the_thread(
    engine: Watched, inbox: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    service = EngineThread(engine, inbox)
    engine.pause = 0.1
    number = service.submit(BASES[0][:4], ENDLESS)
    inbox.wait(lambda: bool(inbox.of(number)))
    inbox.faults = 1
    begun = time.monotonic()
    service.stop()
    assert time.monotonic() - begun < 10
    assert inbox.of(number)[-1].finish == "error"
    assert caplog.records


def test_stopping_lets_what_runs_end_and_takes_nothing_new(engine: Watched, inbox: Inbox) -> None:
    service = EngineThread(engine, inbox)
    engine.pause = 0.01
    numbers = [service.submit(base[:6], PARAMS) for base in BASES]
    stopper = threading.Thread(target=service.stop, args=(SECONDS,))
    stopper.start()
    until(service._stopping.is_set)
    with pytest.raises(UnavailableError, match="stopping"):
        service.submit(BASES[0][:6], PARAMS)
    stopper.join()
    assert [inbox.of(number)[-1].finish for number in numbers] == ["length"] * 3
    assert not service.healthy


def test_what_does_not_end_in_time_is_cancelled(engine: Watched, inbox: Inbox) -> None:
    service = EngineThread(engine, inbox)
    engine.pause = 0.1
    number = service.submit(BASES[0][:4], ENDLESS)
    inbox.wait(lambda: bool(inbox.of(number)))
    begun = time.monotonic()
    service.stop(0.3)
    assert time.monotonic() - begun < 10
    assert [update.finish for update in inbox.of(number) if update.finish] == ["cancelled"]
    assert engine.stats().cache_blocks_used == 0


def test_stopping_an_idle_or_a_failed_engine_is_quick(engine: Watched, inbox: Inbox) -> None:
    service = EngineThread(engine, inbox, first_pause=30)
    engine.faults = 1
    number = service.submit(BASES[0][:4], PARAMS)
    inbox.wait(lambda: inbox.ended(number))
    begun = time.monotonic()
    service.stop(SECONDS)
    assert time.monotonic() - begun < 10
