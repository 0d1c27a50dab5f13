"""The emulated device: when its copies run, in which order, and what a missing wait or an exception does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spcompile.runtime.streams import POISON, EmulatedEvent, EmulatedStreams


class Coin:
    """Stands in for the seeded generator: every copy comes early, or every copy comes late, or as listed."""

    def __init__(self, *early: bool) -> None:
        self.early: Iterator[bool] = iter(early)

    def random(self) -> float:
        return 0.0 if next(self.early) else 1.0


def streams_with(*early: bool) -> EmulatedStreams:
    streams = EmulatedStreams()
    streams.random = Coin(*early)  # type: ignore[assignment]
    return streams


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


class Watch:
    """Looks at a tensor from the compute stream."""

    def __init__(self, streams: EmulatedStreams, memory: Tensor) -> None:
        self.streams, self.memory = streams, memory
        self.seen: list[list[int]] = []

    def look(self) -> None:
        self.streams.run(lambda: self.seen.append(self.memory.tolist()))


@pytest.mark.parametrize(("early", "seen"), [(True, [[7], [7], [7]]), (False, [[0], [0], [7]])])
def test_a_copy_comes_at_once_or_when_it_is_waited_for(early: bool, seen: list[list[int]]) -> None:
    streams, slot = streams_with(early), numbers(0)
    watch = Watch(streams, slot)
    streams.side_copy(slot, numbers(7))
    ready = streams.side_record()
    watch.look()
    watch.look()
    streams.compute_wait(ready)
    watch.look()
    streams.drain()
    assert watch.seen == seen


@pytest.mark.parametrize(("early", "seen"), [(True, [[0], [7], [7]]), (False, [[0], [0], [0]])])
def test_a_copy_never_comes_before_what_it_waits_for(early: bool, seen: list[list[int]]) -> None:
    """The earliest moment is right behind the event, the latest is after everything that does not wait for it."""
    streams, slot = streams_with(early), numbers(0)
    watch = Watch(streams, slot)
    watch.look()
    streams.side_wait(streams.compute_record())
    streams.side_copy(slot, numbers(7))
    watch.look()
    watch.look()
    streams.drain()
    assert watch.seen == seen


def test_seeds_choose_both_moments_and_repeat() -> None:
    def seen(seed: int) -> list[list[int]]:
        streams, slot = EmulatedStreams(seed), numbers(0)
        watch = Watch(streams, slot)
        for value in range(1, 9):
            streams.side_copy(slot, numbers(value))
            streams.compute_wait(streams.side_record())
            streams.side_copy(slot, numbers(100 + value))
            watch.look()
        streams.drain()
        return watch.seen

    assert seen(3) == seen(3)
    assert len({str(seen(seed)) for seed in range(8)}) == 8
    assert {value for [value] in seen(0)} & set(range(1, 9))
    assert {value for [value] in seen(0)} & set(range(101, 109))


def test_copies_do_not_overtake_each_other() -> None:
    """A late copy holds an early one behind it back; awaiting the second executes both, in their order."""
    streams, slot = streams_with(False, True), numbers(0)
    watch = Watch(streams, slot)
    streams.side_copy(slot, numbers(1))
    streams.side_copy(slot, numbers(2))
    second = streams.side_record()
    watch.look()
    streams.compute_wait(second)
    watch.look()
    streams.drain()
    assert watch.seen == [[0], [2]]


def test_awaiting_the_first_copy_leaves_the_second_one_queued() -> None:
    streams, slot = streams_with(False, False), numbers(0)
    watch = Watch(streams, slot)
    streams.side_copy(slot, numbers(1))
    first = streams.side_record()
    streams.side_copy(slot, numbers(2))
    streams.compute_wait(first)
    watch.look()
    streams.drain()
    assert watch.seen == [[1]]
    assert slot.tolist() == [1]
    streams.synchronize()
    assert slot.tolist() == [2]


def test_an_early_copy_behind_an_unfinished_wait_stays_where_it_is() -> None:
    streams, slot = streams_with(True), numbers(0)
    watch = Watch(streams, slot)
    streams.side_wait(EmulatedEvent())
    streams.side_copy(slot, numbers(7))
    watch.look()
    streams.drain()
    assert watch.seen == [[0]]


def test_draining_leaves_late_copies_for_the_next_iteration() -> None:
    """As on a GPU: what an iteration prefetches for the next one may still be on its way when it ends."""
    streams, slot = streams_with(False), numbers(0)
    streams.side_copy(slot, numbers(7))
    ready = streams.side_record()
    streams.drain()
    assert slot.tolist() == [0]
    assert not ready.done
    streams.compute_wait(ready)
    streams.drain()
    assert slot.tolist() == [7]


def test_synchronizing_leaves_nothing() -> None:
    streams, slot = streams_with(False), numbers(0)
    streams.side_wait(streams.compute_record())
    streams.side_copy(slot, numbers(7))
    streams.synchronize()
    assert slot.tolist() == [7]
    assert not streams.side.queue
    assert not streams.compute


def test_a_freed_slot_is_poisoned_when_compute_gets_there() -> None:
    streams, slot = streams_with(), numbers(1, 2)
    watch = Watch(streams, slot)
    watch.look()
    streams.freed(slot)
    watch.look()
    assert slot.tolist() == [1, 2]  # nothing has run yet
    streams.drain()
    assert watch.seen == [[1, 2], [POISON, POISON]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_poison_is_not_a_number(dtype: torch.dtype) -> None:
    memory = torch.full((8,), POISON, dtype=torch.uint8)
    assert bool(memory.view(dtype).float().isnan().all())


def test_a_copy_into_a_freed_slot_needs_its_wait() -> None:
    """Without the wait an early copy is overwritten by the poison, in the middle of somebody else's reading."""
    streams, slot = streams_with(True), numbers(1)
    watch = Watch(streams, slot)
    streams.side_copy(slot, numbers(7))
    ready = streams.side_record()
    watch.look()  # the last reader of what was there before
    streams.freed(slot)
    streams.compute_record()
    streams.compute_wait(ready)
    watch.look()
    streams.drain()
    assert watch.seen == [[7], [POISON]]


