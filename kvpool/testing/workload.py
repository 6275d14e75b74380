"""Clients of a simulated cluster: they put, look up, read and evict, and check every unit they read."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

from kvpool.core.allocator import UNIT_BYTES
from kvpool.core.lookup import Group, Query
from kvpool.core.segment import BEING_WRITTEN, NO_ROOM, STORED, Pin, Reservation, Slot
from kvpool.errors import AllPinnedError, UnknownNamespaceError
from kvpool.model import CHECKSUM_BYTES, KEY_BYTES, Namespace
from kvpool.testing.transfers import TransferWorkload

if TYPE_CHECKING:
    from kvpool.testing.cluster import Cluster, NodeProcess

UNIT = UNIT_BYTES
NAMESPACES = (
    (Namespace(model="one"), 700),
    (Namespace(model="one", dtype="float16"), 700),
    (Namespace(model="two", layers=2, layer_groups=2), 300),
    (Namespace(model="two", layers=2, layer_groups=2, revision="b"), 300),
    (Namespace(model="three"), 1500),
)
"""With the payload bytes of one shard; each comes into use a little later than the one before it."""

PINS_MAX = 2
PROMPTS = 5
BLOCKS = 9


def _chain(prompt: int) -> bytes:
    """A prompt's keys; the first blocks of every second prompt are the same."""
    names = [f"{prompt % 2 if i < BLOCKS // 3 else prompt + 2}/{i}" for i in range(BLOCKS)]
    return b"".join(blake2b(name.encode(), digest_size=KEY_BYTES).digest() for name in names)


CHAINS = tuple(_chain(prompt) for prompt in range(PROMPTS))


