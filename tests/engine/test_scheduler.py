"""Who gets the budget of a step, who enters, who is preempted, and who waits for a prefix that is being computed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvern.engine import SamplingParams
from kvern.engine.block_manager import BlockManager
from kvern.engine.request import BACKGROUND, Request
from kvern.engine.scheduler import BackgroundTokens, Scheduler

SIZE = 4


def scheduler(*, blocks: int = 100, step_tokens: int = 4, max_running: int = 4, caching: bool = True) -> Scheduler:
    return Scheduler(BlockManager(blocks, SIZE, caching), step_tokens, max_running)


def request(number: int, tokens: int | Sequence[int], priority: int = 0, scored: bool = False) -> Request:
    """Different numbers share no prefix, unless the ids are given."""
    ids = [1000 * number + at for at in range(tokens)] if isinstance(tokens, int) else list(tokens)
    sampling = SamplingParams(max_tokens=9, prompt_logprobs=scored)
    return Request(number, sampling, len(ids), ids, priority, number, b"", 0, len(ids) + 9)


def step(of: Scheduler) -> dict[int, int]:
    """Schedule, "compute", draw a token for whoever has no other; request id -> tokens computed."""
    chunks = of.schedule()
    for chunk in chunks:
        of.computed(chunk)
        if not chunk.request.pending:
            chunk.request.tokens.append(1)
    of.blocks.check(one.blocks for one in [*of.running, *of.waiting])
    assert sum(chunk.count for chunk in chunks) <= of.step_tokens
    return {chunk.request.id: chunk.count for chunk in chunks}


def test_an_urgent_request_goes_before_a_prompt_that_is_being_computed() -> None:
    of = scheduler()
    of.add(request(0, 40, priority=1))
    assert step(of) == {0: 4}
    of.add(request(1, 3))
    assert step(of) == {1: 3, 0: 1}
    assert step(of) == {1: 1, 0: 3}


def test_of_equal_priority_the_one_that_came_first_goes_first() -> None:
    of = scheduler()
    of.add(request(0, 6))
    assert step(of) == {0: 4}
    of.add(request(1, 3))
    assert step(of) == {0: 2, 1: 2}


def test_one_that_was_preempted_waits_in_its_old_place() -> None:
    of = scheduler(max_running=2)
    of.add(request(0, 40, priority=1))
    of.add(request(1, 40, priority=1))
    step(of)
    of.add(request(2, 1))
    of.add(request(3, 1))
    assert step(of) == {2: 1, 3: 1}
    assert [one.id for one in of.waiting] == [0, 1]
    of.remove(of.running[0])
    assert step(of) == {3: 1, 0: 3}


def test_a_decoding_request_goes_before_better_prompts() -> None:
    of = scheduler()
    of.add(request(0, 4, priority=9))
    assert step(of) == {0: 4}
    of.add(request(1, 40))
    assert step(of) == {0: 1, 1: 3}


def test_nobody_behind_one_that_does_not_fit_enters() -> None:
    of = scheduler(blocks=10)
    of.add(request(0, 28))
    step(of)
    of.add(request(1, 38))
    of.add(request(2, 2))
    while of.running[0].pending > 1:
        assert set(step(of)) == {0}
    assert set(step(of)) == {0}
    of.remove(of.running[0])
    assert step(of) == {1: 4}


def test_nobody_is_preempted_where_that_frees_too_few_blocks() -> None:
    of = scheduler(blocks=10, step_tokens=40)
    of.add(request(0, 20))
    of.add(request(1, 12, priority=5))
    step(of)
    of.add(request(2, 24, priority=1))
    assert set(step(of)) == {0, 1}
    assert of.preemptions == 0
    of.remove(of.running[0])
    assert set(step(of)) == {1, 2}
    assert of.preemptions == 0


def test_nobody_is_preempted_where_their_blocks_belong_to_others_as_well() -> None:
    of, shared = scheduler(blocks=8, step_tokens=40), list(range(16))
    of.add(request(0, [*shared, 90]))
    step(of)
    of.add(request(1, [*shared, 91], priority=5))
    step(of)
    of.add(request(2, 16, priority=1))
    assert set(step(of)) == {0, 1}
    assert of.preemptions == 0


def test_nobody_is_preempted_where_all_places_are_better_ones() -> None:
    of = scheduler(step_tokens=40, max_running=2)
    of.add(request(0, 4))
    of.add(request(1, 4))
    step(of)
    of.add(request(2, 4, priority=1))
    of.add(request(3, 4))
    assert step(of) == {0: 1, 1: 1}
    assert of.preemptions == 0


def test_only_as_many_are_preempted_as_are_needed() -> None:
    of = scheduler(blocks=10, step_tokens=40, max_running=5)
    for number in range(4):
        of.add(request(number, 7, priority=3 + number))
    step(of)
    of.add(request(9, 13))
    assert step(of) == {0: 1, 1: 1, 2: 1, 9: 13}
    assert [one.id for one in of.waiting] == [3]
    assert of.preemptions == 1


def test_equal_prompts_are_computed_once() -> None:
    of = scheduler(step_tokens=8, max_running=8)
    for number in range(4):
        of.add(request(number, range(22)))
    assert [step(of) for _ in range(3)] == [{0: 8}, {0: 8}, {0: 6}]
    assert step(of) == {0: 1, 1: 2, 2: 2, 3: 2}
    assert of.prefix_hits == 3 * 20


def test_they_go_on_as_soon_as_what_they_share_is_there() -> None:
    of, shared = scheduler(step_tokens=8), list(range(8))
    of.add(request(0, [*shared, *range(100, 120)]))
    of.add(request(1, [*shared, 90, 91]))
    assert step(of) == {0: 8}
    assert step(of) == {0: 8}
    of.add(request(2, [*shared, 92], priority=-1))
    assert step(of) == {2: 1, 0: 7}


def test_those_behind_one_that_waits_for_a_prefix_pass_it() -> None:
    of = scheduler(step_tokens=16)
    of.add(request(0, range(9)))
    of.add(request(1, range(9)))
    of.add(request(2, 5))
    assert step(of) == {0: 9, 2: 5}
    assert step(of) == {0: 1, 2: 1, 1: 1}


def test_nobody_waits_for_a_worse_one_nor_for_one_that_has_gone() -> None:
    of = scheduler(step_tokens=8)
    of.add(request(0, range(40), priority=1))
    step(of)
    of.add(request(1, range(40)))
    assert step(of) == {1: 8}
    of.add(request(2, range(40), priority=1))
    of.remove(of.running[0])
    of.remove(of.running[0])
    assert step(of) == {2: 8}


@pytest.mark.parametrize("scored", [False, True])
def test_nobody_waits_for_what_would_not_be_found(scored: bool) -> None:
    of = scheduler(step_tokens=64, caching=scored)
    of.add(request(0, range(20)))
    of.add(request(1, range(20), scored=scored))
    assert step(of) == {0: 20, 1: 20}


def test_the_time_of_the_first_start_stays() -> None:
    of = scheduler(max_running=1)
    one = request(0, 6, priority=1)
    times = [one.started]
    for run in (one, request(1, 1)):
        of.add(run)
        step(of)
        times.append(one.started)
    assert of.waiting == [one]
    of.remove(of.running[0])
    step(of)
    assert of.running == [one]
    assert times[0] is None
    assert times[1] is not None
    assert {*times[1:], one.started} == {times[1]}


def test_background_requests_have_a_small_share_beside_others() -> None:
    of = Scheduler(BlockManager(100, SIZE, True), 32, 8, BackgroundTokens(alone=6, beside=2))
    for number in range(4):
        of.add(request(number, 5, priority=BACKGROUND + number))
    assert step(of) == {0: 5, 1: 1}
    assert step(of) == {0: 1, 1: 4, 2: 1}
    of.add(request(9, 40))
    assert step(of) == {0: 1, 1: 1, 9: 30}
    assert step(of) == {0: 1, 1: 1, 9: 10}
    assert step(of) == {0: 1, 1: 1, 9: 1}
    assert [of.room(one) > 0 for one in of.running] == [True, False, False, False]
    of.remove(of.running[0])
    assert step(of) == {0: 1, 1: 1, 2: 4}
    assert of.room(of.running[0]) > 0


def test_a_full_house_of_background_requests_makes_room() -> None:
    of = Scheduler(BlockManager(8, SIZE, True), 32, 2, BackgroundTokens(alone=32, beside=1))
    of.add(request(0, 14, priority=BACKGROUND))
    of.add(request(1, 14, priority=BACKGROUND))
    assert step(of) == {0: 14, 1: 14}
    of.add(request(2, 20))
    assert step(of) == {2: 20}
    assert [one.id for one in of.running] == [2]
