"""A cluster in one process: the real state machines on a simulated clock, network, memory and clients.

Everything follows from one seed: ``Cluster(seed).run(steps)`` then ``settle()``. Processes crash, stand
still and come twice; messages are late, lost, doubled and overtaken; the master forgets everything.
Meanwhile clients check every byte they read. One seed again, with what happened:
``python -m kvpool.testing.cluster SEED``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

from kvpool.core.effects import Close, Closed, Effect, Received, Send, Tick
from kvpool.core.filetier import FileTierState
from kvpool.core.master import MasterLimits, MasterState
from kvpool.core.messages import Ack, Evict, MasterMessage, NodeMessage, Superseded
from kvpool.core.reporter import Reporter
from kvpool.core.segment import SegmentState
from kvpool.model import Backend, NodeAddress
from kvpool.testing.checks import check_master, differences, held_by_index, held_by_nodes
from kvpool.testing.clock import ManualClock
from kvpool.testing.files import SharedFiles, SimulatedCatalog, told
from kvpool.testing.slices import small_slices
from kvpool.testing.workload import UNIT, Workload

LIMITS = MasterLimits(lease_ttl_s=2.0, client_ttl_s=3.0, blocks_max=4096)
SEGMENT_BYTES = 96 * UNIT
TICK_S = 0.1
HEARTBEAT_S = 0.2
FLUSH_S = 0.01
SLICE_S = 0.002
CATALOG_S = 0.02
WELCOME_S = 2.0
SETTLE_S = 30.0
EVENTS_KEPT = 4000


class Weather(NamedTuple):
    """What the network does to a message (chances, a typical delay), and how long the master takes for a slice."""

    drop: float
    double: float
    overtake: float
    delay_s: float
    slice_s: float


CALM = Weather(0, 0, 0, 0.001, 0.001)
WEATHERS = (
    CALM,
    Weather(0, 0, 0, 0.05, 0.02),
    Weather(0.02, 0.05, 0.1, 0.005, 0.01),
    Weather(0.3, 0.2, 0.3, 0.02, 0.001),
)


class Process:
    """Something that runs, stands still, or is gone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gone = False
        self.stalled_until = 0.0

    def stand_still(self, until: float) -> None:
        """Do nothing until then, or longer if it does so already: what waits keeps its order."""
        self.stalled_until = max(self.stalled_until, until)


class MasterProcess(Process):
    """A master: its state, and what a server keeps around it."""

    def __init__(self, name: str, state: MasterState) -> None:
        super().__init__(name)
        self.state = state
        self.sessions: dict[int, Session] = {}
        self.pumping = self.working = self.keeping = False


class NodeProcess(Process):
    """A node: its state machines, and its memory as one entry for each unit of the segment."""

    def __init__(self, name: str, node_id: str, epoch: int, backend: Backend) -> None:
        super().__init__(name)
        self.node_id = node_id
        self.segment = SegmentState(SEGMENT_BYTES)
        self.tier = FileTierState(self.segment, [backend], queue_bytes_max=SEGMENT_BYTES)
        self.reporter = Reporter(self.segment, NodeAddress(node_id), epoch, self.tier)
        self.storing = False
        self.session: Session | None = None
        self.flush_due = False
        self.report_due = False
        self.memory: dict[int, object] = {}
        self.holding = 0  # reservations and pins of clients


@dataclass(slots=True)
class Session:
    """A stream between a node process and a master process; each end closes on its own."""

    number: int
    node: NodeProcess
    master: MasterProcess
    open_at_node: bool = True
    open_at_master: bool = True
    inbox: deque[NodeMessage] = field(default_factory=deque)
    ingest: Iterator[list[Effect]] | None = None
    last_to_master: float = 0.0
    last_to_node: float = 0.0


