"""Which instance serves a request: decisions over what is known of instances. No I/O, no clock.

Everything is weighed in tokens: what a prompt would still have to compute at an instance, what is computed
there before it, and what the requests that run there cost it.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

CHUNK_TOKENS: Final = 64
"""Tokens (of a text: an estimate) that one link of a prompt's chain stands for."""

REQUEST_TOKENS: Final = 128
"""What a request that runs costs a new one beside it, in tokens computed."""

LOAD_SHARE: Final = 0.1
"""Cost of a token loaded from the instance's own node, or sent by a prefill instance, beside a computed one."""

FAR_SHARE: Final = 0.4
"""Cost of a token loaded from elsewhere in the pool: more than the load itself, since it lies in two caches then."""


RECENT_CHOICES: Final = 64
"""What was sent to an instance within so many choices counts, though the master has not heard of it."""

TROUBLE_TOKENS: Final = 8192
"""What a failure costs an instance in the eyes of the next requests; an answer makes up for it."""

TROUBLE_KEPT: Final = 0.9
"""Share of that which is left after each check that finds the instance in good health."""


class Role(StrEnum):
    """What an instance does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class Policy(StrEnum):
    """How instances are chosen."""

    PREFIX = "prefix"
    ROUND_ROBIN = "round_robin"


class Refusal(Enum):
    """Why nobody was chosen."""

    NONE = "none is up"
    FULL = "all are busy"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as routing sees it: chained hashes of its chunks, its tokens, and those it may generate."""

    chunks: tuple[int, ...] = ()
    tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """Tokens of a prompt's prefix that an instance can do without computing; each counts from the prompt's start.

    ``own``: in the instance's own memory. ``near``: that, or on its own node. ``pool``: that, or anywhere in the pool.
    """

    own: int = 0
    near: int = 0
    pool: int = 0
    reported: bool = True
    """Whether it has said itself what is in its memory."""
    block_tokens: int = 0
    """In which it counts; 0 where the master has not said."""

    def cost(self, tokens: int, compute_share: float) -> float:
        """Return what the prompt costs, in tokens computed."""
        own = min(self.own, tokens)
        near = min(max(self.near, own), tokens)
        pool = min(max(self.pool, near), tokens)
        load = LOAD_SHARE * (near - own) + FAR_SHARE * (pool - near)
        return min(load, compute_share * (pool - own)) + compute_share * (tokens - pool)


class PrefixMemory:
    """The prompts that were sent to an instance, as far as it may still hold them: least recent tails go first.

    A chain's head is always at least as recent as its tail, so what is left of a chain is a prefix of it.
    """

    def __init__(self, chunks_max: int) -> None:
        self.chunks_max = chunks_max
        self._chunks: OrderedDict[int, int] = OrderedDict()  # -> when

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._chunks

    def held(self, chunks: Sequence[int], since: int = 0) -> int:
        """Return how many of a chain's chunks, from its head, are here, and were added at ``since`` or later."""
        low, high = 0, len(chunks)
        while low < high:
            middle = (low + high) // 2
            if self._chunks.get(chunks[middle], -1) >= since:
                low = middle + 1
            else:
                high = middle
        return low

    def add(self, chunks: Sequence[int], now: int = 0) -> None:
        """Remember a chain, of one that is too long the head; ``now`` never goes back."""
        for chunk in reversed(chunks[: self.chunks_max]):
            self._chunks[chunk] = now
            self._chunks.move_to_end(chunk)
        self.trim()

    def trim(self, chunks_max: int | None = None) -> None:
        """Forget what is too much, of a new limit where one is given."""
        if chunks_max is not None:
            self.chunks_max = chunks_max
        while len(self._chunks) > self.chunks_max:
            self._chunks.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._chunks.clear()


