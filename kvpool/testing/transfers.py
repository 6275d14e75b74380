"""Engines of a simulated cluster that hand prompts on: producers and consumers, each of which may die at any time.

What they do is what a connector does: open, store, renew, seal; claim, read, renew, end. The master may be another
one each time, which knows nothing of what was said before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpool.core.keytable import as_words
from kvpool.core.transfers import Part, State
from kvpool.errors import UnknownNamespaceError
from kvpool.model import KEY_BYTES, Namespace, split_keys

if TYPE_CHECKING:
    from kvpool.core.master import MasterState
    from kvpool.testing.cluster import Cluster, NodeProcess
    from kvpool.testing.workload import Workload

SEAL_MS = 4000
STEPS_MAX = 12
DIES = 0.04
DOZES = 0.04


@dataclass(slots=True)
class Prompt:
    """A prompt on its way: full blocks that others may share, and a last one of its own."""

    transfer: int
    namespace: Namespace
    shard_bytes: int
    keys: bytes
    node_id: str
    stored: int = 0  # blocks whose put has begun
    steps: int = 0  # of its consumer


class TransferWorkload:
    """All engines that hand on prompts, or take them."""

    def __init__(self, cluster: Cluster, workload: Workload) -> None:
        self.engines = 0
        """At work now."""
        self._cluster = cluster
        self._workload = workload
        self._random = cluster.random
        self._prompts: list[Prompt] = []
        self._opened_at: dict[int, MasterState] = {}

    def begin(self) -> None:
        """Let a producer begin with a prompt, and its consumer at about the same time."""
        if not self._cluster.nodes:
            return
        namespace, shard_bytes = self._workload.namespace()
        node = self._random.choice(self._cluster.nodes)
        keys = self._workload.keys() + self._random.randbytes(KEY_BYTES)
        prompt = Prompt(self._random.getrandbits(64) | 1, namespace, shard_bytes, keys, node.node_id)
        self._prompts.append(prompt)
        self._start(self._produce, prompt)
        self._start(self._consume, prompt)

    def _start(self, step: object, prompt: Prompt) -> None:
        self.engines += 1
        self._later(step, prompt)

    def _later(self, step: object, prompt: Prompt) -> None:
        """Go on soon, or too late for what should have been renewed meanwhile; or die."""
        if self._random.random() < DIES:
            self._cluster.note("an engine dies", prompt.transfer)
            self.engines -= 1
            return
        delay = 5 if self._random.random() < DOZES else 0.5
        assert callable(step)
        self._cluster.after(delay * self._random.random(), None, step, prompt)

    def _master(self) -> MasterState | None:
        master = self._cluster.master
        return None if master.gone or master.stalled_until > self._cluster.clock() else master.state

    def _node(self, prompt: Prompt) -> NodeProcess | None:
        nodes = [node for node in self._cluster.nodes if node.node_id == prompt.node_id]
        return nodes[0] if nodes and nodes[0].stalled_until <= self._cluster.clock() else None

    # ---- producers -----------------------------------------------------------------------------

    def _produce(self, prompt: Prompt) -> None:
        """Renew or open; store some blocks; at the end seal, or give up."""
        master, node = self._master(), self._node(prompt)
        if master is not None and not self._renewed(master, prompt):
            self._open(master, prompt)
        keys = split_keys(prompt.keys)
        if node is not None:
            some = b"".join(keys[prompt.stored : prompt.stored + self._random.randint(1, 4)])
            shards = tuple(range(prompt.namespace.shards))
            self._workload.put(node, prompt.namespace, prompt.shard_bytes, some, shards)
            prompt.stored += len(some) // KEY_BYTES
        if prompt.stored < len(keys):
            self._later(self._produce, prompt)
            return
        self.engines -= 1
        if master is not None:
            up = master.uptime(self._cluster.clock())
            if self._random.random() < 0.1:
                self._end(master, prompt)
            else:
                master.transfers.seal(prompt.transfer, SEAL_MS, up)

    def _renewed(self, master: MasterState, prompt: Prompt) -> bool:
        return not master.transfers.renew([prompt.transfer], [], master.uptime(self._cluster.clock()))

    def _open(self, master: MasterState, prompt: Prompt) -> None:
        up = master.uptime(self._cluster.clock())
        part = Part(prompt.namespace.digest, prompt.keys, 1)
        try:
            master.transfers.open(prompt.transfer, [part], [prompt.node_id], "", up)
        except UnknownNamespaceError:
            return
        self._opened_at[prompt.transfer] = master
        self._cluster.note("is opened", prompt.transfer)
        self._cluster.perform([])

    def _end(self, master: MasterState, prompt: Prompt) -> None:
        master.transfers.end([prompt.transfer], master.uptime(self._cluster.clock()))
        self._cluster.note("is ended", prompt.transfer)
        self._cluster.perform([])

    # ---- consumers -----------------------------------------------------------------------------

    def _consume(self, prompt: Prompt) -> None:
        """Claim and read until it is sealed, then end it; or give up."""
        master, node = self._master(), self._node(prompt)
        prompt.steps += 1
        if node is not None:
            self._workload.read(node, prompt.namespace, prompt.keys)
        done = prompt.steps > STEPS_MAX
        if master is not None:
            up = master.uptime(self._cluster.clock())
            claimed = master.transfers.claim(prompt.transfer, "", up)
            if claimed.state in {State.OPEN, State.SEALED}:
                assert claimed.namespaces == (prompt.namespace.digest,), "a consumer learns what it may load"
                assert all(node is None or node.node_id == prompt.node_id for node in claimed.nodes)
            done = done or claimed.state is State.ENDED
            if done or (claimed.state is State.SEALED and self._random.random() < 0.5):
                self._end(master, prompt)
                done = True
        if done:
            self.engines -= 1
        else:
            self._later(self._consume, prompt)

    # ---- the end -------------------------------------------------------------------------------

    def problems(self, state: MasterState) -> list[str]:
        """Return, for people, what is left of transfers when all engines are done."""
        problems = [f"{left} transfers are left" for left in [len(state.transfers.by_id)] if left]
        problems += [f"{left} blocks are held for transfers" for left in [state.transfers.blocks] if left]
        pinned = {(pin.namespace, key) for pin in state.pins.by_id.values() for key in split_keys(bytes(pin.keys))}
        if len(state.index.holds) != len(pinned):
            problems.append(f"{len(state.index.holds)} keys are held, not {len(pinned)}")
        for prompt in self._prompts:
            if self._opened_at.get(prompt.transfer) is state:  # earlier masters took what they knew with them
                table = state.index.space(prompt.namespace.digest).table
                if table.find(as_words(prompt.keys[-KEY_BYTES:]))[0] >= 0:
                    problems.append(f"the last block of transfer {prompt.transfer} is left")
        return problems