class Workload:
    """What clients do."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._random = cluster.random
        self._owners = 0
        self._steps = 0
        self.read_units = 0
        self.hit_blocks = 0
        self.transfers = TransferWorkload(cluster, self)

    @property
    def busy(self) -> bool:
        """Whether a client still holds a reservation or a pin, or moves a prompt."""
        return self.transfers.engines > 0 or any(node.holding for node in self._cluster.nodes)

    def step(self) -> None:
        """Do one thing."""
        self._steps += 1
        choice = self._random.random()
        nodes = [node for node in self._cluster.nodes if node.stalled_until <= self._cluster.clock()]
        if choice < 0.4 and nodes:
            namespace, shard_bytes = self.namespace()
            self.put(self._random.choice(nodes), namespace, shard_bytes, self.keys(), self._shards(namespace))
        elif choice < 0.6 and nodes:
            namespace, _ = self.namespace()
            self.read(self._random.choice(nodes), namespace, self.keys())
        elif choice < 0.87:
            self._lookup()
        elif choice < 0.91:
            self._evict()
        elif choice < 0.97:
            self.transfers.begin()
        else:
            self._pin()

    def namespace(self) -> tuple[Namespace, int]:
        """Return one that is in use by now, with the bytes of a shard."""
        return self._random.choice(NAMESPACES[: 2 + self._steps // 12])

    def keys(self) -> bytes:
        """Return some of a prompt's keys."""
        chain = self._random.choice(CHAINS)
        first = self._random.randrange(BLOCKS) if self._random.random() < 0.3 else 0
        return chain[first * KEY_BYTES : self._random.randint(first + 1, BLOCKS) * KEY_BYTES]

    def _shards(self, namespace: Namespace) -> tuple[int, ...]:
        every = tuple(range(namespace.shards))
        return every if self._random.random() < 0.6 else (self._random.choice(every),)

    def _owner(self) -> int:
        self._owners += 1
        return self._owners

    # ---- put -----------------------------------------------------------------------------------

    def put(
        self, node: NodeProcess, namespace: Namespace, shard_bytes: int, keys: bytes, shards: tuple[int, ...]
    ) -> None:
        """Store blocks in a node; now and then its client dies instead."""
        segment, owner = node.segment, self._owner()
        digest = segment.register(namespace)
        try:
            put = segment.reserve(owner, digest, shards, keys, shard_bytes, namespace.shard_layers)
        except AllPinnedError:
            assert segment.pinned + segment.reserved, "a put fails only because of what is in use"
            return
        segment.check()
        assert all(offset >= 0 or offset in {STORED, BEING_WRITTEN, NO_ROOM} for offset in put.offsets)
        self._cluster.changed(node)
        if put.id:
            for slot in put.slots:
                _write(node, slot, ("half", owner))
            node.holding += 1
            self._cluster.after(0.4 * self._random.random(), node, self._finish_put, node, put)

    def _finish_put(self, node: NodeProcess, put: Reservation) -> None:
        segment, choice = node.segment, self._random.random()
        if choice < 0.8:
            for slot in put.slots:
                _write(node, slot, _content(slot))
            layers = put.slots[0].layers
            node.tier.committed(segment.commit(put.owner, put.id, bytes(CHECKSUM_BYTES * layers * len(put.slots))))
        elif choice < 0.9:
            segment.abort(put.owner, put.id)
        else:
            segment.disconnect(put.owner, quarantine=True)
            self._cluster.after(self._random.random(), node, self._die, node, put)
            node.holding += 1
        node.holding -= 1
        self._cluster.changed(node)

    def _die(self, node: NodeProcess, put: Reservation) -> None:
        """A client whose connection broke long ago was still writing; now it ends."""
        for slot in put.slots:
            _write(node, slot, "too late")
        node.segment.process_gone(put.owner)
        node.holding -= 1
        node.segment.check()
        self._cluster.changed(node)

    # ---- get -----------------------------------------------------------------------------------

    def read(self, node: NodeProcess, namespace: Namespace, keys: bytes) -> None:
        """Read what a node has of these blocks, and check it."""
        owner = self._owner()
        shards = self._shards(namespace)
        pin = node.segment.pin(owner, namespace.digest, shards, keys)
        asked = [(keys[at : at + KEY_BYTES], shard) for at in range(0, len(keys), KEY_BYTES) for shard in shards]
        before = [
            (slot.start, slot.offset, slot.generation, slot.shard_bytes)
            for (key, shard), slot in zip(asked, pin.slots, strict=True)
            if slot is not None and self._is(slot, namespace, key, shard)
        ]
        self._check(node, pin)
        if pin.id:
            node.holding += 1
            self._cluster.after(0.5 * self._random.random(), node, self._finish_read, node, owner, pin, before)

    def _is(self, slot: Slot, namespace: Namespace, key: bytes, shard: int) -> bool:
        assert (slot.namespace, slot.key, slot.shard) == (namespace.digest, key, shard), "a pin gives what was asked"
        return True

    def _finish_read(
        self, node: NodeProcess, owner: int, pin: Pin, before: list[tuple[int, int, int, int]]
    ) -> None:
        slots = [slot for slot in pin.slots if slot is not None]
        now = [(slot.start, slot.offset, slot.generation, slot.shard_bytes) for slot in slots]
        assert now == before, "a pinned slot never changes"
        self._check(node, pin)
        if self._random.random() < 0.8:
            node.segment.release(owner, pin.id)
        else:
            node.segment.disconnect(owner)
        node.holding -= 1

    def _check(self, node: NodeProcess, pin: Pin) -> None:
        for slot in pin.slots:
            if slot is not None:
                for unit in _units(slot):
                    assert node.memory.get(unit) == _content(slot), "what is read is what was stored"
                    self.read_units += 1

    # ---- the master ----------------------------------------------------------------------------

    def _lookup(self) -> None:
        master = self._cluster.master
        if master.gone or master.stalled_until > self._cluster.clock():
            return
        namespace, _ = self.namespace()
        keys = self.keys()
        blocks = len(keys) // KEY_BYTES
        known = self._random.randrange(blocks) if self._random.random() < 0.3 else 0
        answer = master.state.lookup(Query((Group(namespace.digest),), keys, known, lease=True))
        master.state.settle(answer, self._cluster.clock())
        assert known <= answer.prefix <= blocks
        assert sum(run for run, _ in answer.runs) == answer.prefix - known
        self.hit_blocks += answer.prefix - known
        at = known * KEY_BYTES
        for run, placement in answer.runs:
            part, at = keys[at : at + run * KEY_BYTES], at + run * KEY_BYTES
            for owner in placement.owners:
                known_node = master.state.node_of(owner.incarnation)
                for node in self._cluster.nodes:
                    if known_node is not None and node.node_id == known_node.address.node_id:
                        self._cluster.after(0.2 * self._random.random(), node, self.read, node, namespace, part)
        if answer.lease and self._random.random() < 0.7:
            self._cluster.after(3 * self._random.random(), master, master.state.release, [answer.lease])

    def _evict(self) -> None:
        master = self._cluster.master
        if master.gone or master.stalled_until > self._cluster.clock():
            return
        digest = self.namespace()[0].digest
        choice = self._random.random()
        try:
            if choice < 0.5:
                self._cluster.perform(master.state.evictions.keys(digest, self.keys())[2])
            elif choice < 0.7:
                master.state.evictions.namespace(digest)
                self._cluster.perform([])
            else:
                self._cluster.perform(master.state.evictions.coldest(self._random.randrange(4000))[2])
        except UnknownNamespaceError:
            assert digest not in master.state.index.spaces


    def _pin(self) -> None:
        """Take a pin, hard or for a while, or end one."""
        master = self._cluster.master
        if master.gone or master.stalled_until > self._cluster.clock():
            return
        pins = master.state.pins
        if len(pins.by_id) > PINS_MAX:
            self.unpin(self._random.choice(list(pins.by_id)))
            return
        ttl_s = self._random.choice((0, 3.0))
        try:
            _, slices = pins.begin(self.namespace()[0].digest, self.keys(), ttl_s, "", self._cluster.clock())
        except UnknownNamespaceError:
            return
        for effects in slices:
            self._cluster.perform(effects)

    def unpin(self, pin_id: int) -> None:
        """End a pin."""
        pins = self._cluster.master.state.pins
        for effects in pins.end(pins.by_id[pin_id]):
            self._cluster.perform(effects)


def _content(slot: Slot) -> object:
    return slot.namespace, slot.key, slot.shard


def _units(slot: Slot) -> range:
    return range(slot.offset // UNIT, -(-(slot.offset + slot.shard_bytes) // UNIT))


def _write(node: NodeProcess, slot: Slot, what: object) -> None:
    for unit in _units(slot):
        node.memory[unit] = what
