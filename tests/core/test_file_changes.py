"""Nothing that a node knows of files is lost on its way to the master, whatever becomes of its deltas."""

from __future__ import annotations

from kvpool.core.file_changes import FileChanges
from kvpool.core.filetier import FileTierState
from kvpool.core.messages import (
    Ack,
    BlockRun,
    Delta,
    FilesRemoved,
    Hello,
    Inventory,
    NodeAddress,
    RemoveFiles,
    Scan,
    SendInventory,
    Storage,
    StorageLimits,
    Welcome,
)
from kvpool.core.reporter import FILES_MAX, Reporter
from kvpool.core.segment import SegmentState
from kvpool.model import Backend, BackendState, Namespace

SPACE = Namespace(model="demo")
A = b"A" * 16


def block(number: int) -> bytes:
    return SPACE.digest + number.to_bytes(16, "big")


def files(*numbers: int) -> BlockRun:
    return BlockRun(SPACE.digest, 1, 512, b"".join(block(n)[16:] for n in numbers), backend=A)


class Node:
    """A reporter with a file tier, in a session."""

    def __init__(self, memory: bool = True) -> None:
        self.segment = SegmentState(64 * 1024)
        self.segment.register(SPACE)
        self.tier = FileTierState(self.segment, [Backend(A, "/a", 1 << 30)], queue_bytes_max=1 << 20)
        self.reporter = Reporter(self.segment, NodeAddress("n"), 77, self.tier, memory=memory)
        (self.hello,) = self.reporter.connected()
        self.welcome(5)

    def welcome(self, master_epoch: int, resume_after: int = 0, inventory: bool = True) -> list[object]:
        found: list[object] = list(self.reporter.handle(Welcome(master_epoch, resume_after, inventory)))
        while self.reporter.reporting:
            found += self.reporter.more()
        return found

    def reconnect(self, master_epoch: int, resume_after: int = 0, inventory: bool = True) -> list[object]:
        self.reporter.disconnected()
        self.reporter.connected()
        return self.welcome(master_epoch, resume_after, inventory)

    def added(self, *numbers: int) -> None:
        for number in numbers:
            self.tier.changes.note(A, block(number), 0, 512, added=True)

    def put(self, number: int) -> None:
        held = self.segment.reserve(1, SPACE.digest, (0,), block(number)[16:], 512, 1)
        self.segment.commit(1, held.id, bytes(8))


def told(messages: list[object]) -> list[tuple[tuple[BlockRun, ...], tuple[BlockRun, ...]]]:
    """What deltas say of files."""
    found = []
    for message in messages:
        if isinstance(message, Delta):
            added = tuple(run for run in message.added if run.backend)
            removed = tuple(run for run in message.removed if run.backend)
            if added or removed:
                found.append((added, removed))
    return found


def test_hello_names_the_backends_and_changes_of_their_state_follow():
    """The master knows who serves what."""
    node = Node()
    assert isinstance(node.hello, Hello)
    assert node.hello.backends == (Backend(A, "/a", 1 << 30),)
    node.tier.stuck(0, 2.0, 0.0)
    assert node.reporter.flush() == [
        Storage((Backend(A, "/a", 1 << 30, BackendState.DOWN, "no answer for 2.0 s"),)),
    ]
    assert node.reporter.flush() == []


def test_files_ride_in_deltas():
    """Added and removed, with the backend; memory's own changes beside them."""
    node = Node()
    node.put(9)
    node.added(1, 2)
    node.tier.changes.note(A, block(3), 0, 512, added=False)
    messages = node.reporter.flush()
    assert told(messages) == [((files(1, 2),), (files(3),))]
    assert any(run.backend == b"" for m in messages if isinstance(m, Delta) for run in m.added)


def test_only_the_last_change_of_a_file_counts():
    """Written, found broken, written again: it is there."""
    changes = FileChanges()
    for added in (True, False, True, False):
        changes.note(A, block(1), 0, 512, added)
    assert changes.take(10)[1:] == ((), (files(1),))


def test_what_is_acknowledged_is_told_no_more():
    """A new inventory repeats only what may be lost."""
    node = Node()
    node.added(1)
    node.reporter.flush()
    node.reporter.handle(Ack(node.reporter.sequence))
    assert len(node.tier.changes) == 0
    assert told(node.reconnect(6)) == []


def test_a_restarted_master_is_told_again_what_it_has_not_acknowledged():
    """It may have died before its catalog had it. Memory is in the inventory, files are not."""
    node = Node()
    node.put(9)
    node.added(1)
    node.reporter.flush()
    acknowledged = node.reporter.sequence
    node.added(2)
    node.reporter.flush()
    node.reporter.handle(Ack(acknowledged))
    messages = node.reconnect(6)
    assert told(messages) == [((files(2),), ())]
    inventory = [run for m in messages if isinstance(m, Inventory) for run in m.added]
    assert [run.backend for run in inventory] == [b""]
    node.reporter.handle(Ack(node.reporter.sequence))
    assert len(node.tier.changes) == 0


def test_an_acknowledgement_of_the_inventory_is_none_of_what_it_has_not_told():
    """Old delta numbers, which the new master passes over, do not stand for what they carried."""
    node = Node()
    node.added(1)
    node.reporter.flush()
    node.reporter.disconnected()
    node.reporter.connected()
    node.reporter.handle(Welcome(6, 0, inventory=True))
    node.reporter.handle(Ack(node.reporter.sequence))
    messages: list[object] = []
    while node.reporter.reporting:
        messages += node.reporter.more()
    assert told(messages) == [((files(1),), ())]


