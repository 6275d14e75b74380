"""The master: which node holds which blocks, who may be evicted, who is alive.

``MasterState`` is plain data with one owner and no locks. Events go in with the time they happened,
effects come out for the server to perform. Long work (an inventory, a dead node's blocks, a search
for victims) is done a slice at a time, so that a lookup never waits for more than one slice.

A node *incarnation* is a number for one node process since its last full inventory. A new epoch or a
new inventory is a new incarnation; the old one is dropped in one step and its rows are swept later.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

from kvpool.core.ages import Ages
from kvpool.core.agreement import disagreeing, warning
from kvpool.core.backends import Backends
from kvpool.core.effects import Close, Closed, Effect, Event, NodeChanged, Received, Remember, Send
from kvpool.core.engines import Engines
from kvpool.core.eviction import pick_victims, slices_for_eviction
from kvpool.core.index import NAMESPACES_MAX, Index
from kvpool.core.keytable import Rows
from kvpool.core.leases import Leases
from kvpool.core.lookup import Answer, Query, check, longest_prefix
from kvpool.core.messages import (
    Ack,
    BlockRun,
    Delta,
    Evict,
    FilesRemoved,
    Heartbeat,
    Hello,
    Inventory,
    NodeMessage,
    Probed,
    Scanned,
    SendInventory,
    Storage,
    Superseded,
    Victims,
    Welcome,
)
from kvpool.core.nodes import FORGET_DEAD_S, MasterLimits, Node, Retired, bounded, slices_of
from kvpool.core.operators import Evictions
from kvpool.core.pins import Pins
from kvpool.core.placement import Placement
from kvpool.core.removals import Removals, Why
from kvpool.core.residency import Residency
from kvpool.core.rows import PlacementRelief, RowRelief
from kvpool.core.transfers import Transfers
from kvpool.errors import OverloadedError
from kvpool.model import Namespace, NodeAddress, Reason

__all__ = ["MasterLimits", "MasterState", "Node"]

TIER = "dram"
STALL_S = 1.0
"""A longer gap between two events than this means that the master itself stood still."""

SUSPECT_AFTER_S = 0.75
INVENTORY_RETRY_S = 2.0
EVICT_RETRY_S = 2.0
EVICT_BLOCKS_MAX = 256  # in one message: a node drops them all before it does anything else
EXPIRED_BLOCKS = 1 << 14  # of leases, in one tick
VICTIMS_EVERY_S = 1.0
VICTIMS_FROM_USE = 0.5
VICTIMS_SHARE = 0.05


class MasterState:
    """Everything the master decides. Drive it with ``ingest`` (or ``handle``), ``lookup`` and ``work``."""

    def __init__(self, limits: MasterLimits, epoch: int, now: float) -> None:
        self.limits = limits
        self.epoch = epoch
        self.index = Index(limits.blocks_max)
        self.leases = Leases(self.index, limits.lease_ttl_s, (epoch & 0x7FFFFFFF) << 32 | 1, 4 * limits.blocks_max)
        self.nodes: dict[str, Node] = {}
        self.counters: Counter[str] = Counter()
        self.removals = Removals(now, limits.removals_max)
        self.ages = Ages()
        self.residency = Residency(limits.client_ttl_s)
        self.engines = Engines(limits.client_ttl_s)
        self.started = now
        self._last_now = now
        self._stalled = 0.0
        self._sessions: dict[int, Node] = {}
        self._incarnations: dict[int, Node] = {}
        self._next_incarnation = 1
        self._dropped: dict[int, Retired] = {}
        self._sweeping = False
        self._tidying = False
        self._jobs: deque[Iterator[list[Effect]]] = deque()
        self._next_evict = 1
        self._place_turn = 0
        self.evictions = Evictions(self.index, self._jobs, self._evict)
        self.backends = Backends(
            self.index, self.nodes, limits, self.counters, self.removals, self._jobs, self._number, self._drop_rest
        )
        self._row_relief = RowRelief(self.index, self.backends, self._jobs)
        self._placement_relief = PlacementRelief(self.index, self._jobs)
        self.pins = Pins(self.index, self.nodes, (epoch & 0x7FFFFFFF) << 32 | 1)
        self.transfers = Transfers(
            self.index, self.nodes, limits.lease_ttl_s, self.counters, self._jobs, self._evict, self._unlist, now
        )
        self.backends.removing.begin(now, (epoch & 0x7FFFFFFF) << 32 | 1)  # no batch that an earlier master has sent

    # ---- time ----------------------------------------------------------------------------------

    def uptime(self, now: float) -> float:
        """Return the master's own time: ``now`` less the times it stood still itself."""
        gap = now - self._last_now
        if gap > STALL_S:
            self._stalled += gap
            self.counters["stalls"] += 1
        self._last_now = max(now, self._last_now)
        return now - self._stalled

    @property
    def warming(self) -> bool:
        """Whether some node is still reporting what it holds, or the catalog is still being read."""
        reporting = (n.awaiting and n.session is not None and n.state != "dead" for n in self.nodes.values())
        return self.backends.loading or any(reporting)

    # ---- events --------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in an event at once, whatever its size."""
        return [effect for part in self.ingest(event, now) for effect in part]

    def ingest(self, event: Event, now: float) -> Iterator[list[Effect]]:
        """Take in an event a slice at a time; other calls may come between two slices.

        Events of one session are taken in one after another. A session that ends may leave its last event unfinished.
        """
        up = self.uptime(now)
        if isinstance(event, Closed):
            yield self._closed(event.session, up)
        elif isinstance(event, Received):
            yield from self._received(event.session, event.message, up)
        else:
            yield self._tick(up)

    def _received(
        self, session: int, message: NodeMessage, up: float
    ) -> Iterator[list[Effect]]:
        if isinstance(message, Hello):
            yield self._hello(session, message, up)
            return
        node = self._sessions.get(session)
        if node is None:
            self.counters["messages_without_session"] += 1
            return
        node.last_seen = up
        effects = self._judge(node, up, "heard from")
        # Each claims its message before the first slice, while the session is surely the node's.
        if isinstance(message, Inventory):
            if self._begin_chunk(node, message, up):
                incarnation = node.pending
                yield effects + self._judge(node, up, "reports")
                yield from self._inventory(session, node, message, incarnation, up)
            else:
                yield effects
        elif isinstance(message, Delta):
            yield from self._delta(session, node, message, up, effects)
        elif isinstance(message, Probed):
            yield effects  # its answer is for whoever asked
        elif isinstance(message, Storage):
            yield effects + self.backends.announce(node, message.backends)
        elif isinstance(message, FilesRemoved):
            yield effects + self.backends.confirm(message, self._last_now)
        elif isinstance(message, Scanned):
            yield effects + self._learn(message.namespaces)
            yield from self.backends.scanned(node, message, up, self.usable)
        elif isinstance(message, Heartbeat):
            node.used_bytes = message.used_bytes
            node.heard_sequence = message.sequence
            yield effects + self._relieve(node, up)

    def _learn(self, namespaces: tuple[Namespace, ...]) -> list[Effect]:
        effects: list[Effect] = []
        for namespace in namespaces:
            try:
                effects += self.register(namespace)
            except OverloadedError:
                self.counters["namespaces_refused"] += 1
        return effects

    def _hello(self, session: int, hello: Hello, up: float) -> list[Effect]:
        known = self._sessions.get(session)
        if known is not None and known.address.node_id != hello.address.node_id:
            self.counters["hellos_refused"] += 1
            return [Close(session, f"it is node {known.address.node_id}'s")]
        effects = self._learn(hello.namespaces)
        node = self.nodes.get(hello.address.node_id)
        if node is not None and hello.epoch in node.superseded:
            return [*effects, Send(session, Superseded()), Close(session, "superseded")]
        if node is None:
            node = self.nodes[hello.address.node_id] = Node(hello.address, hello.epoch)
        if node.session is not None and node.session != session:
            older = node.session
            self._sessions.pop(older, None)
            if node.epoch != hello.epoch:
                effects.append(Send(older, Superseded()))
            effects.append(Close(older, "a newer session of this node"))
        if node.epoch != hello.epoch:
            node.superseded.add(node.epoch)
            self._drop(node, Why.NODE_RESTARTED)
            node.epoch, node.sequence, node.awaiting = hello.epoch, 0, True
        node.address, node.session, node.last_seen = hello.address, session, up
        node.capacity_bytes, node.used_bytes = hello.capacity_bytes, hello.used_bytes
        node.heard_sequence = hello.sequence
        node.evict_sent = node.evict_done = 0
        self._sessions[session] = node
        reported = not node.awaiting and not node.applying
        resume = reported and hello.master_epoch == self.epoch and node.sequence <= hello.sequence
        if not resume:
            self._await_inventory(node, up)
        effects.append(Send(session, Welcome(self.epoch, node.sequence if resume else 0, inventory=not resume)))
        effects += self._judge(node, up, "resumed" if resume else "says hello")
        self._jobs.extend(self.pins.greet(node))
        return effects + self.backends.hello(node, hello)

    def _await_inventory(self, node: Node, up: float) -> None:
        node.awaiting, node.asked_at, node.next_chunk = True, up, 0

    def _ask_inventory(self, node: Node, up: float) -> list[Effect]:
        self._await_inventory(node, up)
        self.counters["inventories_asked"] += 1
        effects = self._judge(node, up, "must report again")
        return [*effects, Send(node.session, SendInventory())] if node.session is not None else effects

    def _begin_chunk(self, node: Node, message: Inventory, up: float) -> bool:
        """Claim a chunk of an inventory; returns False for one that is not the next."""
        if message.chunk == 0:
            if not node.awaiting and message.sequence <= node.sequence:
                return False  # a duplicate of one that is done
            self._await_inventory(node, up)
            if node.pending:
                self._retire(node.pending, Why.NOT_REPORTED)
            node.pending = self._new_incarnation(node)
            node.pending_sequence = message.sequence
        elif not node.awaiting or message.chunk != node.next_chunk or message.sequence != node.pending_sequence:
            return False  # a chunk was lost or came twice: the tick asks again if nothing more arrives
        node.next_chunk, node.asked_at = message.chunk + 1, up
        return True

    def _inventory(
        self, session: int, node: Node, message: Inventory, incarnation: int, up: float
    ) -> Iterator[list[Effect]]:
        for piece in slices_of(message.added):
            if node.pending != incarnation or self._sessions.get(session) is not node:
                return
            if (added := self._add(piece, incarnation)) is None:
                node.next_chunk = -1  # what would make it known was lost: the tick asks again
                return
            yield added
        if not message.last or node.pending != incarnation:
            return
        if node.incarnation:
            self._retire(node.incarnation, Why.NOT_REPORTED)
        node.incarnation, node.pending, node.awaiting, node.applying = incarnation, 0, False, False
        node.sequence = node.pending_sequence
        node.heard_sequence = max(node.heard_sequence, node.sequence)
        node.victims_stale = True
        yield [Send(session, Ack(node.sequence)), *self._judge(node, up, "inventory complete")]

    def _delta(
        self, session: int, node: Node, delta: Delta, up: float, effects: list[Effect]
    ) -> Iterator[list[Effect]]:
        effects = effects + self._learn(delta.namespaces)
        node.heard_sequence = max(node.heard_sequence, delta.sequence)
        if node.awaiting or delta.sequence <= node.sequence:
            yield effects
            return
        if delta.sequence != node.sequence + 1:
            yield effects + self._ask_inventory(node, up)
            return
        # Claimed before the first slice: whatever comes between two slices must see it as applied.
        node.sequence, node.applying = delta.sequence, True
        node.used_bytes = delta.used_bytes
        node.evict_done = max(node.evict_done, delta.evictions_done)
        incarnation = node.incarnation
        yield effects
        for piece in slices_of(delta.removed):
            if node.incarnation != incarnation:
                return
            if piece.backend:
                yield self.backends.remove(piece, self._last_now)
                continue
            rows, broken = self.index.remove(piece, incarnation, TIER)
            self._note_removed(node, piece, rows)
            self.counters["blocks_removed"] += len(piece)
            node.victims_stale = True
            yield self._drop_rest(broken)
        for piece in slices_of(delta.added):
            if node.incarnation != incarnation:
                return
            if (added := self._add(piece, incarnation)) is None:
                yield self._ask_inventory(node, up)
                return
            yield added
        node.applying = False
        yield [Send(session, Ack(delta.sequence)), *self._relieve(node, up)]

    def _note_removed(self, node: Node, piece: BlockRun, rows: Rows) -> None:
        if len(rows):
            why = self.index.asked.take(rows) if piece.commanded else int(Why.ROOM)
            keys = self.index.keys.take(rows, axis=0)
            number = self.index.spaces[piece.namespace].number
            self.removals.push(keys, number, why, node.address.node_id, self._last_now)

    def _add(self, piece: BlockRun, incarnation: int) -> list[Effect] | None:
        """Add blocks or files; returns None if their namespace is not known, so that the node must say it again."""
        if not self.usable(piece):
            space = self.index.spaces.get(piece.namespace)
            told = (space is not None and space.descriptor is not None) or len(self.index.spaces) >= NAMESPACES_MAX
            return [] if told else None  # if it is full, nothing could make it known
        if piece.backend:
            return self.backends.add(piece, self._incarnations[incarnation].address.node_id)
        self.index.add(piece, incarnation, TIER)
        self.counters["blocks_added"] += len(piece)
        return []

    def usable(self, piece: BlockRun) -> bool:
        """Return whether blocks can be taken in: of a namespace that is known, with shards that it has."""
        space = self.index.spaces.get(piece.namespace)
        if space is None or space.descriptor is None:
            self.counters["blocks_of_unknown_namespace"] += len(piece)
            return False
        if piece.shards & ~space.full or not piece.shards:
            self.counters["blocks_with_bad_shards"] += len(piece)
            return False
        return True

    def _closed(self, session: int, up: float) -> list[Effect]:
        node = self._sessions.pop(session, None)
        if node is None or node.session != session:
            return []
        node.session = None
        return self._judge(node, up, "connection lost")

    # ---- liveness ------------------------------------------------------------------------------

    def _judge(self, node: Node, up: float, why: str) -> list[Effect]:
        """Bring a node's state, and what lookups may count on, in line with what is known of it."""
        silent = up - node.last_seen
        before = node.state
        if silent > self.limits.client_ttl_s:
            node.state = "dead"
            self._drop(node, Why.NODE_LOST)
        elif node.session is None or silent > SUSPECT_AFTER_S:
            node.state = "suspect"
        else:
            node.state = "warming" if node.awaiting else "live"
        present = node.state in {"live", "warming"}
        if node.incarnation:
            self.index.placements.set_live(node.incarnation, live=present and not node.awaiting)
        if node.pending:
            self.index.placements.set_live(node.pending, live=present)
        if node.state == before:
            return []
        self.backends.judge(node)
        return [NodeChanged(node.address.node_id, node.state, why)]

    def _number(self) -> int:
        self._next_incarnation += 1
        return self._next_incarnation - 1

    def _new_incarnation(self, node: Node) -> int:
        number = self._number()
        self._incarnations[number] = node
        return number

    def _retire(self, incarnation: int, why: Why) -> None:
        """Take an incarnation out of every lookup now, out of the rows in slices."""
        self.index.placements.set_live(incarnation, live=False)
        self._dropped[incarnation] = Retired(self._incarnations.pop(incarnation), why, self._last_now)
        if not self._sweeping:
            self._sweeping = True
            self._jobs.append(self._sweep())

    def _drop(self, node: Node, why: Why) -> None:
        for incarnation in (node.incarnation, node.pending):
            if incarnation:
                self._retire(incarnation, why)
        node.incarnation = node.pending = 0
        node.applying = False
        self._await_inventory(node, node.last_seen)

    def _sweep(self) -> Iterator[list[Effect]]:
        while self._dropped:
            batch, self._dropped = self._dropped, {}
            position = 0
            while position < self.index.rows_used:
                position, broken, lost = self.index.drop_slice(batch.keys(), position)
                for incarnation, space, rows in lost:
                    self._note_lost(batch[incarnation], space, rows)
                yield self._drop_rest(broken)
            for incarnation in batch:
                self.index.placements.purge(incarnation)
                self.index.blocks_on.pop(incarnation, None)
        self._sweeping = False

    def _note_lost(self, retired: Retired, space: int, rows: Rows) -> None:
        node = retired.node
        if retired.why is Why.NOT_REPORTED:  # what the node's newer inventory has is not lost
            for newer in (node.incarnation, node.pending):
                rows = rows[~self.index.placements.held_by(newer).take(self.index.placement.take(rows))]
        keys = self.index.keys.take(rows, axis=0)
        self.removals.push(keys, space, int(retired.why), node.address.node_id, retired.at)

    def _drop_rest(self, broken: Rows) -> list[Effect]:
        """Ask the other owners of blocks that are whole no more to drop what they have."""
        effects: list[Effect] = []
        if len(broken):
            for incarnation in self.index.owners(broken):
                effects += self._evict(incarnation, broken, Why.INCOMPLETE)
        return effects

    def _tick(self, up: float) -> list[Effect]:
        effects: list[Effect] = []
        self.leases.expire(up, at_most=EXPIRED_BLOCKS)
        self.residency.expire(up)
        self.engines.expire(up)
        self._jobs.extend(self.pins.expire(self._last_now))
        self.ages.note(self.index.recency.clock, self._last_now)
        for node_id, node in list(self.nodes.items()):
            effects += self._judge(node, up, "silent")
            if node.state == "dead":
                if up - node.last_seen > FORGET_DEAD_S:
                    del self.nodes[node_id]
                    self.backends.forget(node)
                    if node.session is not None:
                        del self._sessions[node.session]
                        effects.append(Close(node.session, "silent for too long"))
                continue
            lost_tail = not node.awaiting and node.heard_sequence > node.sequence
            unheard = node.session is None or up - node.last_seen > SUSPECT_AFTER_S
            if (node.awaiting or lost_tail) and not unheard and up - node.asked_at > INVENTORY_RETRY_S:
                effects += self._ask_inventory(node, up)
            effects += self._relieve(node, up)
            self._refresh_victims(node, up)
        effects += self.backends.tick(up, self._last_now)
        effects += self.transfers.tick(up)
        self._row_relief.tick(self._last_now)
        self._placement_relief.tick()
        if not self._tidying and self.index.moving():
            self._tidying = True
            self._jobs.append(self._tidy())
        return effects

    def _tidy(self) -> Iterator[list[Effect]]:
        """Finish the growth of tables in which nothing more is inserted: until then look-ups cost more."""
        for table in self.index.moving():
            while table.moving:
                table.move()
                yield []
        self._tidying = False

    # ---- eviction ------------------------------------------------------------------------------

    def _relieve(self, node: Node, up: float) -> list[Effect]:
        """Start an eviction if the node is over its high watermark."""
        over = node.used_bytes - self.limits.eviction_high_watermark_ratio * node.capacity_bytes
        if over <= 0 or node.job or node.state != "live":
            return []
        if node.evict_done < node.evict_sent and up - node.evict_at < EVICT_RETRY_S:
            return []
        node.job, node.evict_at = True, up
        target = max(over, self.limits.eviction_ratio * node.capacity_bytes)
        self._jobs.append(self._eviction(node, node.incarnation, int(target), int(over)))
        return []

    def _eviction(self, node: Node, incarnation: int, target: int, least: int) -> Iterator[list[Effect]]:
        try:
            for rows, leased in slices_for_eviction(self.index, incarnation, target, least):
                if leased:
                    self.counters["leased_blocks_evicted"] += len(rows)
                yield self._evict(incarnation, rows, Why.WATERMARK)
        finally:
            node.job = False
            node.victims_stale = True

    def _evict(self, incarnation: int, rows: Rows, why: Why) -> list[Effect]:
        if self.backends.at(incarnation) is not None:
            return self.backends.doom(incarnation, rows, why, self._last_now)
        node = self._incarnations.get(incarnation)
        if node is None or node.session is None or not len(rows):
            return []
        self.index.asked[rows] = why
        effects: list[Effect] = []
        for start in range(0, len(rows), EVICT_BLOCKS_MAX):
            for blocks in bounded(self.index.runs_on(rows[start : start + EVICT_BLOCKS_MAX], incarnation)):
                number = self._next_evict
                self._next_evict += 1
                node.evict_sent = number
                effects.append(Send(node.session, Evict(number, blocks)))
        self.counters["blocks_asked_to_evict"] += len(rows)
        return effects

    def _refresh_victims(self, node: Node, up: float) -> None:
        """Start a new victim list if the node may need one and the old one is not good any more."""
        if node.state != "live" or node.job or node.used_bytes < VICTIMS_FROM_USE * node.capacity_bytes:
            return
        if node.victims_stale or up - node.victims_at > VICTIMS_EVERY_S:
            node.job, node.victims_at, node.victims_stale = True, up, False
            self._jobs.append(self._victims(node, node.incarnation))

    def _victims(self, node: Node, incarnation: int) -> Iterator[list[Effect]]:
        try:
            rows = yield from pick_victims(self.index, incarnation, int(VICTIMS_SHARE * node.capacity_bytes))
            if node.incarnation != incarnation or node.session is None:
                return
            self.index.listed[node.listed] = False
            self.index.listed[rows] = True
            node.listed = rows
            yield [Send(node.session, Victims(tuple(self.index.runs_on(rows, incarnation))))]
        finally:
            node.job = False

    @property
    def evictions_asked(self) -> int:
        """How many Evict messages were sent."""
        return self._next_evict - 1

    @property
    def busy(self) -> bool:
        """Whether ``work`` has something to do."""
        return bool(self._jobs)

    def work(self) -> list[Effect]:
        """Do one slice of the long work, in turns."""
        if not self._jobs:
            return []
        job = self._jobs.popleft()
        effects = next(job, None)
        if effects is None:
            return []
        self._jobs.append(job)
        return effects

    def finish_work(self) -> list[Effect]:
        """Do all the long work at once."""
        effects: list[Effect] = []
        while self._jobs:
            effects += self.work()
        return effects

    # ---- clients -------------------------------------------------------------------------------

    def register(self, namespace: Namespace) -> list[Effect]:
        """Make a namespace known; idempotent. Raises OverloadedError."""
        space = self.index.spaces.get(namespace.digest)
        if space is not None and space.descriptor is not None:
            return []
        if len(self.index.spaces) >= NAMESPACES_MAX:
            raise OverloadedError(f"the master knows {NAMESPACES_MAX} namespaces already")
        self.index.describe(namespace)
        return [Remember(namespace)]

    def tell_catalog(self) -> list[Effect]:
        """Say again what a catalog should keep, because it has lost it."""
        spaces = self.index.spaces.values()
        effects: list[Effect] = [Remember(space.descriptor) for space in spaces if space.descriptor is not None]
        self._jobs.extend(self.pins.tell_again())
        return effects + self.backends.tell_again()

    def announce(self, namespace: Namespace, now: float) -> tuple[str, list[Effect]]:
        """Make an engine's namespace known; returns a warning if others hash differently. Raises OverloadedError."""
        effects = self.register(namespace)
        space = self.index.spaces[namespace.digest]
        space.announced = now
        return warning(space, disagreeing(space, now)), effects

    def lookup(self, query: Query) -> Answer:
        """Answer a query; the caller sends the answer, then calls ``settle`` before anything else.

        Raises InvalidArgumentError.
        """
        check(query)
        answer = longest_prefix(self.index, query, warming=self.warming)
        if query.lease and len(answer.hit_rows):
            answer.lease = self.leases.next_token(len(answer.hit_rows))
        return answer

    def settle(self, answer: Answer, now: float) -> None:
        """Touch and lease what was answered: coldest is the tail of the chain."""
        rows = answer.hit_rows
        distinct = self.index.recency.touch(rows[::-1])
        if len(answer.known_rows):
            self.index.recency.touch(answer.known_rows[::-1])
        counters = self.counters
        counters["lookups"] += 1
        counters["lookup_hit_blocks"] += len(rows)
        for blocks, placement in answer.runs:
            if not self._in_memory(placement):
                counters["lookup_hit_blocks_fs"] += blocks
        if answer.reason is not Reason.COMPLETE:
            counters[f"lookup_end_{answer.reason.value}"] += 1
        if answer.lease:
            up = self.uptime(now)
            self.leases.take(answer.lease, rows if distinct else np.unique(rows), up)
            self._unlist(rows)

    def _in_memory(self, placement: Placement) -> bool:
        live = 0
        for owner in placement.owners:
            if owner.tier == TIER and self.index.placements.is_live(owner.incarnation):
                live |= owner.shards
        return live == placement.full

    def _unlist(self, rows: Rows) -> None:
        """Make new victim lists soon where these blocks, leased or held now, are on one."""
        listed = rows[self.index.listed.take(rows)]
        for incarnation in self.index.owners(listed) if len(listed) else ():
            if incarnation in self._incarnations:
                self._incarnations[incarnation].victims_stale = True

    def renew(self, tokens: list[int], now: float) -> list[int]:
        """Renew leases; returns the unknown tokens."""
        return self.leases.renew(tokens, self.uptime(now))

    def release(self, tokens: list[int]) -> list[int]:
        """Release leases; returns the unknown tokens."""
        return self.leases.release(tokens)

    def place(self, size: int) -> Node | None:
        """Name a live node for a client that has none: in turns, so that an empty one does not draw all."""
        nodes = [n for n in self.nodes.values() if n.state in {"live", "warming"} and n.capacity_bytes >= size]
        if not nodes:
            return None
        self._place_turn += 1
        return nodes[self._place_turn % len(nodes)]

    def reach(self, incarnation: int) -> tuple[NodeAddress, bytes] | None:
        """Return where an incarnation's bytes are reached now, and of a storage backend its id; None if nowhere."""
        node = self.node_of(incarnation)
        return (node.address, b"") if node is not None else self.backends.reach(incarnation)

    def node_of(self, incarnation: int) -> Node | None:
        """Return the node of an incarnation that lookups count on, None for others."""
        return self._incarnations.get(incarnation) if self.index.placements.is_live(incarnation) else None

    def owner_of(self, incarnation: int) -> Node | None:
        """Return the node of an incarnation, None for one that is over."""
        return self._incarnations.get(incarnation)
