"""The file tier's reads where requests are odd: the same block twice, puts that are given up, no room at all."""

from __future__ import annotations

from tests.core.file_world import PAYLOAD, World, file


def stored(world: World, *numbers: int) -> None:
    """Put files into the backend, as another node would."""
    world.files[0].update({file(n): PAYLOAD for n in numbers})


def test_a_request_may_name_a_block_twice():
    """It is one read, one wait and one answer, whether the block comes, cannot come, or comes too late."""
    world = World()
    stored(world, 1)
    hit, miss = world.fetch(1, 1), world.fetch(2, 1, 2)
    world.work()
    assert world.finished() == [hit, miss]
    assert not hit.misses
    assert list(miss.misses) == [file(2)]
    world.fetch(3, 3)
    world.tier.reads.expire(world.now + 2)
    assert len(world.finished()) == 1
    world.tier.reads.cancel(world.fetch(4, 4))
    assert len(world.tier.reads) == 0
    world.segment.check()
