"""Engines that announce themselves to a master become instances, and are let go when they end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.config import ProxySettings, boot_id, load
from kvpool.errors import ConfigError
from kvpool.proxy.discovery import GONE_S, SETTLE_S, Discovery
from kvpool.proxy.errors import RefusedRequestError
from kvpool.proxy.fleet import Asking, Fleet
from kvpool.proxy.routing import Prompt, Role
from kvpool.rpc.v1.master_pb2 import EngineAnnouncement, EngineStatus
from tests.integration.pool import Pool
from tests.proxy.fake import FakeInstance, PoolInstance, play, staged, until

A, B = "http://10.0.0.1:1", "http://10.0.0.1:2"


def engine(port=1, owner=0, silent_s=0.0, **more):
    fields = {"role": "kv_both", "model": "m", "engine": "e", "address": f"10.0.0.1:{port}"}
    return EngineStatus(
        engine=EngineAnnouncement(owner=owner or port, **(fields | more)), last_seen_s=silent_s
    )


class World:
    """A fleet whose instances are never asked for their health, and what the master tells of engines."""

    def __init__(self, *, adds=True):
        self.fleet = Fleet(ProxySettings(health_interval=3_600_000, health_timeout=1))
        self.discovery = Discovery(self.fleet, _NoChannel(), adds=adds)

    def take(self, *engines, epoch=1, now=100.0):
        self.discovery.take(epoch, engines, now)

    def there(self):
        return {(one.role.value, one.name) for role in Role for one in self.fleet.router.of(role)}


class _NoChannel:
    def __getattr__(self, _):
        return lambda *args, **more: None


def world(story, **about):
    async def whole():
        made = World(**about)
        try:
            await story(made)
        finally:
            await made.fleet.close()

    play(whole())


class TestWhatTheMasterTells:
    def test_roles(self):
        """Producers prefill, consumers decode, others do both; one without an address is nobody's."""

        async def story(made):
            roles = ["kv_producer", "kv_consumer", "kv_both", "kv_new"]
            made.take(*(engine(n, role=role) for n, role in enumerate(roles, 1)), engine(9, address=""))
            assert made.there() == {("prefill", A), ("decode", B), ("both", "http://10.0.0.1:3")}
            assert not any(one.up for one in made.fleet.router.instances.values())  # until they answer

        world(story)

    def test_one_that_ends_is_let_go_and_may_come_back(self):
        """In another role, too."""

        async def story(made):
            made.take(engine(1), engine(2), now=0)
            made.take(engine(1), now=SETTLE_S)
            assert made.there() == {("both", A)}
            made.take(engine(1), engine(2), now=SETTLE_S)
            made.take(engine(1), engine(2, role="kv_producer"), now=SETTLE_S)
            assert made.there() == {("both", A), ("prefill", B)}

        world(story)

    @pytest.mark.parametrize("address", ["127.0.0.1:8000", "[::1]:8000", "localhost:8000"])
    def test_an_address_of_another_hosts_loopback_is_nobodys(self, address):
        """It would lead to whoever is there on the proxy's own host: perhaps to the proxy."""

        async def story(made):
            made.take(
                engine(1, address=address, boot_id="another"),
                engine(2, address=address.replace("8000", "8001"), boot_id=boot_id()),
                engine(3, address=address.replace("8000", "8002")),
            )
            assert {name[-4:] for _, name in made.there()} == {"8001", "8002"}

        world(story)

    def test_a_new_master_is_given_time_to_hear_of_everybody(self):
        """It knows nobody at first."""

        async def story(made):
            made.take(engine(1), engine(2), now=0)
            made.take(engine(1), engine(2), now=SETTLE_S)
            made.take(epoch=2, now=2 * SETTLE_S)
            made.take(engine(2), epoch=2, now=3 * SETTLE_S - 1)
            assert len(made.there()) == 2
            assert made.discovery.of(made.fleet.router.of(Role.BOTH)[0]) is not None
            made.take(engine(2), epoch=2, now=3 * SETTLE_S)
            assert made.there() == {("both", B)}

        world(story)

    def test_ranks_behind_one_server_are_one_instance(self):
        """What any of them says counts; one that was silent for long is not heard any more."""

        async def story(made):
            namespaces = [b"1"], [b"2"], []
            for number, digests in enumerate(namespaces):
                ranks = [
                    engine(1, owner=rank + 1, namespaces=digests if rank == number % 2 else [], transfers=rank == 1,
                           silent_s=GONE_S if rank == 2 else 0, boot_id=f"host {rank}")
                    for rank in range(3)
                ]  # fmt: skip
                made.take(*ranks)
            (one,) = made.fleet.router.of(Role.BOTH)
            told = made.discovery.of(one)
            assert told.transfers
            assert told.boot_ids == {"host 0", "host 1", "host 2"}
            assert made.discovery.urls == {1: A, 2: A}
            assert (one.model, one.transfers, one.layerwise) == ("m", True, False)

        world(story)

    def test_who_waits_hears_of_another_model(self):
        """Of an instance that serves it now, and of one that does not any more."""

        async def story(made):
            made.fleet.router.requests_max = 1
            asking = Asking(Role.BOTH, Prompt(), model="m")
            made.take(engine(1), engine(2, model="other"))
            first, second = made.fleet.router.of(Role.BOTH)
            first.up = second.up = True
            assert (await made.fleet.take(asking)).instance is first
            waiting = [asyncio.create_task(made.fleet.take(asking)) for _ in range(2)]
            await asyncio.sleep(0)
            made.take(engine(1), engine(2))
            assert (await waiting[0]).instance is second
            made.take(engine(1, model="other"), engine(2, model="other"))
            with pytest.raises(RefusedRequestError):
                await waiting[1]

        world(story)

    def test_what_an_operator_does_is_left_as_it_is(self):
        """Named instances stay, and are told of; drained and removed ones are not brought back."""

        async def story(made):
            named = made.fleet.add(Role.DECODE, A)
            made.take(engine(1, transfers=True), engine(2), engine(3))
            assert made.there() == {("decode", A), ("both", B), ("both", "http://10.0.0.1:3")}
            assert named.transfers
            assert named.up
            both = {one.name: one for one in made.fleet.router.of(Role.BOTH)}
            assert [made.discovery.found(one) for one in (named, both[B])] == [False, True]
            made.fleet.drain(both[B])
            made.fleet.remove(both["http://10.0.0.1:3"])
            made.take(engine(1), engine(2), engine(3))
            assert both[B].draining
            assert made.there() == {("decode", A), ("both", B)}
            made.take(now=1000)
            assert made.there() == {("decode", A)}
            made.take(engine(2), now=1000)
            assert made.there() == {("decode", A), ("both", B)}
            assert not made.fleet.router.of(Role.BOTH)[0].draining

        world(story)

    def test_without_discovery_instances_are_told_of_all_the_same(self):
        """And nobody is added."""

        async def story(made):
            named = made.fleet.add(Role.BOTH, A)
            made.take(engine(1, layerwise=True), engine(2))
            assert made.there() == {("both", A)}
            assert named.layerwise

        world(story, adds=False)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path)
    made.start_master("--client_ttl", "3s")
    yield made
    made.close()