@dataclass(slots=True, eq=False)
class Instance:
    """An engine behind the proxy. ``name`` is its base URL."""

    name: str
    role: Role
    memory: PrefixMemory
    up: bool = True
    draining: bool = False
    leaving: bool = False
    requests: int = 0
    """Running there on our behalf."""
    backlog: float = 0.0
    """Tokens to be computed of requests that have no first token yet."""
    tokens: int = 0
    """Tokens of running requests, those they may generate included."""
    kv_tokens: int = 0
    """Tokens that its KV cache has room for; 0 while it has not said."""
    kv_usage: float = 0.0
    """Share of them that it said to be in use."""
    trouble: float = 0.0
    """Tokens for what has failed there of late."""
    turn: int = 0
    """Number of the last choice that fell on it."""
    model: str = ""
    """That it serves; empty where it has not announced itself."""
    transfers: bool = False
    """It moves prompts through the pool by the id of a transfer ..."""
    layerwise: bool = False
    """... layer by layer, while they are computed."""

    @property
    def serves(self) -> bool:
        """Whether new requests may go there."""
        return self.up and not self.draining

    def suits(self, model: str) -> bool:
        """Whether it serves a model, as far as is known; "" for any."""
        return not model or self.model in ("", model)

    def has_room(self, tokens: int) -> bool:
        """Whether its KV cache has room for so many tokens more, as far as it is known."""
        used = max(self.kv_usage * self.kv_tokens, self.tokens)
        return not self.kv_tokens or used + tokens <= self.kv_tokens


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place at an instance, until ``Router.end``."""

    instance: Instance
    prompt: Prompt
    held: Held
    backlog: float
    exact: bool = False
    """Whether the master had its say in ``held``."""
    open: bool = True


@dataclass(slots=True)
class Router:
    """All instances, and what runs on them."""

    requests_max: int = 256
    chunks_max: int = 1 << 14
    policy: Policy = Policy.PREFIX
    instances: dict[tuple[Role, str], Instance] = field(default_factory=dict)
    _turn: int = 0

    def add(self, role: Role, name: str, *, up: bool = True) -> Instance:
        """Add an instance, or take one back that was to leave; ``up``: whether a new one counts as up."""
        found = self.instances.get((role, name))
        if found is None:
            found = self.instances[role, name] = Instance(name, role, PrefixMemory(self.chunks_max), up)
        found.draining = found.leaving = False
        return found

    def remove(self, instance: Instance) -> None:
        """Send nothing more to an instance, and forget it once nothing runs there."""
        instance.draining = instance.leaving = True
        self._forget(instance)

    def of(self, role: Role) -> list[Instance]:
        """Return the instances of a role, but for those that leave."""
        return [one for one in self.instances.values() if one.role == role and not one.leaving]

    def models(self) -> set[str]:
        """Return the models that instances have announced."""
        return {one.model for one in self.instances.values() if one.model and not one.leaving}

    def take(
        self,
        role: Role,
        prompt: Prompt,
        *,
        compute_share: float = 1.0,
        avoid: Collection[Instance] = (),
        known: Mapping[str, Held] | None = None,
    ) -> Ticket | Refusal:
        """Choose an instance and count the request there.

        ``compute_share``: what a token that it does not hold costs it. ``known``: what instances hold where
        that is known better than from what was sent to them.
        """
        serving = [one for one in self.of(role) if one.serves and one not in avoid]
        if not serving:
            return Refusal.NONE
        free = [one for one in serving if one.requests < self.requests_max]
        if not free:
            return Refusal.FULL
        known = known or {}
        tickets = [self._weigh(one, prompt, compute_share, known.get(one.name)) for one in free]
        ticket = min(tickets, key=self._rank)
        chosen = ticket.instance
        self._turn += 1
        chosen.turn = self._turn
        chosen.requests += 1
        chosen.backlog += ticket.backlog
        chosen.tokens += prompt.tokens + prompt.output_tokens
        chosen.memory.add(prompt.chunks, self._turn)
        return ticket

    def first_byte(self, ticket: Ticket) -> None:
        """Its prompt is computed."""
        ticket.instance.backlog -= ticket.backlog
        ticket.backlog = 0.0

    def answered(self, ticket: Ticket) -> None:
        """The instance has done all that it was asked to."""
        ticket.instance.trouble = 0.0

    def failed(self, ticket: Ticket) -> None:
        """The instance has not done what it was asked to: others are preferred for a while."""
        ticket.instance.trouble += TROUBLE_TOKENS

    def healthy(self, instance: Instance) -> None:
        """A check has found it in good health."""
        instance.up = True
        instance.trouble *= TROUBLE_KEPT
        if instance.trouble < REQUEST_TOKENS:
            instance.trouble = 0.0

    def end(self, ticket: Ticket) -> None:
        """The request has ended there, well or not. Idempotent."""
        if not ticket.open:
            return
        ticket.open = False
        self.first_byte(ticket)
        instance = ticket.instance
        instance.requests -= 1
        instance.tokens -= ticket.prompt.tokens + ticket.prompt.output_tokens
        if not instance.requests:
            instance.backlog = 0.0  # what floats leave behind
        self._forget(instance)

    def down(self, instance: Instance) -> None:
        """An instance does not answer: whatever it held is taken for lost."""
        instance.up = False
        instance.kv_usage = 0.0
        instance.memory.clear()

    def learn(self, instance: Instance, kv_tokens: int, kv_usage: float) -> None:
        """Take in what an instance says of its KV cache."""
        if kv_tokens and kv_tokens != instance.kv_tokens:
            instance.memory.trim(max(1, kv_tokens // CHUNK_TOKENS))
        instance.kv_tokens, instance.kv_usage = kv_tokens, kv_usage

    def _weigh(self, instance: Instance, prompt: Prompt, compute_share: float, known: Held | None) -> Ticket:
        since = 0 if known is None or not known.reported else max(0, self._turn - RECENT_CHOICES)
        own = min(instance.memory.held(prompt.chunks, since) * CHUNK_TOKENS, prompt.tokens)
        held = Held(own) if known is None else dataclasses.replace(known, own=max(own, known.own))
        return Ticket(instance, prompt, held, held.cost(prompt.tokens, compute_share), exact=known is not None)

    def _rank(self, ticket: Ticket) -> tuple[bool, float, int]:
        one = ticket.instance
        if self.policy is Policy.ROUND_ROBIN:
            return False, 0.0, one.turn
        crowded = not one.has_room(ticket.prompt.tokens + ticket.prompt.output_tokens)
        return crowded, ticket.backlog + one.backlog + one.trouble + REQUEST_TOKENS * one.requests, one.turn

    def _forget(self, instance: Instance) -> None:
        if instance.leaving and not instance.requests:
            self.instances.pop((instance.role, instance.name), None)