def test_a_gap_makes_it_tell_again():
    """SendInventory: some delta is lost, and nobody knows which."""
    node = Node()
    node.added(1)
    node.reporter.flush()
    messages: list[object] = list(node.reporter.handle(SendInventory()))
    while node.reporter.reporting:
        messages += node.reporter.more()
    assert told(messages) == [((files(1),), ())]


def test_a_resumed_session_sends_the_deltas_themselves():
    """A short disconnect costs nothing."""
    node = Node()
    before = node.reporter.sequence
    node.added(1)
    node.reporter.flush()
    assert told(node.reconnect(5, before, inventory=False)) == [((files(1),), ())]
    assert len(node.tier.changes) == 1


def test_changes_wait_for_a_master():
    """What is written while there is none is told to the next one."""
    node = Node()
    node.reporter.disconnected()
    node.added(*range(10))
    assert node.reporter.flush() == []
    node.reporter.connected()
    assert told(node.welcome(6)) == [((files(*range(10)),), ())]


def test_a_flood_is_told_in_several_deltas_and_acknowledged_as_one():
    """One at a time: each change is looked at."""
    node = Node()
    count = FILES_MAX + 10
    node.added(*range(count))
    messages = node.reporter.flush()
    assert sum(len(run) for added, _ in told(list(messages)) for run in added) == FILES_MAX
    assert node.reporter.behind
    messages += node.reporter.flush()
    assert not node.reporter.behind
    assert sum(len(run) for added, _ in told(list(messages)) for run in added) == count
    node.reporter.handle(Ack(node.reporter.sequence - 1))
    assert len(node.tier.changes) == 10
    node.reporter.handle(Ack(node.reporter.sequence))
    assert len(node.tier.changes) == 0


def test_more_than_can_be_kept_asks_for_a_scan():
    """Bounded: the backend itself remembers what the node cannot."""
    changes = FileChanges(changes_max=3)
    for n in range(3):
        changes.note(A, block(n), 0, 512, added=True)
    assert not changes.lost
    changes.note(A, block(3), 0, 512, added=True)
    assert changes.lost == {A}
    assert len(changes) == 0


def test_the_masters_words_reach_the_tier():
    """Remove, scan, limits; a removal is confirmed by the next flush."""
    node = Node()
    node.reporter.handle(Scan(A))
    assert node.tier.scans_asked == [A]
    node.reporter.handle(StorageLimits(frozenset({A})))
    assert node.tier.backends[0].full
    node.reporter.handle(RemoveFiles(4, A, ()))
    assert node.reporter.flush() == [FilesRemoved(4)]


def test_a_node_without_a_file_tier_ignores_them():
    """An old setting, a new master."""
    segment = SegmentState(1 << 20)
    reporter = Reporter(segment, NodeAddress("n"), 77)
    reporter.connected()
    reporter.handle(Welcome(5, 0, True))
    for message in (Scan(A), StorageLimits(frozenset({A})), RemoveFiles(4, A, ())):
        assert reporter.handle(message) == []


def test_a_segment_that_is_only_a_buffer_is_not_reported():
    """Pipeline "Posix": nobody looks for blocks in memory, and nobody evicts them from afar."""
    node = Node(memory=False)
    assert isinstance(node.hello, Hello)
    node.put(1)
    assert node.reporter.flush() == []
    node.added(1)
    messages = list(node.reporter.flush())
    assert told(messages) == [((files(1),), ())]
    assert all(m.used_bytes == 0 for m in messages if isinstance(m, Delta))
    assert node.reporter.heartbeat().used_bytes == 0
    messages = node.reconnect(6)
    assert [run for m in messages if isinstance(m, Inventory) for run in m.added] == []


def test_a_fence_is_settled_by_a_delta_that_follows_all_before_it():
    """Also with nothing to tell; what was noted after it is not waited for, what was noted before it is."""
    node = Node()
    changes = node.tier.changes
    fence = changes.fence()
    assert changes.untold
    (empty,) = node.reporter.flush()
    assert (empty.added, empty.removed) == ((), ())
    assert not changes.untold
    assert changes.settled < fence
    node.reporter.handle(Ack(node.reporter.sequence))
    assert changes.settled == fence
    node.added(1)
    second = changes.fence()
    node.reporter.flush()
    node.added(2)
    node.reporter.flush()
    node.reporter.handle(Ack(node.reporter.sequence - 1))
    assert changes.settled == second
    assert len(changes) == 1


def test_a_fence_is_told_again_like_a_change():
    """A master that asks for everything has not settled it; neither has one that takes a part."""
    changes = FileChanges()
    for n in range(3):
        changes.note(A, block(n), 0, 512, added=True)
    fence = changes.fence()
    changes.told(1, changes.take(2)[0])
    changes.acknowledged(1)
    assert changes.settled < fence
    changes.told(2, changes.take(2)[0])
    changes.tell_again()
    assert changes.untold
    changes.acknowledged(2)
    assert changes.settled < fence
    changes.told(3, changes.take(2)[0])
    changes.acknowledged(3)
    assert changes.settled == fence
