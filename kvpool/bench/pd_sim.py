"""Simulated instances under the proxy's own reading of requests and its own choices: no process, no clock, no KV.

An instance has a cache of its own and a node with memory; both forget what was used least recently. A prompt's chunks
that are in neither come from another node, or are computed. One prompt is prefilled at a time, first come first
served, while all others that run there get their tokens. The time is simulated.
"""

from __future__ import annotations

import heapq
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from kvpool.bench.harness import BenchError
from kvpool.bench.pd_results import Asked, Result, Where
from kvpool.bench.pd_workload import Ask
from kvpool.proxy.prompts import COMPLETIONS, read
from kvpool.proxy.routing import (
    CHUNK_TOKENS,
    Held,
    Policy,
    PrefixMemory,
    Prompt,
    Role,
    Router,
    Ticket,
)

PREFILL_TOKENS_S: Final = 8000.0
NEAR: Final = 0.1
"""Of computing a token costs loading it from the own node."""
FAR: Final = 0.2
"""The same from another node."""
STEP_S: Final = 0.02
"""From one token of an answer to the next."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated. Sizes in tokens."""

    instances: int
    hbm_tokens: int
    node_tokens: int
    """Of each instance's node; 0: there is no pool."""


@dataclass(eq=False, slots=True)
class _Engine:
    name: str
    hbm: PrefixMemory
    node: PrefixMemory
    free_at: float = 0.0
    waiting: deque[_Run] = field(default_factory=deque)


@dataclass(eq=False, slots=True)
class _Run:
    ask: Ask
    prompt: Prompt
    start: float
    ticket: Ticket
    first_s: float = 0.0


class Simulation:
    """One run of a workload."""

    def __init__(self, cluster: Cluster, policy: Policy, *, master: bool) -> None:
        """``master``: the proxy is told what lies where, as by a master; else it knows what it has sent where."""
        self._cluster = cluster
        self._master = master
        hbm = max(1, cluster.hbm_tokens // CHUNK_TOKENS)
        node = cluster.node_tokens // CHUNK_TOKENS
        self._router = Router(requests_max=1 << 20, chunks_max=hbm, policy=policy)
        self._engines: dict[str, _Engine] = {}
        for number in range(cluster.instances):
            one = self._router.add(Role.BOTH, f"i{number}")
            self._engines[one.name] = _Engine(one.name, PrefixMemory(hbm), PrefixMemory(node))
        self._events: list[tuple[float, int, str, _Run]] = []
        self._number = count()
        self._asked: list[Asked] = []
        self._hits = dict.fromkeys(Where, 0)

    def run(self, asks: Sequence[Ask], concurrency: int) -> Result:
        """Return what became of the workload. ``concurrency``: of requests that have no time of their own."""
        todo, now, running = list(asks), 0.0, 0
        answered: dict[int, int] = {}
        while todo or self._events:
            ready = [ask for ask in todo if answered.get(ask.session, 0) == ask.turn]
            due = [ask for ask in ready if ask.at is not None and ask.at <= now]
            due += [ask for ask in ready if ask.at is None][: max(0, concurrency - running)]
            for ask in due:
                todo.remove(ask)
                running += 1
                self._begin(ask, now)
            coming = min((ask.at for ask in ready if ask.at is not None and ask.at > now), default=None)
            if not self._events and coming is None:
                if todo and not due:
                    raise BenchError("the workload cannot go on: a turn is missing")
                continue
            if coming is not None and (not self._events or coming < self._events[0][0]):
                now = coming
                continue
            now, _, what, run = heapq.heappop(self._events)
            if what == "first":
                self._first_token(run, now)
            else:
                running -= 1
                answered[run.ask.session] = run.ask.turn + 1
                self._end(run, now)
        return Result(self._asked, now, self._hits)

    def _begin(self, ask: Ask, now: float) -> None:
        body = {"prompt": ask.prompt, "max_tokens": ask.output_tokens}
        prompt = read(COMPLETIONS, json.dumps(body).encode()).prompt
        known = {one.name: self._held(one, prompt) for one in self._engines.values()} if self._master else {}
        ticket = self._router.take(Role.BOTH, prompt, known=known)
        if not isinstance(ticket, Ticket):
            raise BenchError("no simulated instance took a request")
        engine = self._engines[ticket.instance.name]
        engine.waiting.append(_Run(ask, prompt, now, ticket))
        if len(engine.waiting) == 1:
            self._prefill(engine, now)

    def _prefill(self, engine: _Engine, now: float) -> None:
        """Begin with the prompt that waits there for longest."""
        run = engine.waiting[0]
        held = self._held(engine, run.prompt)
        tokens = run.prompt.tokens
        own, near, pool = held.own, max(held.near, held.own), max(held.pool, held.near, held.own)
        for where, part in zip(Where, (own, near - own, pool - near, tokens - pool), strict=True):
            self._hits[where] += part
        work = NEAR * (near - own) + FAR * (pool - near) + max(1, tokens - pool)
        chunks = run.prompt.chunks
        engine.hbm.add(chunks)
        if self._cluster.node_tokens and pool // CHUNK_TOKENS < len(chunks):
            engine.node.add(chunks[pool // CHUNK_TOKENS :])
        self._push(now + work / PREFILL_TOKENS_S, "first", run)

    def _first_token(self, run: _Run, now: float) -> None:
        run.first_s = now - run.start
        self._router.first_byte(run.ticket)
        engine = self._engines[run.ticket.instance.name]
        engine.waiting.popleft()
        self._push(now + STEP_S * (run.ask.output_tokens - 1), "end", run)
        if engine.waiting:
            self._prefill(engine, now)

    def _end(self, run: _Run, now: float) -> None:
        self._router.answered(run.ticket)
        self._router.end(run.ticket)
        self._asked.append(Asked(run.ask, run.first_s, now - run.start, run.prompt.tokens, run.ask.output_tokens))

    def _held(self, engine: _Engine, prompt: Prompt) -> Held:
        """Return what an instance could do without computing: each part goes on where the one before ends."""
        chunks = prompt.chunks
        own = engine.hbm.held(chunks)
        near = _go_on(own, chunks, (engine.node,))
        pool = _go_on(near, chunks, [one.node for one in self._engines.values()])
        return Held(own * CHUNK_TOKENS, near * CHUNK_TOKENS, pool * CHUNK_TOKENS)

    def _push(self, when: float, what: str, run: _Run) -> None:
        heapq.heappush(self._events, (when, next(self._number), what, run))


def _go_on(start: int, chunks: Sequence[int], nodes: Sequence[PrefixMemory]) -> int:
    while start < len(chunks) and any(chunks[start] in node for node in nodes):
        start += 1
    return start


ROUTINGS: Final[Mapping[str, tuple[Policy, bool]]] = {
    "round robin": (Policy.ROUND_ROBIN, False),
    "prefix": (Policy.PREFIX, False),
    "prefix, master asked": (Policy.PREFIX, True),
}