def up(stage, role):
    return sorted(one.name for one in stage.proxy.fleet.router.of(role) if one.up)


class TestWithAMaster:
    def test_nonsense_is_no_end_of_it(self, pool):
        """Whatever a master says, or a defect of ours: the next answer counts."""

        async def story():
            fake = PoolInstance("a", master=pool.address)
            async with staged(master=pool.address) as stage:
                discovery, failures = stage.proxy._discovery, iter(range(2))
                take = discovery.take

                def nonsense(*args):
                    if next(failures, None) is not None:
                        raise KeyError("what is that?")
                    take(*args)

                discovery.take = nonsense
                await fake.start()
                await until(lambda: up(stage, "both") == [fake.url])
                assert next(failures, None) is None
                await fake.stop()

        play(story())

    def test_engines_come_serve_and_go(self, pool):
        """All of it without a word to the proxy but the master's address."""

        async def story():
            both = PoolInstance("a", master=pool.address)
            prefill = PoolInstance("p", master=pool.address, role="kv_producer")
            decode = PoolInstance("d", master=pool.address, role="kv_consumer")
            async with staged(master=pool.address) as stage:
                assert (await stage.get("/health")).status == 503
                await both.start()
                await until(lambda: up(stage, "both") == [both.url])
                assert (await stage.ask({"prompt": "p"})).texts == ["a-0 "]
                await prefill.start()
                await until(lambda: up(stage, "prefill") == [prefill.url])
                assert (await stage.ask({"prompt": "p"})).texts == ["a-0 "]  # nobody else could decode
                await decode.start()
                await until(lambda: up(stage, "decode") == [decode.url])
                assert (await stage.ask({"prompt": "p"})).texts == ["d-0 "]
                assert decode.requests[0]["kv_transfer_params"]["transfer_id"]
                listed = (await stage.get("/instances")).json
                assert [one["discovered"] for role in listed.values() for one in role] == [True] * 3
                await prefill.stop()
                await until(lambda: not stage.proxy.fleet.router.of("prefill"))
                assert (await stage.ask({"prompt": "p"})).texts == ["a-0 "]
                await both.stop()
                await until(lambda: not stage.proxy.fleet.router.of("both"))
                assert (await stage.ask({"prompt": "p"})).texts == ["d-0 "]
                await decode.stop()
                await until(lambda: not stage.proxy.fleet.router.instances)
                assert (await stage.get("/health")).status == 503

        settle(0)(play)(story())

    def test_one_that_falls_silent_is_forgotten(self, pool):
        """As the master forgets it, whatever its server says."""

        async def story():
            engine = PoolInstance("a", master=pool.address)
            async with staged(engine, named=False, master=pool.address) as stage:
                await until(lambda: up(stage, "both") == [engine.url])
                announcer = engine.client._link.announcer
                announcer._call = lambda *_: 1 / 0  # its thread dies without a word
                announcer.say(engine="a")
                await until(lambda: not stage.proxy.fleet.router.instances)

        settle(0)(quiet(play))(story())

    def test_a_master_that_is_away_changes_nothing(self, pool):
        """Nor does one that comes back and knows nobody."""

        async def story():
            engine = PoolInstance("a", master=pool.address)
            async with staged(engine, named=False, master=pool.address) as stage:
                await until(lambda: up(stage, "both") == [engine.url])
                epoch = stage.proxy._discovery._epoch
                await asyncio.to_thread(pool.master.kill)
                await until(lambda: bool(stage.proxy._discovery._problem))
                assert (await stage.ask({"prompt": "p"})).texts == ["a-0 "]
                await asyncio.to_thread(pool.start_master)
                await until(lambda: stage.proxy._discovery._epoch not in {0, epoch})
                await until(lambda: engine.client._link.residency.owner in stage.proxy._discovery.urls)
                assert up(stage, "both") == [engine.url]
                assert (await stage.ask({"prompt": "p"})).texts == ["a-0 "]

        play(story())

    def test_the_model_that_is_asked_for(self, pool):
        """Where engines serve different ones; what nobody has announced, any may answer."""

        async def story():
            fakes = [PoolInstance(name, master=pool.address, model=name) for name in ("one", "two")]
            async with staged(*fakes, named=False, master=pool.address) as stage:
                await until(lambda: len(up(stage, "both")) == 2)
                await until(lambda: stage.proxy.fleet.router.models() == {"one", "two"})
                for model in ("one", "two", "two", "one", "one"):
                    assert (await stage.ask({"prompt": "p", "model": model})).texts == [f"{model}-0 "]
                assert (await stage.ask({"prompt": "p", "model": "three"})).status == 200
                fakes[0].health = 500
                await until(lambda: up(stage, "both") == [fakes[1].url])
                assert (await stage.ask({"prompt": "p", "model": "one"})).status == 503
                assert (await stage.ask({"prompt": "p", "model": "two"})).status == 200

        play(story())

    def test_a_busy_model_holds_up_no_other(self, pool):
        """Each has a queue of its own, in effect."""

        async def story():
            fakes = [PoolInstance(name, master=pool.address, model=name) for name in ("one", "two")]
            async with staged(*fakes, named=False, master=pool.address, instance_requests_max=1) as stage:
                await until(lambda: len(up(stage, "both")) == 2)
                await until(lambda: stage.proxy.fleet.router.models() == {"one", "two"})
                fakes[0].gate = asyncio.Event()
                waiting = [asyncio.create_task(stage.ask({"prompt": "p", "model": "one"})) for _ in range(3)]
                await until(lambda: stage.counted("kvpool_proxy_waiting") == 2)
                for _ in range(3):
                    assert (await stage.ask({"prompt": "p", "model": "two"})).texts == ["two-0 "]
                fakes[0].gate.set()
                assert all(answer.status == 200 for answer in await asyncio.gather(*waiting))

        play(story())


