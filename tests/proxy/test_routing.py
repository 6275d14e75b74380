"""Choices: who serves a request, and what it costs whom."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpool.proxy.routing import (
    CHUNK_TOKENS,
    RECENT_CHOICES,
    Held,
    Policy,
    PrefixMemory,
    Prompt,
    Refusal,
    Role,
    Router,
    Ticket,
)

CHAINS = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=30)


def chain(path):
    """Name each chunk by all before it, as hashes do."""
    return tuple(hash(tuple(path[: n + 1])) for n in range(len(path)))


def prompt(*path, output=0):
    return Prompt(chain(path), len(path) * CHUNK_TOKENS, output)


def router(count=2, **settings):
    made = Router(**settings)
    for number in range(count):
        made.add(Role.BOTH, f"i{number}")
    return made


def take(made, asked, role=Role.BOTH, **arguments):
    ticket = made.take(role, asked, **arguments)
    assert isinstance(ticket, Ticket)
    return ticket


class TestMemory:
    @given(CHAINS, st.integers(1, 12))
    def test_what_is_left_of_a_chain_is_its_head(self, paths, chunks_max):
        """The search by halves relies on it."""
        memory = PrefixMemory(chunks_max)
        for path in paths:
            memory.add(chain(path))
            assert len(memory) <= chunks_max
            for other in paths:
                held = [chunk in memory for chunk in chain(other)]
                assert held == sorted(held, reverse=True)
                assert memory.held(chain(other)) == sum(held)

    @given(CHAINS, st.integers(0, 30))
    def test_what_was_added_since_is_a_head_too(self, paths, since):
        """Of what is there, the part that is new enough."""
        memory = PrefixMemory(12)
        added = {}
        for now, path in enumerate(paths):
            memory.add(chain(path), now)
            added |= dict.fromkeys(chain(path)[:12], now)
        for path in paths:
            fresh = [chunk in memory and added[chunk] >= since for chunk in chain(path)]
            assert memory.held(chain(path), since) == sum(fresh)

    def test_the_last_chain_is_held_whole(self):
        """As much of it as there is room for."""
        memory = PrefixMemory(3)
        memory.add(chain("abc"))
        memory.add(chain("xy"))
        assert memory.held(chain("xy")) == 2
        assert memory.held(chain("abc")) == 1
        memory.add(chain("abcdef"))
        assert memory.held(chain("abcdef")) == 3

    def test_a_smaller_limit_takes_effect_at_once(self):
        """An instance has said that it holds less than thought."""
        memory = PrefixMemory(10)
        memory.add(chain("abcdef"))
        memory.trim(2)
        assert memory.held(chain("abcdef")) == 2


class TestCost:
    @given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000),
           st.sampled_from([0.1, 1.0]))  # fmt: skip
    def test_holding_more_never_costs_more(self, tokens, own, near, pool, share):
        """Own memory is cheapest, nothing costs most, and no cost is below zero."""
        cost = Held(own, near, pool).cost(tokens, share)
        assert 0 <= cost <= tokens * share + 1e-6
        assert Held(own + 64, near, pool).cost(tokens, share) <= cost + 1e-6
        assert Held(own, near + 64, pool).cost(tokens, share) <= cost + 1e-6
        assert Held(own, near, pool + 64).cost(tokens, share) <= cost + 1e-6

    def test_own_memory_beats_the_node_beats_the_pool(self):
        """In this order, and all beat computing."""
        costs = [Held(1000).cost(1000, 1.0), Held(0, 1000).cost(1000, 1.0), Held(0, 0, 1000).cost(1000, 1.0),
                 Held().cost(1000, 1.0)]  # fmt: skip
        assert costs == sorted(costs)
        assert len(set(costs)) == 4


class TestChoice:
    def test_a_prompt_goes_where_its_prefix_is(self):
        """Again and again, though the other one is as free."""
        made = router()
        first = take(made, prompt(*"abcdefgh"))
        made.end(first)
        made.end(take(made, prompt(*"xyz")))
        for _ in range(5):
            ticket = take(made, prompt(*"abcdefgh", "more"))
            assert ticket.instance is first.instance
            assert ticket.held.own >= 8 * CHUNK_TOKENS
            made.end(ticket)

    def test_prompts_that_nobody_knows_go_round(self):
        """Equal costs are shared out in turn."""
        made = router(4)
        names = []
        for number in range(8):
            ticket = take(made, prompt(number))
            names.append(ticket.instance.name)
            made.end(ticket)
        assert sorted(names[:4]) == sorted(names[4:]) == ["i0", "i1", "i2", "i3"]

    def test_load_outweighs_a_short_prefix(self):
        """A crowd at the holder costs more than computing a little."""
        made = router()
        holder = take(made, prompt("a")).instance
        for _ in range(3):
            take(made, prompt("a"))
        assert take(made, prompt("a")).instance is not holder or holder.requests < 4

    def test_what_waits_for_its_first_token_counts_until_it_has_it(self):
        """The backlog is of prompts, not of requests."""
        made = router()
        long = take(made, prompt(*range(100)))
        assert long.instance.backlog == 100 * CHUNK_TOKENS
        made.first_byte(long)
        assert long.instance.backlog == 0
        assert long.instance.requests == 1

    def test_decode_avoids_a_full_kv_cache(self):
        """Even where the other one has more to do."""
        made = Router()
        full, busy = made.add(Role.DECODE, "full"), made.add(Role.DECODE, "busy")
        made.learn(full, 1000, 0.95)
        made.learn(busy, 1000, 0.1)
        busy.requests = 3
        assert take(made, prompt("a", "b"), Role.DECODE).instance is busy
        made.learn(busy, 1000, 0.99)
        assert take(made, prompt("a", "b"), Role.DECODE).instance is full

    def test_the_master_knows_better(self):
        """What is known takes the place of what was sent there."""
        made = router()
        first = take(made, prompt(*"abcd"))
        made.end(first)
        for number in range(RECENT_CHOICES + 1):
            made.end(take(made, prompt("other", number)))
        other = next(one.name for one in made.of(Role.BOTH) if one is not first.instance)
        known = {first.instance.name: Held(), other: Held(own=4 * CHUNK_TOKENS)}
        ticket = take(made, prompt(*"abcd"), known=known)
        assert ticket.instance.name == other
        assert ticket.exact
        assert ticket.held.own == 4 * CHUNK_TOKENS
        strange = take(made, prompt(*"xyz"), known=dict.fromkeys(known, Held()))
        assert strange.held.own == 0

    def test_round_robin_takes_turns_whatever_is_held(self):
        """For comparison, and for who wants it."""
        made = router(3, policy=Policy.ROUND_ROBIN)
        names = [take(made, prompt(*"abc")).instance.name for _ in range(6)]
        assert names == ["i0", "i1", "i2"] * 2

    def test_who_is_down_drained_avoided_or_full_is_not_chosen(self):
        """Each for its reason; the reason is told apart only where waiting would help."""
        made = router(4, requests_max=1)
        down, drained, avoided, busy = made.of(Role.BOTH)
        made.down(down)
        drained.draining = True
        ticket = take(made, prompt("a"), avoid={avoided})
        assert ticket.instance is busy
        assert made.take(Role.BOTH, prompt("a"), avoid={avoided}) is Refusal.FULL
        assert made.take(Role.BOTH, prompt("a"), avoid={avoided, busy}) is Refusal.NONE
        assert made.take(Role.DECODE, prompt("a")) is Refusal.NONE

    def test_an_instance_that_went_down_holds_nothing(self):
        """It comes back empty."""
        made = router(1)
        ticket = take(made, prompt(*"abc"))
        made.down(ticket.instance)
        ticket.instance.up = True
        assert take(made, prompt(*"abc")).held.own == 0

    def test_failures_are_held_against_an_instance_for_a_while(self):
        """Until it has answered, or was found healthy many times."""
        made = router()
        ticket = take(made, prompt(*"abcd"))
        made.failed(ticket)
        made.end(ticket)
        for _ in range(4):
            other = take(made, prompt(*"abcd"))
            assert other.instance is not ticket.instance
            made.end(other)
        for _ in range(60):
            made.healthy(ticket.instance)
        again = take(made, prompt("x", "y"))
        assert again.instance is ticket.instance
        made.failed(again)
        made.first_byte(again)
        assert again.instance.trouble > 0
        made.answered(again)
        assert again.instance.trouble == 0

    def test_an_instance_leaves_with_its_last_request(self):
        """And can come back before that."""
        made = router(1)
        ticket = take(made, prompt("a"))
        made.remove(ticket.instance)
        assert made.of(Role.BOTH) == []
        assert made.instances
        assert made.add(Role.BOTH, "i0") is ticket.instance
        made.remove(ticket.instance)
        made.end(ticket)
        assert not made.instances


class Accounting(RuleBasedStateMachine):
    """Whatever happens in whatever order, the counts are those of the requests that run."""

    def __init__(self):
        super().__init__()
        self.router = router(3, requests_max=3, chunks_max=8)
        self.running = []

    @rule(path=st.lists(st.integers(0, 2), max_size=5), output=st.integers(0, 100))
    def take(self, path, output):
        free = [one for one in self.router.of(Role.BOTH) if one.serves and one.requests < 3]
        ticket = self.router.take(Role.BOTH, prompt(*path, output=output))
        assert isinstance(ticket, Ticket) == bool(free)
        if isinstance(ticket, Ticket):
            assert ticket.instance in free
            self.running.append(ticket)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def first_byte(self, data):
        self.router.first_byte(data.draw(st.sampled_from(self.running)))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), twice=st.booleans())
    def end(self, data, twice):
        ticket = data.draw(st.sampled_from(self.running))
        self.running.remove(ticket)
        self.router.end(ticket)
        if twice:
            self.router.end(ticket)

    @rule(number=st.integers(0, 2), up=st.booleans())
    def health(self, number, up):
        for one in self.router.of(Role.BOTH):
            if one.name == f"i{number}":
                if up:
                    one.up = True
                else:
                    self.router.down(one)

    @rule(number=st.integers(0, 2), there=st.booleans())
    def change(self, number, there):
        if there:
            self.router.add(Role.BOTH, f"i{number}")
        else:
            for one in [one for one in self.router.of(Role.BOTH) if one.name == f"i{number}"]:
                self.router.remove(one)

    @invariant()
    def counts(self):
        for one in self.router.instances.values():
            mine = [ticket for ticket in self.running if ticket.instance is one]
            assert one.requests == len(mine)
            assert one.tokens == sum(ticket.prompt.tokens + ticket.prompt.output_tokens for ticket in mine)
            assert one.backlog == pytest.approx(sum(ticket.backlog for ticket in mine))
            assert not one.leaving or mine
            assert len(one.memory) <= 8


TestAccounting = Accounting.TestCase


def conversations(seed, count=240, active=48, turns=4):
    """A fixed workload: so many conversations at a time under eight system prompts, each turn on top of the last.

    Every second one is about a document that comes first.
    """
    rng = random.Random(seed)
    systems = [[("system", s, n) for n in range(4)] for s in range(8)]
    waiting = []
    for number in range(count):
        document = [("document", number, n) for n in range(rng.randint(20, 60) if number % 2 else 0)]
        waiting.append((number, rng.choice(systems) + document, turns))
    talks, waiting = waiting[:active], waiting[active:]
    while talks:
        at = rng.randrange(len(talks))
        number, talk, left = talks[at]
        talk += [(number, left, n) for n in range(rng.randint(2, 10))]
        yield prompt(*talk)
        talks[at] = number, talk, left - 1
        if left == 1:
            talks[at : at + 1] = waiting[:1]
            waiting = waiting[1:]


def tokens_hit(policy, capacity_chunks, count=4, seed=5):
    """Run the workload on simulated engines with caches of their own; returns the tokens they hit."""
    made = router(count, policy=policy, chunks_max=capacity_chunks)
    caches = {one.name: PrefixMemory(capacity_chunks) for one in made.of(Role.BOTH)}
    running: list[Ticket] = []
    hit = 0
    for one in conversations(seed):
        ticket = take(made, one)
        cache = caches[ticket.instance.name]
        hit += cache.held(one.chunks) * CHUNK_TOKENS
        cache.add(one.chunks)
        running.append(ticket)
        if len(running) > 8:
            made.end(running.pop(0))
    return hit


@pytest.mark.parametrize("capacity_chunks", [600, 800])
def test_twice_the_hits_of_round_robin(capacity_chunks):
    """Multi-turn conversations with shared system prompts on four instances whose caches hold a part of them."""
    by_prefix = tokens_hit(Policy.PREFIX, capacity_chunks)
    assert by_prefix >= 2 * tokens_hit(Policy.ROUND_ROBIN, capacity_chunks)
    assert by_prefix >= 0.75 * tokens_hit(Policy.PREFIX, 1 << 20, count=1)  # more than that nobody could hit


def test_no_instance_is_left_idle_by_affinity():
    """A prefix that everybody shares does not draw everybody to one instance."""
    made = router(4, requests_max=1 << 20)
    shared = tuple(itertools.repeat("s", 20))
    for number in range(400):
        take(made, prompt(*shared, number))
    counts = [one.requests for one in made.of(Role.BOTH)]
    assert max(counts) <= 2 * min(counts)
