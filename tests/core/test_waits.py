"""Waiting for items of a segment: single rules, then random events beside an oracle that looks at everything."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from kvpool.core import waits as waits_module
from kvpool.core.segment import SegmentState
from kvpool.core.waits import WAITERS_OF_ONE_MAX, Waiter, Waits
from kvpool.errors import OverloadedError
from kvpool.model import Namespace

SPACE = Namespace(model="two layers", layers=2)
READER, WRITER = 1, 2


def item(number: int) -> tuple[bytes, int]:
    return SPACE.digest + number.to_bytes(16, "big"), 0


class World:
    """A segment, and those who wait for it."""

    def __init__(self) -> None:
        self.state = SegmentState(1 << 20)
        self.state.register(SPACE)
        self.waits = Waits(self.state.layers_ready)
        self.ended: list[Waiter] = []
        self.state.arrived = lambda slots: self.ended.extend(self.waits.arrived(slots))

    def wait(self, *numbers: int, layer: int = 0, transfer: int = 7, owner: int = READER) -> Waiter:
        waiter = Waiter(owner, [item(n) for n in numbers], layer, transfer)
        assert not self.waits.add(waiter)
        return waiter

    def begin(self, *numbers: int, transfer: int = 7) -> int:
        keys = b"".join(item(n)[0][16:] for n in numbers)
        return self.state.reserve(WRITER, SPACE.digest, (0,), keys, 512, 2, transfer).id

    def put(self, *numbers: int) -> None:
        self.state.commit(WRITER, self.begin(*numbers), bytes(16 * len(numbers)))

    def take_ended(self) -> list[Waiter]:
        self.waits.check()
        ended, self.ended = self.ended, []
        return ended


def test_what_is_there_is_not_waited_for():
    """Nothing is registered when everything asked for has the layer."""
    world = World()
    world.put(1, 2)
    assert world.waits.add(Waiter(READER, [item(1), item(2)], 1, 7))
    assert world.waits.add(Waiter(READER, [], 0, 7))
    assert len(world.waits) == 0
    world.waits.check()


def test_a_waiter_ends_with_the_last_of_its_items():
    """In whatever order they come, and whether they existed when it began or not."""
    world = World()
    waiter = world.wait(1, 2, 3)
    for number in (3, 1):
        world.put(number)
        assert world.take_ended() == []
    world.put(2)
    assert world.take_ended() == [waiter]
    assert len(world.waits) == 0


def test_layers_end_a_wait_of_the_same_transfer_others_wait_for_the_commit():
    """And one for the second layer waits for the second layer."""
    world = World()
    first, second = world.wait(1), world.wait(1, layer=1)
    stranger, nobody = world.wait(1, transfer=8), world.wait(1, transfer=0)
    held = world.begin(1)
    assert world.take_ended() == []
    world.state.progress(WRITER, held, 1, bytes(8))
    assert world.take_ended() == [first]
    world.state.progress(WRITER, held, 2, bytes(8))
    assert world.take_ended() == [second]
    world.state.commit(WRITER, held, bytes(16))
    assert world.take_ended() == [stranger, nobody]


def test_a_writer_that_gives_up_leaves_its_readers_waiting():
    """Somebody else may write the block yet."""
    world = World()
    waiter = world.wait(1, 2)
    held = world.begin(1, 2)
    world.state.abort(WRITER, held)
    world.state.disconnect(WRITER)
    assert world.take_ended() == []
    world.put(1, 2)
    assert world.take_ended() == [waiter]


def test_what_has_gone_again_is_waited_for_anew():
    """A waiter that has ended may be added again, and looks at all of its items."""
    world = World()
    waiter = world.wait(1, 2)
    world.put(1)
    assert world.state.evict(world.state.snapshot())
    world.put(2)
    assert world.take_ended() == [waiter]
    assert not world.waits.add(waiter)
    world.put(1)
    assert world.take_ended() == [waiter]


def test_a_waiter_that_is_removed_or_whose_owner_is_gone_hears_nothing():
    """Removing is for deadlines, cancelling for connections; both may come late."""
    world = World()
    removed = world.wait(1, 2)
    for _ in range(3):
        world.wait(1, 2)
    kept = world.wait(1, 2, owner=3)
    world.waits.remove(removed)
    world.waits.remove(removed)
    world.waits.cancel(READER)
    world.waits.cancel(READER)
    world.put(1, 2)
    assert world.take_ended() == [kept]
    world.waits.remove(kept)
    assert len(world.waits) == 0
    world.waits.check()


def test_there_is_a_limit_of_waiters_and_items(monkeypatch):
    """For one connection, for all, and for the items of all together; who ends makes room."""
    world = World()
    for _ in range(WAITERS_OF_ONE_MAX):
        world.wait(1)
    with pytest.raises(OverloadedError, match="this connection"):
        world.wait(2)
    monkeypatch.setattr(waits_module, "WAITERS_MAX", WAITERS_OF_ONE_MAX + 1)
    world.wait(2, owner=3)
    with pytest.raises(OverloadedError):
        world.wait(2, owner=4)
    world.put(1)
    assert len(world.take_ended()) == WAITERS_OF_ONE_MAX
    monkeypatch.setattr(waits_module, "ITEMS_MAX", 3)
    with pytest.raises(OverloadedError):
        world.wait(3, 4, 5)
    world.wait(3, 4)
    world.waits.check()


def test_an_arrival_looks_at_those_who_wait_for_it_alone():
    """Whoever else waits, and for however much: their items are not looked at."""
    looked: list[tuple[bytes, int]] = []
    ready: dict[Any, int] = {}

    def layers_ready(block: bytes, shard: int, transfer: int) -> int:
        looked.append((block, shard))
        return ready.get((block, shard), 0)

    waits = Waits(layers_ready)
    for owner in range(100):
        waits.add(Waiter(owner, [item(1000 * owner + n) for n in range(1000)], 0, 7))
    assert len(looked) == 100  # each at its first item
    for n in range(999, -1, -1):
        ready[item(n)] = 1
        block, shard = item(n)
        ended = waits.arrived([SimpleNamespace(block=SimpleNamespace(key=block), shard=shard)])  # type: ignore[list-item]
        assert len(ended) == (n == 0)
    assert len(looked) == 100 + 1000  # every item of the one waiter once
    waits.check()


@pytest.mark.parametrize("seed", range(20))
def test_random_events_agree_with_looking_at_everything(seed):
    """After every event those have ended who lack nothing, and nobody else."""
    rng = random.Random(seed)
    world = World()
    waiting: set[Waiter] = set()
    held: dict[int, tuple[list[int], int]] = {}
    for _ in range(400):
        action = rng.choice(("wait", "wait", "begin", "progress", "commit", "abort", "evict", "remove"))
        if action == "wait":
            numbers = rng.sample(range(8), rng.randint(1, 4))
            waiter = Waiter(rng.randint(10, 14), [item(n) for n in numbers], rng.randrange(2), rng.randrange(3))
            if not world.waits.add(waiter):
                waiting.add(waiter)
        elif action == "begin":
            numbers = [n for n in rng.sample(range(8), 2) if n not in {m for some, _ in held.values() for m in some}]
            transfer = rng.randint(1, 2)
            reservation = world.begin(*numbers, transfer=transfer) if numbers else 0
            if reservation:
                slots = world.state.reservation(WRITER, reservation).slots
                held[reservation] = ([int.from_bytes(slot.key, "big") for slot in slots], 0)
        elif action == "evict":
            world.state.evict(world.state.snapshot())
        elif action == "remove" and waiting:
            gone = rng.choice(sorted(waiting, key=id))
            world.waits.remove(gone)
            waiting.discard(gone)
        elif held:
            reservation = rng.choice(list(held))
            numbers, done = held[reservation]
            if action == "progress" and done < 2:
                layers = rng.randint(done + 1, 2)
                world.state.progress(WRITER, reservation, layers, bytes(8 * (layers - done) * len(numbers)))
                held[reservation] = (numbers, layers)
            elif action == "commit":
                world.state.commit(WRITER, reservation, bytes(16 * len(numbers)))
                del held[reservation]
            elif action == "abort":
                world.state.abort(WRITER, reservation)
                del held[reservation]
        for waiter in world.take_ended():  # as the server does: once more, for what has gone meanwhile
            waiting.remove(waiter)
            if not world.waits.add(waiter):
                waiting.add(waiter)
        world.waits.check()
        for waiter in waiting:
            ready = [world.state.layers_ready(*place, waiter.transfer) > waiter.first_layer for place in waiter.items]
            assert not ready[waiter.at]
        assert len(waiting) == len(world.waits)
