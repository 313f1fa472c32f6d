"""Steps: tasks wait for each other, none blocks, and a failure leaves nothing running."""

import threading

import pytest
import torch

from bnfold.measuring.lockstep import Abandoned, Steps, task_maker


def modes():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.fixture(params=["greenlet", "thread"])
def maker(request):
    """Both ways to make tasks; afterwards no thread is left and torch's modes are as they were."""
    before = threading.active_count(), modes()
    yield task_maker(request.param)
    assert (threading.active_count(), modes()) == before


def first(waiting):
    return min(waiting, default=None)


def test_tasks_wait_until_all_have_come(maker):
    steps, log, settled = Steps(maker), [], []

    def task(number):
        for place in ("a", "b"):
            log.append((place, number))
            steps.wait(place, number)
        log.append(("end", number))

    def settle(waiting):
        settled.append(dict(waiting))
        return first(waiting)

    steps.run((lambda n=n: task(n) for n in range(3)), settle)
    assert log == [(place, n) for place in ("a", "b", "end") for n in range(3)]
    assert settled == [{"a": [0, 1, 2]}, {"b": [0, 1, 2]}, {}]


def test_one_task_runs_at_a_time(maker):
    steps, running = Steps(maker), []

    def task():
        for _ in range(20):
            running.append(1)
            assert len(running) == 1
            running.pop()
            steps.wait("a", None)

    steps.run([task] * 10, first)


def test_tasks_on_different_ways_do_not_block(maker):
    """a-b and b-a: no order is right for both, and both end; a task that waits nowhere ends too."""
    steps, log, settled = Steps(maker), [], []

    def task(places):
        for place in places:
            steps.wait(place, places)
        log.append(places)

    def settle(waiting):
        settled.append({place: len(found) for place, found in waiting.items()})
        return first(waiting)

    ways = ["ab", "ba", "", "c"]
    steps.run((lambda way=way: task(way) for way in ways), settle)
    assert sorted(log) == sorted(ways)
    assert settled[0] == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_what_a_task_raises_is_raised_and_the_others_are_unwound(maker, error):
    steps, unwound = Steps(maker), []

    def task(number):
        try:
            steps.wait("a", None)
            if number == 1:
                raise error
            steps.wait("b", None)
        except Abandoned:
            unwound.append(number)
            raise

    with pytest.raises(type(error)) as caught:
        steps.run((lambda n=n: task(n) for n in range(4)), first)
    assert caught.value is error
    assert unwound == [0, 2, 3]


def test_what_settle_raises_ends_the_tasks(maker):
    steps, unwound = Steps(maker), []

    def task():
        try:
            steps.wait("a", None)
        finally:
            unwound.append(1)

    with pytest.raises(ZeroDivisionError):
        steps.run([task] * 3, lambda _: 1 / 0)
    assert len(unwound) == 3


def test_a_task_that_swallows_its_end_is_unwound_all_the_same(maker):
    steps = Steps(maker)

    def stubborn():
        for _ in range(3):
            try:
                steps.wait("a", None)
            except BaseException:
                continue

    def bad():
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        steps.run([stubborn, bad], first)


def test_a_source_of_tasks_that_fails_ends_those_started(maker):
    steps, unwound = Steps(maker), []

    def task():
        try:
            steps.wait("a", None)
        finally:
            unwound.append(1)

    def calls():
        yield task
        yield task
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        steps.run(calls(), first)
    assert len(unwound) == 2


def test_modes_of_a_task_do_not_leak_into_another(maker):
    """A task that waits inside autocast or inference mode, while its neighbour works outside."""
    steps, seen = Steps(maker), []

    def inside():
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            steps.wait("a", None)
            seen.append(("inside", modes()))
            steps.wait("b", None)
        seen.append(("after", modes()))
        steps.wait("c", None)

    def outside():
        for place in "abc":
            seen.append(("outside", modes()))
            steps.wait(place, None)

    steps.run([inside, outside, inside], first)
    expected = {
        "inside": (True, True, False),
        "after": (False, False, True),
        "outside": (False, False, True),
    }
    assert len(seen) == 7
    assert all(expected[who] == found for who, found in seen)


def test_autocast_of_the_caller_holds_in_tasks(maker):
    steps, seen = Steps(maker), []

    def task():
        steps.wait("a", None)
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        steps.run([task, task], first)
    assert seen == [(True, torch.bfloat16)] * 2


def test_without_greenlet_threads_are_taken(monkeypatch):
    import importlib

    from bnfold.measuring.lockstep import ThreadTask

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert task_maker() is ThreadTask
    with pytest.raises(ImportError):
        task_maker("greenlet")