def settle(seconds):
    """Have a test's proxy believe at once what a master says."""

    def wrap(run):
        def patched(story):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("kvpool.proxy.discovery.SETTLE_S", seconds)
                run(story)

        return patched

    return wrap


def quiet(run):
    """Let a thread die that a test kills."""

    def patched(story):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("threading.excepthook", lambda _: None)
            run(story)

    return patched


class TestSettings:
    @pytest.mark.parametrize(
        ("given", "discovers"),
        [
            ({"master": "h:1"}, True),
            ({"master": "h:1", "instances": "a:1"}, False),
            ({"master": "h:1", "decoder_ports": 1}, False),
            ({"master": "h:1", "decoder_ports": 1, "discover": "on"}, True),
            ({"master": "h:1", "prefiller_ports": 1, "discover": "on"}, True),
            ({"master": "h:1", "discover": "off"}, False),
            ({}, False),
        ],
    )
    def test_when_engines_become_instances(self, given, discovers):
        """By themselves where nobody is named."""
        assert load(ProxySettings, flags=given, environ={}).settings.discovers is discovers

    @pytest.mark.parametrize(
        "given",
        [
            {"discover": "on"},
            {"discover": "maybe", "master": "h:1"},
            {"decode_start": "never"},
            {"prefiller_ports": 1, "master": "h:1"},
        ],
        ids=str,
    )
    def test_what_cannot_be(self, given):
        """Is named."""
        with pytest.raises(ConfigError, match=next(iter(given))):
            load(ProxySettings, flags=given, environ={})


def test_a_fake_that_is_named_needs_no_master():
    """As ever."""

    async def story():
        async with staged(FakeInstance("a"), master="127.0.0.1:1") as stage:
            assert (await stage.ask({"prompt": "p"})).texts == ["a-0 "]

    play(story())
