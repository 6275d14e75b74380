"""A master with nodes that say what a test tells them to."""

from __future__ import annotations

from hashlib import blake2b

from kvpool.core.effects import Close, Closed, NodeChanged, Received, Send, Tick
from kvpool.core.lookup import Group, Query
from kvpool.core.master import MasterLimits, MasterState
from kvpool.core.messages import BlockRun, Evict, Heartbeat, Hello, Inventory
from kvpool.model import Namespace, NodeAddress, split_keys
from kvpool.testing.clock import ManualClock

ONE = Namespace(model="one")
TWO = Namespace(model="two", layers=2, layer_groups=2)
SIZE = 100
LIMITS = MasterLimits(eviction_high_watermark_ratio=0.9, eviction_ratio=0.1, lease_ttl_s=10, client_ttl_s=10)


def key(number: int) -> bytes:
    return blake2b(number.to_bytes(8), digest_size=16).digest()


def keys(*numbers: int) -> bytes:
    return b"".join(key(n) for n in numbers)


def run(*numbers: int, namespace: Namespace = ONE, shards: int = 0) -> BlockRun:
    return BlockRun(namespace.digest, shards or (1 << namespace.shards) - 1, SIZE, keys(*numbers))


class Pool:
    """The master, and what it has sent, closed and wanted to be kept."""

    def __init__(self, limits: MasterLimits = LIMITS, epoch: int = 77) -> None:
        self.clock = ManualClock(100.0)
        self.master = MasterState(limits, epoch, self.clock())
        self.sent: list[tuple[int, object]] = []
        self.closed: list[int] = []
        self.changes: list[tuple[str, str]] = []
        self.kept: list[object] = []  # everything else that the master wants done

    def perform(self, effects) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.sent.append((effect.session, effect.message))
            elif isinstance(effect, Close):
                self.closed.append(effect.session)
            elif isinstance(effect, NodeChanged):
                self.changes.append((effect.node_id, effect.state))
            else:
                self.kept.append(effect)

    def say(self, session: int, *messages) -> None:
        for message in messages:
            self.perform(self.master.handle(Received(session, message), self.clock()))

    def hello(self, session: int, node: str = "a", epoch: int = 1, **about) -> None:
        about = {"capacity_bytes": 1000, "used_bytes": 0, "sequence": 0, "namespaces": (ONE, TWO), **about}
        self.say(session, Hello(NodeAddress(node), epoch, **about))

    def join(self, session: int, node: str = "a", *runs: BlockRun, epoch: int = 1, **about) -> None:
        """Hello and an inventory in one chunk."""
        self.hello(session, node, epoch, **about)
        self.say(session, Inventory(about.get("sequence", 0), 0, last=True, added=runs))

    def pass_time(self, seconds: float, *beating: int, sequence: int = 0, used: int = 0) -> None:
        """Let time pass in ticks; these sessions send heartbeats."""
        for _ in range(round(seconds * 10)):
            self.clock.advance(0.1)
            self.say_beats(beating, sequence, used)
            self.perform(self.master.handle(Tick(), self.clock()))
            self.work()

    def say_beats(self, sessions: tuple[int, ...], sequence: int, used: int) -> None:
        for session in sessions:
            self.say(session, Heartbeat(used, sequence))

    def work(self) -> None:
        self.perform(self.master.finish_work())

    def close(self, session: int) -> None:
        self.perform(self.master.handle(Closed(session), self.clock()))

    def lookup(self, *numbers: int, namespace: Namespace = ONE, lease: bool = False, known: int = 0):
        answer = self.master.lookup(Query((Group(namespace.digest),), keys(*numbers), known, lease))
        self.master.settle(answer, self.clock())
        return answer

    def prefix(self, *numbers: int, namespace: Namespace = ONE) -> int:
        return self.lookup(*numbers, namespace=namespace).prefix

    def told(self, session: int, kind: type) -> list:
        return [message for to, message in self.sent if to == session and isinstance(message, kind)]

    def evicted(self, session: int) -> list[bytes]:
        return [k for evict in self.told(session, Evict) for r in evict.blocks for k in split_keys(r.keys)]

    def state(self, node: str = "a") -> str:
        return self.master.nodes[node].state