def test_waiting_for_a_copy_that_was_never_issued() -> None:
    streams = streams_with()
    streams.compute_wait(EmulatedEvent())
    with pytest.raises(RuntimeError, match="compute waits for a copy that was never issued"):
        streams.drain()


def test_compute_and_copies_that_wait_for_each_other() -> None:
    streams, slot = streams_with(False), numbers(0)
    streams.side_wait(EmulatedEvent())
    streams.side_copy(slot, numbers(7))
    streams.compute_wait(streams.side_record())
    with pytest.raises(RuntimeError, match="compute and copies wait for each other"):
        streams.drain()


def test_the_device_works_on_after_an_exception() -> None:
    """What compute would have recorded counts as done; a copy on its way stays on its way until somebody waits."""
    streams, slot = streams_with(False, False), numbers(0)
    watch = Watch(streams, slot)
    streams.side_copy(slot, numbers(1))
    ready = streams.side_record()
    streams.run(_fail)
    streams.compute_wait(ready)
    watch.look()
    released = streams.compute_record()
    with pytest.raises(ValueError, match="on purpose"):
        streams.drain()
    assert watch.seen == []
    assert slot.tolist() == [0]

    streams.compute_wait(ready)  # the next iteration finds the copy on its way: a hit
    watch.look()
    streams.side_wait(released)  # and turns it out behind the reader that never ran
    streams.side_copy(slot, numbers(2))
    streams.compute_wait(streams.side_record())
    watch.look()
    streams.drain()
    assert watch.seen == [[1], [2]]


def test_a_copy_behind_compute_that_was_dropped_still_runs() -> None:
    streams, slot = streams_with(False), numbers(0)
    streams.run(_fail)
    streams.side_wait(streams.compute_record())
    streams.side_copy(slot, numbers(7))
    ready = streams.side_record()
    with pytest.raises(ValueError, match="on purpose"):
        streams.drain()
    streams.compute_wait(ready)
    streams.drain()
    assert slot.tolist() == [7]


def _fail() -> None:
    raise ValueError("on purpose")