class Cluster:
    """A master, nodes and clients. ``random`` decides everything that is not decided by the state machines."""

    def __init__(self, seed: int, nodes: int = 3, limits: MasterLimits = LIMITS) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.clock = ManualClock(1000.0)
        self.limits = limits
        self.weather = CALM
        self.happened: deque[tuple[float, str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._events: list[tuple[float, int, Process | None, Callable[..., object], tuple[Any, ...]]] = []
        self._counter = count(1)
        self.storage = SharedFiles(self)
        self.catalog = SimulatedCatalog()
        self.nodes: list[NodeProcess] = []
        self.master = self._new_master()
        self.workload = Workload(self)
        for i in range(nodes):
            self.start_node(f"n{i}")

    # ---- time ----------------------------------------------------------------------------------

    def after(self, delay_s: float, process: Process | None, action: Callable[..., object], *args: Any) -> None:
        """Call ``action`` later, if its process is still there; while it stands still, when it goes on."""
        heappush(self._events, (self.clock() + delay_s, next(self._counter), process, action, args))

    def note(self, what: str, about: Any = "") -> None:
        """Remember what happened, for whoever looks at a failure."""
        self.happened.append((self.clock(), what, about))

    def advance(self, seconds: float) -> None:
        """Let time pass and everything happen that is due."""
        end = self.clock() + seconds
        events = self._events
        while events and events[0][0] <= end:
            at, _, process, action, args = heappop(events)
            if process is not None:
                if process.gone:
                    continue
                if process.stalled_until > at:
                    heappush(events, (process.stalled_until, next(self._counter), process, action, args))
                    continue
            self.clock.move_to(at)
            action(*args)
        self.clock.move_to(end)

    # ---- the master ----------------------------------------------------------------------------

    def _new_master(self) -> MasterProcess:
        epoch = self.random.getrandbits(63) | 1
        master = MasterProcess(f"master {epoch % 1000}", MasterState(self.limits, epoch, self.clock()))
        self.catalog.load(master.state)
        self._perform(master, [])
        self.after(TICK_S, master, self._tick, master)
        return master

    def restart_master(self, down_s: float, catalog: SimulatedCatalog | None = None) -> None:
        """Kill the master; a new one, which knows what ``catalog`` has, starts a little later.

        Without one that is the old master's, if it is not lost.
        """
        old = self.master
        self.catalog.waiting.clear()
        if catalog is not None:
            self.catalog = catalog
        elif self.random.random() < 0.2:
            self.note("the catalog is lost")
            self.catalog = SimulatedCatalog()
        old.gone = True
        self.storage.master_died(old.state)
        self.note("master dies")
        for session in old.sessions.values():
            self._end_at_node_soon(session)
        self.after(down_s, None, self._replace_master, old)

    def _replace_master(self, old: MasterProcess) -> None:
        if self.master is old:
            self.master = self._new_master()

    def _tick(self, master: MasterProcess) -> None:
        self._perform(master, master.state.handle(Tick(), self.clock()))
        self.after(TICK_S, master, self._tick, master)

    def _arrive_at_master(self, session: Session, message: NodeMessage) -> None:
        if session.open_at_master:
            session.inbox.append(message)
            self._pump_soon(session.master)

    def _pump_soon(self, master: MasterProcess) -> None:
        if not master.pumping:
            master.pumping = True
            self.after(self.random.random() * self.weather.slice_s, master, self._pump, master)

    def _pump(self, master: MasterProcess) -> None:
        """One slice of one session's event, as a server with a task for each session would do it."""
        master.pumping = False
        ready = [s for s in master.sessions.values() if s.open_at_master and (s.ingest is not None or s.inbox)]
        if not ready:
            return
        session = self.random.choice(ready)
        if session.ingest is None:
            message = session.inbox.popleft()
            self.note("master takes", (session.number, message))
            session.ingest = master.state.ingest(Received(session.number, message), self.clock())
        effects = next(session.ingest, None)
        if effects is None:
            session.ingest = None
        else:
            self._perform(master, effects)
        self._pump_soon(master)

    def _work(self, master: MasterProcess) -> None:
        master.working = False
        self._perform(master, master.state.work())

    def _perform(self, master: MasterProcess, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, Ack) and self.catalog.waiting:
                self.catalog.waiting.append(effect)
            elif isinstance(effect, Send):
                self._send_to_node(master.sessions.get(effect.session), self.storage.sent(effect.message))
            elif isinstance(effect, Close):
                session = master.sessions.get(effect.session)
                if session is not None and session.open_at_master:
                    self._end_at_master(session)
                    self._end_at_node_soon(session)
            else:
                self.note("master", effect)
                if master is self.master:
                    self.catalog.waiting.append(effect)
        if self.catalog.waiting and not master.keeping:
            master.keeping = True
            self.after(CATALOG_S * self.random.random(), master, self._keep, master)
        if master.state.busy and not master.working:
            master.working = True
            self.after(self.random.random() * self.weather.slice_s, master, self._work, master)

    def _keep(self, master: MasterProcess) -> None:
        """Write to the catalog what has waited for it, and send what has waited for that."""
        master.keeping = False
        waiting, self.catalog.waiting = self.catalog.waiting, deque()
        for effect in waiting:
            if isinstance(effect, Send):
                self._send_to_node(master.sessions.get(effect.session), self.storage.sent(effect.message))
            else:
                self.catalog.write(effect)

    def perform(self, effects: list[Effect]) -> None:
        """Do what the running master decided on a client's behalf."""
        self._perform(self.master, effects)

    # ---- sessions and the network --------------------------------------------------------------

    def _connect(self, node: NodeProcess) -> None:
        if node.session is not None:
            return
        if self.master.gone:
            self.after(0.1, node, self._connect, node)
            return
        session = Session(next(self._counter), node, self.master)
        self.master.sessions[session.number] = node.session = session
        self._send_to_master(node, node.reporter.connected())
        self.after(WELCOME_S, node, self._welcomed_by_now, session)

    def _welcomed_by_now(self, session: Session) -> None:
        if session.open_at_node and not session.node.reporter.welcomed:
            self.break_session(session)

    def break_session(self, session: Session) -> None:
        """Cut a stream: each end learns of it in its own time."""
        self._end_at_node_soon(session)
        self.after(self._delay(), session.master, self._end_at_master, session)

    def _end_at_node_soon(self, session: Session) -> None:
        self.after(self._delay(), session.node, self._end_at_node, session)

    def _end_at_node(self, session: Session) -> None:
        if session.open_at_node:
            session.open_at_node = False
            session.node.reporter.disconnected()
            session.node.session = None
            self.after(0.05 + 0.2 * self.random.random(), session.node, self._connect, session.node)

    def _end_at_master(self, session: Session) -> None:
        """Tell the state; some of what had arrived is still taken in, some is left unfinished."""
        if not session.open_at_master:
            return
        session.open_at_master = False
        for _ in range(self.random.randrange(3)):
            for effects in session.ingest or ():
                self._perform(session.master, effects)
            if session.inbox:
                session.ingest = session.master.state.ingest(
                    Received(session.number, session.inbox.popleft()), self.clock()
                )
        self.note("master sees the end of", session.number)
        self._perform(session.master, session.master.state.handle(Closed(session.number), self.clock()))

    def _send_to_master(self, node: NodeProcess, messages: list[NodeMessage]) -> None:
        session = node.session
        if session is not None:
            for message in messages:
                for at in self._arrivals(session.last_to_master):
                    session.last_to_master = max(session.last_to_master, at)
                    self.after(at - self.clock(), session.master, self._arrive_at_master, session, message)

    def tell_surely(self, node: NodeProcess, message: NodeMessage) -> None:
        """Send what is neither numbered nor said again: it arrives unless its stream breaks."""
        session = node.session
        if session is not None:
            at = max(self.clock() + self._delay(), session.last_to_master)
            session.last_to_master = at
            self.after(at - self.clock(), session.master, self._arrive_at_master, session, message)

    def _send_to_node(self, session: Session | None, message: MasterMessage) -> None:
        if session is not None and session.open_at_master:
            for at in self._arrivals(session.last_to_node):
                session.last_to_node = max(session.last_to_node, at)
                self.after(at - self.clock(), session.node, self._arrive_at_node, session, message)

    def _delay(self) -> float:
        return self.weather.delay_s * (0.5 + self.random.random())

    def _arrivals(self, last: float) -> Iterator[float]:
        """When a message arrives: never, once or twice; in order unless it is overtaken."""
        chance = self.random.random
        copies = 2 if chance() < self.weather.double else 1
        for _ in range(copies):
            if chance() < self.weather.drop:
                continue
            at = self.clock() + self._delay()
            yield at + chance() if chance() < self.weather.overtake else max(at, last)

    # ---- nodes ---------------------------------------------------------------------------------

    def start_node(self, node_id: str) -> NodeProcess:
        """Start a process; another one of this id may be running."""
        name = f"{node_id}/{next(self._counter)}"
        node = NodeProcess(name, node_id, self.random.getrandbits(63) | 1, self.storage.described)
        self.nodes.append(node)
        self.note("starts", node.name)
        self.after(0, node, self._connect, node)
        self.after(HEARTBEAT_S, node, self._beat, node)
        return node

    def stop_node(self, node: NodeProcess) -> None:
        """End a process at once, with everything that it holds."""
        self.note("ends", node.name)
        node.gone = True
        self.nodes.remove(node)
        if node.session is not None:
            self.after(self._delay(), node.session.master, self._end_at_master, node.session)

    def _arrive_at_node(self, session: Session, message: MasterMessage) -> None:
        node = session.node
        if not session.open_at_node:
            return
        self.note(f"{node.name} takes", message)
        before = told(node)
        self._send_to_master(node, node.reporter.handle(message))
        if isinstance(message, Ack):
            self.storage.note_acknowledged(node, before)
        self.storage.pump(node)
        self._report(node)
        if isinstance(message, Superseded):
            self.stop_node(node)
            return
        if isinstance(message, Evict):
            node.segment.check()
        self.changed(node)

    def _report(self, node: NodeProcess) -> None:
        """Go on with an inventory, a slice now and then."""
        if node.reporter.reporting and not node.report_due:
            node.report_due = True
            self.after(SLICE_S, node, self._report_slice, node)

    def _report_slice(self, node: NodeProcess) -> None:
        node.report_due = False
        self._send_to_master(node, node.reporter.more())
        self._report(node)

    def changed(self, node: NodeProcess) -> None:
        """Let a node report soon."""
        if not node.flush_due:
            node.flush_due = True
            self.after(FLUSH_S, node, self._flush, node)

    def _flush(self, node: NodeProcess) -> None:
        node.flush_due = False
        self._send_to_master(node, node.reporter.flush())
        if node.reporter.behind:
            self.changed(node)
        self.storage.pump(node)

    def _beat(self, node: NodeProcess) -> None:
        if node.reporter.welcomed:
            self._send_to_master(node, [node.reporter.heartbeat()])
        self.storage.pump(node)
        self.after(HEARTBEAT_S, node, self._beat, node)

    # ---- a run ---------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        """Let clients and faults do so many things."""
        for step in range(steps):
            self.advance(0.1 * self.random.random())
            if self.random.random() < 0.12:
                self._fault()
            else:
                self.workload.step()
            if not step % 10:
                check_master(self.master.state)

    def _fault(self) -> None:
        fault = self.random.choice(
            (self._crash, self._cut, self._cut, self._stall_node, self._stall_master, self._new_weather,
             self._new_weather, self._new_weather, self._second_process, self._lose_master,
             self.storage.lose_file, self.storage.lose_file, self.storage.hang)
        )  # fmt: skip
        fault()

    def _crash(self) -> None:
        if self.nodes:
            node = self.random.choice(self.nodes)
            self.stop_node(node)
            self.after(2 * self.random.random(), None, self._start_if_none, node.node_id)

    def _start_if_none(self, node_id: str) -> None:
        if all(node.node_id != node_id for node in self.nodes):
            self.start_node(node_id)

    def _cut(self) -> None:
        sessions = [node.session for node in self.nodes if node.session is not None]
        if sessions:
            self.break_session(self.random.choice(sessions))

    def _stall_node(self) -> None:
        if self.nodes:
            node = self.random.choice(self.nodes)
            node.stand_still(self.clock() + self.random.choice((0.5, 1, 2, 5)))
            self.note("stands still", node.name)

    def _stall_master(self) -> None:
        self.master.stand_still(self.clock() + self.random.choice((0.3, 0.9, 2, 8)))
        self.note("master stands still")

    def _new_weather(self) -> None:
        self.weather = self.random.choice(WEATHERS)
        self.note("weather", self.weather)

    def _second_process(self) -> None:
        if self.nodes:
            self.start_node(self.random.choice(self.nodes).node_id)

    def _lose_master(self) -> None:
        self.restart_master(self.random.random())

    # ---- the end -------------------------------------------------------------------------------

    def settle(self) -> None:
        """Heal everything, let time pass, and raise AssertionError unless master and nodes come to agree."""
        self.weather = CALM
        last = max(process.stalled_until for process in (self.master, *self.nodes))
        self.advance(max(0.0, last - self.clock()))  # ended earlier, they would turn the order of what waits
        deadline = self.clock() + SETTLE_S
        problems = ["not settled yet"]
        while problems and self.clock() < deadline:
            self.advance(0.5)
            problems = self.disagreements()
        check_master(self.master.state)
        assert not problems, "\n".join(problems[:20])

    def disagreements(self) -> list[str]:
        """Return, for people, all in which master and nodes do not agree, or have not come to rest."""
        state = self.master.state
        if self.master.gone or self.workload.busy:
            return ["clients or the master's successor are not done"]
        problems = [f"{leases} leases are left" for leases in [len(state.leases)] if leases]
        problems += ["the master has work left"] if state.busy else []
        running = {node.node_id: node for node in self.nodes}
        problems += ["two processes of one id"] if len(running) < len(self.nodes) else []
        for node_id, known in state.nodes.items():
            node = running.get(node_id)
            if known.state != ("live" if node else "dead"):
                problems.append(f"{node_id} is {known.state}")
            if node and known.used_bytes != node.segment.used_bytes:
                problems.append(f"{node_id} uses {node.segment.used_bytes} bytes, not {known.used_bytes}")
        problems += [f"{node_id} is unknown" for node_id in running if node_id not in state.nodes]
        problems += self.storage.problems(state)
        problems += self.workload.transfers.problems(state)
        real = held_by_nodes((node.node_id, node.segment) for node in self.nodes)
        return problems + differences(held_by_index(state), real)


def simulate(seed: int, steps: int) -> Cluster:
    """Run one seed; returns the cluster, settled. An AssertionError names the seed."""
    with small_slices():
        cluster = Cluster(seed)
        try:
            cluster.run(steps)
            cluster.settle()
        except Exception as exc:  # whatever it is, the seed must be known
            exc.add_note(f"again, with what happened: python -m kvpool.testing.cluster {seed} --steps {steps}")
            exc.add_note("\n".join(f"{at:9.3f} {what} {about}" for at, what, about in list(cluster.happened)[-30:]))
            raise
    return cluster


def main() -> None:
    """Run one seed and write down everything that happened."""
    parser = argparse.ArgumentParser(description="simulate a kvpool cluster")
    parser.add_argument("seed", type=int)
    parser.add_argument("--steps", type=int, default=100)
    chosen = parser.parse_args()
    with small_slices():
        cluster = Cluster(chosen.seed)
        try:
            cluster.run(chosen.steps)
            cluster.settle()
        finally:
            sys.stdout.writelines(f"{at:9.3f} {what} {about}\n" for at, what, about in cluster.happened)


if __name__ == "__main__":
    main()
