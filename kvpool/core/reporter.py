"""The node's side of its session with the master: what is reported when, resent, or reported anew.

Pure. Deltas are numbered; the last ones stay in a journal until the master acknowledges them, so that a
short disconnect costs nothing. Whatever the journal no longer covers is answered by an inventory. Any
message of the master may be lost, late or doubled: the worst that follows is another inventory.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from kvpool.core.file_changes import FileChanges
from kvpool.core.filetier import FileTierState
from kvpool.core.messages import (
    Ack,
    BlockRun,
    Delta,
    Evict,
    Heartbeat,
    Hello,
    Inventory,
    Keep,
    LookForFiles,
    MasterMessage,
    NodeMessage,
    Probe,
    Probed,
    RemoveFiles,
    Scan,
    SendInventory,
    StorageLimits,
    Superseded,
    Victims,
    Welcome,
)
from kvpool.core.segment import SegmentState
from kvpool.model import KEY_BYTES, Namespace, NodeAddress

DELTA_KEYS_MAX: Final = 16384
"""Keys, added and removed together, in one delta."""

FILES_MAX: Final = 2048
"""Changes of files told at a time: each is looked at."""

INVENTORY_KEYS_MAX: Final = 8192
"""Keys in one chunk of an inventory."""

SPARED_MAX: Final = 1024
"""Changes that may wait for a master that is away, or takes nothing, before they are numbered and noted."""

JOURNAL_DELTAS_MAX: Final = 4096
JOURNAL_KEYS_MAX: Final = 1 << 20

# A message stays under 1 MiB even when every run is short: its digest, mask and lengths count too.
_MESSAGE_BYTES_MAX: Final = 1_000_000
_RUN_BYTES: Final = 80


class Reporter:
    """Turns a segment's changes into messages to the master, and the master's messages into calls."""

    def __init__(
        self,
        segment: SegmentState,
        address: NodeAddress,
        epoch: int,
        tier: FileTierState | None = None,
        *,
        memory: bool = True,
    ) -> None:
        """Report ``segment`` and ``tier`` as node ``address``; ``epoch`` is this process's random number.

        Without ``memory`` the segment is only a buffer of the file tier: nobody is told what it holds.
        """
        self.superseded = False
        self.welcomed = False
        self.sequence = 0
        self.master_epoch = 0
        self.inventories = 0
        self._segment = segment
        self._tier = tier
        self._memory = memory
        self._address = address
        self._epoch = epoch
        self._connected = False
        self._journal: deque[Delta] = deque()
        self._journal_keys = 0
        self._namespaces_told = 0
        self._evictions_done = 0
        self._evictions_told = 0
        self._chunks: Iterator[tuple[BlockRun, ...]] | None = None  # what an inventory has still to tell
        self._chunk = 0
        self._inventory_sequence = 0
        self._kept = 0, 0  # who has acknowledged last, and the generation of its catalog

    def __repr__(self) -> str:
        return f"<Reporter {self._address.node_id} at {self.sequence}, {len(self._journal)} not acknowledged>"

    def connected(self) -> list[NodeMessage]:
        """Begin a session; until the master's Welcome changes stay with the segment."""
        self._connected, self.welcomed = True, False
        namespaces = self._segment.namespaces
        self._namespaces_told = len(namespaces)
        return [
            Hello(
                self._address,
                self._epoch,
                self._segment.capacity_bytes,
                self._used_bytes,
                self.sequence,
                self.master_epoch,
                namespaces,
                self._tier.storage().backends if self._tier is not None else (),
                *self._kept,
            )
        ]

    def disconnected(self) -> None:
        """End the session."""
        self._connected = self.welcomed = False
        self._chunks = None

    @property
    def reporting(self) -> bool:
        """Whether an inventory is under way: call ``more`` until it is not."""
        return self._chunks is not None

    def more(self) -> list[NodeMessage]:
        """Return the next chunk of the inventory; with the last one, what has changed meanwhile."""
        if self._chunks is None:
            return []
        runs = next(self._chunks, None)
        if runs == ():
            return []  # looked through, and nothing found
        chunk = Inventory(self._inventory_sequence, self._chunk, runs is None, runs or ())
        self._chunk += 1
        if runs is not None:
            return [chunk]
        self._chunks = None
        if any(delta.sequence == self._inventory_sequence + 1 for delta in self._journal) or (
            self.sequence == self._inventory_sequence
        ):
            return [chunk, *(d for d in self._journal if d.sequence > self._inventory_sequence), *self.flush()]
        return self._inventory()  # more has changed meanwhile than the journal keeps: begin again

    def handle(self, message: MasterMessage) -> list[NodeMessage]:
        """Do what the master says and return the answers; an eviction is confirmed by the next flush."""
        if isinstance(message, Welcome):
            return self._welcome(message)
        if isinstance(message, Victims):
            self._segment.set_victims(message.blocks)
        elif isinstance(message, Evict):
            self._segment.evict(message.blocks)
            self._evictions_done = max(self._evictions_done, message.id)
        elif isinstance(message, SendInventory):
            self.welcomed = self._connected  # the Welcome may be lost; this says as much
            return self._inventory() if self.welcomed else []
        elif isinstance(message, Ack):
            self._acknowledged(message)
        elif isinstance(message, Probe):
            return [Probed(message.id, self._segment.states(message.namespace, message.keys))]
        elif isinstance(message, Keep):
            self._segment.keep(message.keep)
            self._segment.let_go(message.release)
        elif isinstance(message, Superseded):
            self.superseded = True
            self.disconnected()
        elif self._tier is not None:
            if isinstance(message, RemoveFiles | LookForFiles):
                self._tier.remove(message)
            elif isinstance(message, StorageLimits):
                self._tier.set_full(message.full)
            elif isinstance(message, Scan):
                self._tier.scans_asked.append(message.backend)
        return []

    def flush(self) -> list[NodeMessage]:
        """Return deltas for what has changed, or was evicted or registered, since the last ones.

        During an inventory they are kept for its end. Of changes of files there may be more, see ``behind``.
        """
        if not self.welcomed:
            self.spare()
            return []
        messages: list[NodeMessage] = []
        tier = self._tier
        if tier is not None:
            messages += tier.take_removed()
            if tier.storage_changed:
                messages.append(tier.storage())
        untold = self._namespaces_told < len(self._segment.namespaces) or self._evictions_told < self._evictions_done
        if untold or self._has_changes():
            changes = self._record_changes()
            messages += [] if self.reporting else changes
        if tier is not None and self.behind:
            messages += self._record_files(tier.changes)
        return messages

    def spare(self) -> None:
        """Note changes that cannot be told now, if there are many: all at once, they would later take long.

        As far as the journal has them they are told then; else the master asks for an inventory.
        """
        if self._segment.changes >= SPARED_MAX:
            self._record_changes()

    @property
    def behind(self) -> bool:
        """Whether another ``flush`` would tell more of files."""
        return self.welcomed and not self.reporting and self._tier is not None and self._tier.changes.untold

    def heartbeat(self) -> Heartbeat:
        """Return a sign of life that also shows when the last delta was lost."""
        return Heartbeat(self._used_bytes, self.sequence)

    @property
    def _used_bytes(self) -> int:
        return self._segment.used_bytes if self._memory else 0

    def _has_changes(self) -> bool:
        if not self._memory:
            self._segment.take_changes()
        return self._segment.has_changes

    def _welcome(self, message: Welcome) -> list[NodeMessage]:
        if not self._connected or self.superseded:
            return []
        if message.master_epoch != self.master_epoch:
            self.master_epoch = message.master_epoch
            self._evictions_done = self._evictions_told = 0  # ids of another master
            if self._tier is not None:
                self._tier.forget_commands()
        self.welcomed = True
        self._segment.let_all_go()
        oldest = self._journal[0].sequence if self._journal else self.sequence + 1
        if message.inventory or not oldest - 1 <= message.resume_after <= self.sequence:
            return self._inventory()
        missed = [delta for delta in self._journal if delta.sequence > message.resume_after]
        return [*missed, *self.flush()]

    def _inventory(self) -> list[NodeMessage]:
        """Begin a snapshot under a sequence number of its own; return what the master must know to read it.

        Pending changes become deltas too, unsent: the snapshot has them, but if it is lost, a resumed
        session does not. The one delta that is sent names every namespace: an earlier one may be lost.
        Changes of files are in no snapshot: those that are not acknowledged are told again after it.
        """
        self.inventories += 1
        if self._has_changes():
            self._record_changes()
        if self._tier is not None:
            self._tier.changes.tell_again()
        told = self._delta((), (), self._segment.namespaces, self._evictions_done)
        self._namespaces_told = len(told.namespaces)
        self._inventory_sequence, self._chunk = self.sequence, 0
        slices = self._segment.snapshot_slices() if self._memory else iter(())
        self._chunks = (batch for runs in slices for batch in (_batches(runs, INVENTORY_KEYS_MAX) if runs else [()]))
        return [told]

    def _record_changes(self) -> list[Delta]:
        added, removed = self._segment.take_changes() if self._memory else ((), ())
        namespaces = self._segment.namespaces[self._namespaces_told :]
        self._namespaces_told += len(namespaces)
        deltas = []
        parts = _parts(added, removed)
        for at, (new, gone) in enumerate(parts, 1):
            # An eviction is done when all of what it removed is told.
            evictions = self._evictions_done if at == len(parts) else self._evictions_told
            deltas.append(self._delta(new, gone, namespaces, evictions))
            namespaces = ()
        return deltas

    def _record_files(self, changes: FileChanges) -> list[Delta]:
        taken, added, removed = changes.take(FILES_MAX)
        deltas = [self._delta(new, gone, (), self._evictions_told) for new, gone in _parts(added, removed)]
        changes.told(self.sequence, taken)
        return deltas

    def _delta(
        self, added: tuple[BlockRun, ...], removed: tuple[BlockRun, ...], namespaces: tuple[Namespace, ...], done: int
    ) -> Delta:
        """Number a delta and keep it until it is acknowledged, within the journal's bounds."""
        self.sequence += 1
        self._evictions_told = done
        delta = Delta(self.sequence, added, removed, self._used_bytes, done, namespaces)
        self._journal.append(delta)
        self._journal_keys += _keys_in(delta)
        while len(self._journal) > JOURNAL_DELTAS_MAX or self._journal_keys > JOURNAL_KEYS_MAX:
            self._journal_keys -= _keys_in(self._journal.popleft())
        return delta

    def _acknowledged(self, message: Ack) -> None:
        if message.sequence > self.sequence:
            return  # of another process with this node id
        self._kept = self.master_epoch, message.generation
        while self._journal and self._journal[0].sequence <= message.sequence:
            self._journal_keys -= _keys_in(self._journal.popleft())
        if self._tier is not None:
            self._tier.changes.acknowledged(message.sequence)


