"""Reads without a pin: slots are given to others under the reader's hands, and no wrong byte comes of it."""

from __future__ import annotations

import json
import platform
from collections import Counter
from typing import Any

import numpy as np
import pytest

from kvpool import Client, Namespace
from kvpool.core.slot_table import ordered
from tests.integration import unpinned
from tests.integration.pool import Pool, chain_of, content_of, wait_for

pytestmark = pytest.mark.skipif(not ordered(platform.machine()), reason="this processor's clients always pin")

SPACE = Namespace(model="unpinned", layers=2)
SIZE = 64 << 10
BLOCKS = 16
FITS = 60


def reads(client: Client) -> Any:
    """Return what a client knows of its reads without pins."""
    node = client._local()
    assert node is not None
    assert node._unpinned is not None
    return node._unpinned


def get(client: Client, keys: list[bytes]) -> tuple[list[bool], list[bool]]:
    """Return what was said to be there, and what is right."""
    buffers = [np.zeros(SIZE, np.uint8) for _ in keys]
    result = client.get(SPACE, keys, buffers)
    right = [np.array_equal(some, content_of(key[:8], SIZE)) for key, some in zip(keys, buffers, strict=True)]
    return result.ok, right


def put(client: Client, keys: list[bytes]) -> None:
    """Store blocks whose bytes follow from their keys."""
    client.register(SPACE)
    contents = [content_of(key[:8], SIZE) for key in keys]
    wait_for(lambda: not client.put(SPACE, keys, contents).failed, "they are stored")


def finder_of(client: Client, keys: list[bytes]) -> Any:
    """Return what a client knows of its reads without pins once it finds these blocks there.

    The node lists what was read under a pin after it has answered: who looks at once may come too early.
    """

    def found() -> bool:
        before = reads(client).blocks
        return get(client, keys)[0] == [True] * len(keys) and reads(client).blocks == before + len(keys)

    wait_for(found, "they are found without asking")
    return reads(client)


@pytest.fixture
def small(bare_pool: Pool) -> Pool:
    """Return a pool of one node for 60 blocks, whose master lists no victims: one may be made before a use is told."""
    bare_pool.start_master("--eviction_high_watermark_ratio", "1.0")
    bare_pool.start_node("a", "--segment_size", str(FITS * (SIZE + 512)))
    return bare_pool


@pytest.mark.parametrize("checksum", ["always", "transfer"])
def test_the_second_read_asks_nobody(small: Pool, checksum: str) -> None:
    """A block that was read once is found without asking; the node is told of the use, and keeps what is used."""
    client, other = small.client("a", checksum=checksum), small.client("a")
    keys = chain_of(1, BLOCKS)
    put(client, keys)
    assert get(client, keys) == ([True] * BLOCKS, [True] * BLOCKS)
    assert reads(client).blocks == 0
    put(other, chain_of(2, FITS - 2 * BLOCKS))
    for _ in range(2):
        assert get(other, keys) == ([True] * BLOCKS, [True] * BLOCKS)
    assert reads(other).blocks == 2 * BLOCKS
    # By now these are the last ones to go.
    put(other, chain_of(3, FITS - 2 * BLOCKS))
    assert get(client, keys) == ([True] * BLOCKS, [True] * BLOCKS)
    assert reads(client).blocks == BLOCKS


def test_the_last_uses_are_told_too(small: Pool) -> None:
    """What is read right after the node was told of something is told when the node is looked after."""
    client = small.client("a")
    keys = chain_of(1, BLOCKS)
    put(client, keys)
    finder = finder_of(client, keys)
    told: list[bytes] = []
    finder._touch = lambda namespace, shard, some: told.append(some)
    finder.tell()
    told.clear()
    assert get(client, keys[:1])[0] == [True]
    assert get(client, keys[1:2])[0] == [True]
    client._look_around()
    assert b"".join(told).count(keys[0]) == b"".join(told).count(keys[1]) == 1


@pytest.mark.parametrize("checksum", ["always", "transfer"])
@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_a_slot_that_is_given_away_under_a_reader(small: Pool, checksum: str, when: str) -> None:
    """Others' blocks come to lie where we have looked, before, while or after we copy: no wrong byte, none trusted."""
    client, other = small.client("a", checksum=checksum), small.client("a")
    keys = chain_of(1, BLOCKS)
    put(client, keys)
    finder = finder_of(client, keys)
    copy = finder._copy

    def copy_meanwhile(items: list[Any], *arguments: Any) -> None:
        half = 0 if when == "before" else len(items) if when == "after" else len(items) // 2
        copy(items[:half], *arguments)
        put(other, chain_of(2, FITS))
        copy(items[half:], *arguments)

    finder._copy = copy_meanwhile
    ok, right = get(client, keys)
    assert finder.changed == BLOCKS
    assert not any(ok)  # the node, asked under a pin, does not have them any more
    finder._copy = copy
    put(other, keys)
    assert get(client, keys) == ([True] * BLOCKS, [True] * BLOCKS)
    assert when == "after" or not all(right)


@pytest.mark.parametrize("checksum", ["always", "transfer"])
def test_a_block_that_has_moved_under_a_reader(small: Pool, checksum: str) -> None:
    """Evicted and stored again elsewhere while we copy: what we have is thrown away, and read where it lies now."""
    client, other = small.client("a", checksum=checksum), small.client("a")
    keys = chain_of(1, BLOCKS)
    put(client, keys)
    finder = finder_of(client, keys)
    copy = finder._copy

    def copy_meanwhile(*arguments: Any) -> None:
        put(other, chain_of(2, FITS))
        put(other, keys)
        copy(*arguments)

    finder._copy = copy_meanwhile
    assert get(client, keys) == ([True] * BLOCKS, [True] * BLOCKS)
    assert finder.changed == BLOCKS


@pytest.mark.timeout(120)
def test_hammer_on_a_tiny_segment(bare_pool: Pool) -> None:
    """Several processes, with checksums and without, on slots that change hands all the time: never a wrong byte."""
    seconds = 6.0
    bare_pool.start_master()
    bare_pool.start_node("a", "--segment_size", str(unpinned.SEGMENT))
    outputs, processes = [], []
    for number, checksum in enumerate(("always", "transfer", "transfer", "transfer")):
        output = bare_pool.directory / f"unpinned{number}.json"
        arguments = (bare_pool.socket_path("a"), str(output), str(number), str(seconds), checksum)
        processes.append(bare_pool.adopt(f"unpinned{number}", ("tests.integration.unpinned", *arguments)))
        outputs.append(output)
    total: Counter[str] = Counter()
    for process, output in zip(processes, outputs, strict=True):
        wait_for(lambda p=process: not p.alive, f"{process.name} ends", 60)  # type: ignore[misc]
        assert process.popen.returncode == 0, f"{process.name}:\n{process.words()}"
        total.update(json.loads(output.read_text()))
    assert not total["wrong"]
    assert not total["corrupt"]
    assert total["right"]
    assert total["unpinned"]
    assert total["changed"], total
