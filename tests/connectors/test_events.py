"""KV events: about the pool for the engine's listeners, about the engine for the pool."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvpool.model import KEY_BYTES, Namespace
from kvpool_vllm.events import PoolEvents, Residency

TOKENS = 4
SPACE = Namespace(model="demo", block_tokens=TOKENS)


def chain(blocks: int, prompt: str = "p") -> list[bytes]:
    return [hashlib.sha256(f"{prompt}/{i}".encode()).digest() for i in range(blocks)]


def short(name: bytes) -> int:
    """As vLLM's events name a block."""
    return int.from_bytes(name, "big") & ((1 << 64) - 1)


@dataclass
class Request:
    all_token_ids: list[int]
    mm_features: list[Any] = field(default_factory=list)
    cache_salt: str | None = None
    prompt_embeds: Any = None


class Maker:
    def stored(self, hashes: Sequence[bytes], parent: bytes | None, token_ids: list[int], block_tokens: int) -> Any:
        return ("stored", list(hashes), parent, token_ids, block_tokens)

    def removed(self, hashes: Sequence[bytes]) -> Any:
        return ("removed", list(hashes))


@pytest.fixture
def events() -> PoolEvents:
    return PoolEvents(Maker(), TOKENS)


def save(events: PoolEvents, request: Request, first: int, end: int, *, stored: bool = True) -> list[bytes]:
    """Save some blocks of a request; returns its chain."""
    names = chain(len(request.all_token_ids) // TOKENS)
    events.saving(1, request, names[first:end], first, names[first - 1] if first else None)
    events.saved(1, stored=stored)
    return names


def test_committed_blocks_are_told_with_their_tokens(events: PoolEvents) -> None:
    """In the middle of a prompt too, with the block before."""
    names = save(events, Request(list(range(18))), 1, 3)
    assert events.take() == [("stored", names[1:3], names[0], list(range(4, 12)), TOKENS)]
    assert events.take() == []


def test_nothing_is_told_before_the_save_ends_well(events: PoolEvents) -> None:
    """Neither while it runs nor when some rank could not store."""
    request = Request(list(range(8)))
    events.saving(7, request, chain(2), 0, None)
    assert events.take() == []
    events.saved(7, stored=False)
    assert events.take() == []
    save(events, request, 0, 2, stored=False)
    assert events.take() == []


@pytest.mark.parametrize("more", [{"mm_features": ["image"]}, {"cache_salt": "s"}, {"prompt_embeds": object()}])
def test_blocks_with_more_than_tokens_in_their_hash_are_not_told(events: PoolEvents, more: dict[str, Any]) -> None:
    """A listener that hashes tokens itself would take them for others."""
    save(events, Request(list(range(8)), **more), 0, 2)
    assert events.take() == []


def test_eviction_is_told_once_for_blocks_that_were_announced(events: PoolEvents) -> None:
    """Blocks of which nobody heard need no removal."""
    names = save(events, Request(list(range(8))), 0, 2)
    events.take()
    events.missing(chain(1, "other")[0])
    assert events.take() == []
    events.missing(names[1])
    events.missing(names[1])
    assert events.take() == [("removed", [names[1]])]
    save(events, Request(list(range(8))), 1, 2)
    events.missing(names[1])
    assert [event[0] for event in events.take()] == ["stored", "removed"]


def test_another_namespace_takes_back_all_that_was_announced(events: PoolEvents) -> None:
    """Also what is still being saved under the old one."""
    names = save(events, Request(list(range(8))), 0, 2)
    events.take()
    events.saving(2, Request(list(range(12))), chain(3)[2:], 2, names[1])
    events.forget()
    events.saved(2, stored=True)
    assert events.take() == [("removed", names)]


# ---- the engine's own blocks -----------------------------------------------------------------------


@dataclass
class BlockStored:
    block_hashes: list[int | bytes]
    group_idx: int | None = 0


@dataclass
class BlockRemoved:
    block_hashes: list[int | bytes]
    group_idx: int | None = 0


class AllBlocksCleared:
    pass


class Reports:
    """Stands for the client: keeps what each namespace's engine cache holds."""

    def __init__(self) -> None:
        self.held: dict[Namespace, set[bytes]] = {}
        self.calls = 0

    def report_residency(
        self, namespace: Namespace, added: bytes = b"", removed: bytes = b"", cleared: bool = False
    ) -> None:
        self.calls += 1
        held = self.held.setdefault(namespace, set())
        if cleared:
            held.clear()
        held.difference_update(removed[i : i + KEY_BYTES] for i in range(0, len(removed), KEY_BYTES))
        held.update(added[i : i + KEY_BYTES] for i in range(0, len(added), KEY_BYTES))


class Engine:
    """The engine's queue of events, drained after every step."""

    def __init__(self) -> None:
        self.reports = Reports()
        self.residency = Residency(self.reports)  # type: ignore[arg-type]  # stands in for Client
        self.queue: list[Any] = []

    def step(self, *events: Any, namespace: Namespace | None = SPACE) -> list[Any]:
        """Make events, let them be seen, and publish them; returns what was published."""
        self.queue += events
        self.residency.collect(self.queue)
        self.residency.report(namespace)
        published, self.queue = self.queue, []
        return published

    @property
    def held(self) -> set[bytes]:
        return self.reports.held.get(SPACE, set())


@pytest.fixture
def engine() -> Engine:
    return Engine()


def keys(names: Sequence[bytes]) -> set[bytes]:
    return {name[:KEY_BYTES] for name in names}


@pytest.mark.parametrize("whole", [True, False])
def test_cached_blocks_are_reported_by_key(engine: Engine, whole: bool) -> None:
    """Whether vLLM names blocks by their whole hash or by 64 bits of it; its publisher gets all events."""
    names = chain(3)
    engine.residency.scheduled("r", names)
    event = BlockStored(list(names) if whole else [short(name) for name in names])
    assert engine.step(event) == [event]
    assert engine.held == keys(names)
    engine.step(BlockRemoved([names[0] if whole else short(names[0])]))
    assert engine.held == keys(names[1:])


def test_events_are_seen_once_however_often_one_looks(engine: Engine) -> None:
    """A queue that is looked at twice between two drains tells each event once."""
    names = chain(2)
    engine.residency.scheduled("r", names)
    engine.queue.append(BlockStored([short(names[0])]))
    engine.residency.collect(engine.queue)
    engine.step(BlockStored([short(names[1])]))
    assert engine.held == keys(names)
    assert engine.reports.calls == 1
    engine.step()
    assert engine.reports.calls == 1


def test_last_word_on_a_block_counts(engine: Engine) -> None:
    """Stored, removed and stored within one step is stored."""
    names = chain(2)
    engine.residency.scheduled("r", names)
    one, two = short(names[0]), short(names[1])
    engine.step(BlockStored([one, two]), BlockRemoved([one, two]), BlockStored([one]))
    assert engine.held == keys(names[:1])


def test_reset_clears(engine: Engine) -> None:
    """What is cached after the reset, in the same step, is kept."""
    names = chain(4)
    engine.residency.scheduled("r", names)
    engine.step(BlockStored([short(name) for name in names]))
    engine.step(AllBlocksCleared(), BlockStored([short(names[3])]))
    assert engine.held == keys(names[3:])


def test_blocks_of_other_groups_and_unknown_names_are_left_out(engine: Engine) -> None:
    """A window's blocks are no prefix; a name that no request has cannot be told."""
    names = chain(2)
    engine.residency.scheduled("r", names)
    engine.step(BlockStored([short(names[0])], group_idx=1), BlockStored([12345]), BlockStored([short(names[1])]))
    assert engine.held == keys(names[1:])


def test_hashes_of_generated_tokens_are_learnt_as_they_come(engine: Engine) -> None:
    """A request's chain grows while it runs."""
    names = chain(4)
    engine.residency.scheduled("r", names[:2])
    engine.residency.scheduled("r", names)
    engine.step(BlockStored([short(name) for name in names]))
    assert engine.held == keys(names)


def test_another_namespace_leaves_the_old_one_empty(engine: Engine) -> None:
    """After other weights were loaded, nothing is said to be held under the old name."""
    names = chain(1)
    other = Namespace(model="demo", revision="2")
    engine.residency.scheduled("r", names)
    engine.step(BlockStored([short(names[0])]))
    engine.step(AllBlocksCleared(), BlockStored([short(names[0])]), namespace=other)
    assert engine.held == set()
    assert engine.reports.held[other] == keys(names)


def test_without_a_namespace_nothing_is_kept_but_what_is_held(engine: Engine) -> None:
    """Changes would pile up where it never comes. Once it is known all that is held is told, and later what changes."""
    names = chain(5)
    engine.residency.scheduled("r", names)
    for _ in range(10):
        engine.step(BlockStored([short(name) for name in names]), namespace=None)
        engine.step(BlockRemoved([short(name) for name in names[1:]]), namespace=None)
    assert not engine.residency._changes
    assert not engine.reports.held
    engine.step(BlockStored([short(names[1])]))
    assert engine.held == keys(names[:2])
    engine.step(BlockRemoved([short(names[0])]))
    assert engine.held == keys(names[1:2])


def test_a_namespace_that_is_left_is_emptied_before_the_next_is_known(engine: Engine) -> None:
    """What the engine caches meanwhile is told under the next one, even if that has the same name."""
    names = chain(3)
    engine.residency.scheduled("r", names)
    engine.step(BlockStored([short(names[0])]))
    engine.step(BlockStored([short(names[1])]), namespace=None)
    assert engine.held == set()
    engine.step(BlockStored([short(names[2])]))
    assert engine.held == keys(names)


def test_names_of_forgotten_blocks_do_not_pile_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests that came and went only what is still cached is kept, and is still told when it goes."""
    monkeypatch.setattr("kvpool_vllm.events.UNUSED_NAMES_MAX", 10)
    first = chain(2, "first")
    engine.residency.scheduled("first", first)
    engine.step(BlockStored([short(name) for name in first]))
    for i in range(100):
        names = chain(5, f"r{i}")
        engine.residency.scheduled(f"r{i}", names)
        engine.step(BlockStored([short(name) for name in names]))
        engine.step(BlockRemoved([short(name) for name in names]))
        engine.residency.finished(f"r{i}")
    assert len(engine.residency._keys) <= 2 + 10 + 5
    engine.step(BlockRemoved([short(first[0])]))
    assert engine.held == keys(first[1:])