_Runs = tuple[BlockRun, ...]


def _parts(added: _Runs, removed: _Runs) -> list[tuple[_Runs, _Runs]]:
    """Return what changed in parts of one delta each, removed ones first."""
    if len(list(_batches((*removed, *added), DELTA_KEYS_MAX))) <= 1:
        return [(added, removed)]
    parts: list[tuple[_Runs, _Runs]] = [((), runs) for runs in _batches(removed, DELTA_KEYS_MAX)]
    return parts + [(runs, ()) for runs in _batches(added, DELTA_KEYS_MAX)]


def _keys_in(delta: Delta) -> int:
    return sum(len(run) for run in (*delta.added, *delta.removed))


def _batches(runs: Iterable[BlockRun], keys_max: int) -> Iterator[tuple[BlockRun, ...]]:
    """Yield runs, split where needed, in tuples of at most ``keys_max`` keys and a bounded size."""
    batch: list[BlockRun] = []
    keys_left, bytes_left = keys_max, _MESSAGE_BYTES_MAX
    for run in runs:
        at = 0
        while at < len(run.keys):
            room = min(keys_left, (bytes_left - _RUN_BYTES) // KEY_BYTES)
            if room < 1:
                yield tuple(batch)
                batch, keys_left, bytes_left = [], keys_max, _MESSAGE_BYTES_MAX
                continue
            keys = run.keys[at : at + room * KEY_BYTES]
            batch.append(dataclasses.replace(run, keys=keys))
            at += len(keys)
            keys_left -= len(keys) // KEY_BYTES
            bytes_left -= len(keys) + _RUN_BYTES
    if batch:
        yield tuple(batch)
