"""What the master and the engines' tokenizers know of prompts, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import grpc
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from kvpool.model import Namespace
from kvpool.proxy.chains import SEED, SLICE_TOKENS, block_keys, can_hash, key_slices
from kvpool.proxy.routing import Held, Role
from kvpool.rpc.convert import namespace_to_proto
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc, master_pb2, master_pb2_grpc
from kvpool_vllm.names import Names
from tests.proxy.fake import CHAT, COMPLETIONS, FakeInstance, play, staged, until

BLOCK = 32
# The engine's own hashes of range(32) and then of a second block, seen with vLLM 0.32.
SEEN = {
    "sha256": ("b1bdb84c40e30190f50cb343f03308ea", "0cfa2569924fdd13a84ae5118d3d59f5"),
    "sha256_cbor": ("30653d0f357fa985ff3562ec776f5216", "905b8e99ed1ebd14ef5984169d18793c"),
}
SECOND = [70000, 5, 255, 256, 24, 23, 65536]


def namespace(algorithm="sha256", block_tokens=BLOCK, **more):
    fields = {"model": "tiny", "block_tokens": block_tokens, "hash_algorithm": algorithm,
              "hash_fingerprint": SEEN[algorithm][0]}  # fmt: skip
    return Namespace(**(fields | more))


class TestHashes:
    @pytest.mark.parametrize("algorithm", SEEN)
    def test_they_are_the_engines(self, algorithm):
        """As vLLM made them; a fingerprint proves it for a namespace."""
        assert can_hash(namespace(algorithm))
        assert block_keys(namespace(algorithm), range(32)).hex() == SEEN[algorithm][0]
        assert not can_hash(namespace(algorithm, hash_fingerprint="0" * 32))
        assert not can_hash(namespace(algorithm), seed="0")
        assert not can_hash(namespace("sha256", hash_algorithm="xxhash"))
        assert not can_hash(namespace("sha256", block_tokens=(1 << 32) - 1))  # which would be gigabytes to try

    @pytest.mark.parametrize("algorithm", SEEN)
    def test_the_second_block_covers_the_first(self, algorithm):
        """Numbers of every width."""
        size = len(SECOND)
        chain = block_keys(namespace(algorithm, block_tokens=size), [*range(size), *SECOND])
        other = block_keys(namespace(algorithm, block_tokens=size), [*range(1, size + 1), *SECOND])
        assert len(chain) == 32
        assert chain[16:] != other[16:]

    @given(st.lists(st.integers(0, 1 << 20), max_size=70), st.integers(1, 16))
    def test_whole_blocks_only(self, tokens, size):
        """Pickled as any Python would."""
        keys = block_keys(namespace(block_tokens=size), tokens)
        parent = hashlib.sha256(pickle.dumps(SEED, protocol=pickle.HIGHEST_PROTOCOL)).digest()
        for number in range(len(tokens) // size):
            block = (parent, tuple(tokens[number * size : (number + 1) * size]), None)
            parent = hashlib.sha256(pickle.dumps(block, protocol=pickle.HIGHEST_PROTOCOL)).digest()
            assert keys[16 * number : 16 * number + 16] == parent[:16]
        assert len(keys) == 16 * (len(tokens) // size)


    @pytest.mark.parametrize("size", [1, 16, 3000])
    def test_a_long_prompt_is_hashed_in_slices(self, size):
        """Which make the whole."""
        tokens = [number % 70000 for number in range(5 * SLICE_TOKENS + 7)]
        slices = list(key_slices(namespace(block_tokens=size), tokens))
        whole = block_keys(namespace(block_tokens=size), tokens)
        assert b"".join(slices[: -1 if len(tokens) % size else None]) == whole
        assert max(map(len, slices)) == 16 * max(1, SLICE_TOKENS // size)


    @pytest.mark.parametrize("tokens", [1, 31, 33, 95])
    def test_the_partial_block_is_the_connectors(self, tokens):
        """Named as engines name it that keep a prompt's last block."""
        prompt = [7 * number for number in range(tokens)]
        form = partial(pickle.dumps, protocol=pickle.HIGHEST_PROTOCOL)
        hashes = [hashlib.sha256(form(SEED)).digest()]
        for number in range(tokens // BLOCK):
            block = (hashes[-1], tuple(prompt[number * BLOCK : (number + 1) * BLOCK]), None)
            hashes.append(hashlib.sha256(form(block)).digest())
        request = SimpleNamespace(
            num_prompt_tokens=tokens, block_hashes=hashes[1:], cache_salt=None, all_token_ids=[*prompt, 5, 6]
        )
        names = Names(SimpleNamespace(block_tokens=BLOCK, hashes_per_block=1), discard_tails=False)
        assert list(key_slices(namespace(), prompt))[-1] == names.tail(request)[:16]
        assert not list(key_slices(namespace(block_tokens=tokens), prompt))[1:]


class FakeMaster(admin_pb2_grpc.AdminServicer, master_pb2_grpc.MasterServicer):
    """Answers as told."""

    def __init__(self):
        self.namespaces = [namespace()]
        self.engines = []
        self.residents = {}  # engine's owner -> blocks from the prompt's start
        self.runs = []  # (blocks, boot id of the node)
        self.asked = []
        self.hang = False

    def announce(self, engine, **more):
        fields = {"role": "kv_both", "namespaces": [one.digest for one in self.namespaces], "boot_id": "here",
                  "model": "m", "loads": True, "residency": True}  # fmt: skip
        said = master_pb2.EngineAnnouncement(owner=engine.port, engine="e", address=engine.address, **(fields | more))
        self.engines = [one for one in self.engines if one.owner != engine.port] + [said]

    async def Handshake(self, request, context):  # noqa: N802  # gRPC names the methods
        return master_pb2.HandshakeResponse(protocol=1, master_epoch=1)

    async def Engines(self, request, context):  # noqa: N802
        return master_pb2.EnginesResponse(engines=[master_pb2.EngineStatus(engine=one) for one in self.engines])

    async def Namespaces(self, request, context):  # noqa: N802
        statuses = [
            admin_pb2.NamespaceStatus(digest=one.digest, descriptor=namespace_to_proto(one)) for one in self.namespaces
        ]
        return admin_pb2.NamespacesResponse(namespaces=statuses)

    async def Inspect(self, request, context):  # noqa: N802
        self.asked.append(request)
        if self.hang:
            await asyncio.Event().wait()
        answer = master_pb2.LookupResponse(prefix=sum(blocks for blocks, _ in self.runs))
        for number, (blocks, boot_id) in enumerate(self.runs):
            answer.nodes.add(node_id=f"n{number}", boot_id=boot_id)
            answer.runs.add(blocks=blocks).owners.add(node=number, tier="dram")
        for owner, blocks in self.residents.items():
            answer.residents.add(engine="e", tier="hbm", owner=owner).ranges.add(first=0, blocks=blocks)
        return answer


class Engine(FakeInstance):
    """An engine that has a tokenizer: a word is a token."""

    tokenized = 0
    broken = False

    async def _models(self, request):
        return web.json_response({"data": [{"id": "m", "root": "/models/tiny", "parent": None},
                                           {"id": "lora", "root": "/x/lora", "parent": "m"}]})  # fmt: skip

    async def _tokenize(self, request):
        self.tokenized += 1
        if self.broken:
            return web.Response(status=404)
        body = await request.json()
        text = body["prompt"] if "prompt" in body else " ".join(one["content"] for one in body["messages"])
        return web.json_response({"tokens": [len(word) for word in text.split()]})

    def routes(self):
        return [web.post("/tokenize", self._tokenize)]


@asynccontextmanager
async def with_master(*engines, prefill=0, known_models=None, **settings):
    """A master that answers, and a proxy that has learnt its namespaces and its instances' models.

    Hosts are several by their boot ids only: that all are at loopback addresses keeps no proxy from them.
    """
    master = FakeMaster()
    server = grpc.aio.server()
    admin_pb2_grpc.add_AdminServicer_to_server(master, server)
    master_pb2_grpc.add_MasterServicer_to_server(master, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        settings = {"lookup_timeout": "5s"} | settings
        with patch("kvpool.proxy.discovery._is_loopback", lambda _: False):
            async with staged(*engines, prefill=prefill, master=f"127.0.0.1:{port}", **settings) as stage:
                for number, engine in enumerate(engines):
                    roles = ["kv_producer", "kv_consumer"] if prefill else ["kv_both", "kv_both"]
                    master.announce(engine, role=roles[number >= prefill])
                count = len(engines) if known_models is None else known_models
                await until(lambda: stage.proxy._index._spaces and len(stage.proxy._index._models) == count)
                await known(stage, *engines)
                yield stage, master
    finally:
        await server.stop(0)


async def known(stage, *engines):
    """Wait for the proxy to have heard of engines from the master as it is now."""
    discovery = stage.proxy._discovery
    discovery._told, discovery.urls = {}, {}
    await until(lambda: all(engine.port in discovery.urls for engine in engines))


def held(stage, source="master", role="both"):
    return stage.counted("kvpool_proxy_held_tokens_total", role=role, source=source)


WORDS = "word " * 100  # 100 tokens, 3 blocks


class TestRouting:
    @pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
    def test_a_prompt_goes_to_the_engine_that_says_it_holds_it(self, path):
        """Though the proxy never sent it there."""

        async def story():
            a, b = Engine("a"), Engine("b")
            async with with_master(a, b) as (stage, master):
                body = {"model": "m", "prompt": WORDS, "messages": [{"role": "user", "content": WORDS}]}
                for engine in (b, a, b, b):
                    master.residents = {engine.port: 3}
                    assert (await stage.ask(body, path)).texts == [f"{engine.name}-0 "]
                    for one in stage.proxy.fleet.router.instances.values():
                        one.memory.clear()
                assert held(stage) == 4 * 3 * BLOCK
                keys = b"".join(key_slices(namespace(), [4] * 100))
                assert {request.hashes for request in master.asked} == {keys}
                assert a.tokenized + b.tokenized == 1  # the same text four times

        play(story())

    def test_own_memory_before_the_nodes_before_the_pools(self):
        """A node is near where it runs on the same host; what an engine does not load by itself is of no use to it."""

        async def story():
            a, b, c, d = (Engine(name) for name in "abcd")
            async with with_master(a, b, c, d) as (stage, master):
                master.announce(a, boot_id="one")
                master.announce(b, boot_id="two")
                master.announce(c, boot_id="two", loads=False, residency=False)
                master.announce(d, boot_id="two", namespaces=[])
                await known(stage, a, b, c, d)
                master.residents = {a.port: 1, 17: 5}
                master.runs = [(2, "two"), (5, "three")]
                asked = stage.proxy_read({"prompt": list(range(9 * BLOCK))})
                found = await stage.proxy._index.find(COMPLETIONS, asked)
                assert found.tokens == 9 * BLOCK
                assert found.held == {
                    a.url: Held(BLOCK, BLOCK, 7 * BLOCK, block_tokens=BLOCK),
                    b.url: Held(0, 2 * BLOCK, 7 * BLOCK, block_tokens=BLOCK),
                    c.url: Held(0, 0, 0, reported=False, block_tokens=BLOCK),
                }

        play(story())

    def test_a_prompt_that_many_ask_at_once_counts_once(self):
        """What is remembered of tokens is as much as it is said to be."""

        async def story():
            engine = Engine("a")
            async with with_master(engine) as (stage, _):
                await asyncio.gather(*(stage.ask({"prompt": WORDS}) for _ in range(10)))
                assert engine.tokenized > 1
                index = stage.proxy._index
                assert index._tokens == sum(map(len, index._tokenized.values())) == 100

        play(story())

    def test_nonsense_of_a_client_is_nobodys_failure(self):
        """Others' prompts are looked up all the same."""

        async def story():
            a, b = Engine("a"), Engine("b")
            async with with_master(a, b) as (stage, _):
                for messages in (5, "text", {"role": "user"}, [5], [{"content": 5}]):
                    asked = stage.proxy_read({"prompt": WORDS, "messages": messages})
                    assert await stage.proxy._index.find(COMPLETIONS, asked) is not None
                assert stage.counted("kvpool_proxy_lookups_total", outcome="failed") == 0

        play(story())

    def test_a_prompt_that_takes_long_to_hash_is_no_failure(self):
        """It is routed by what was sent where; the next one is looked up."""

        async def story():
            a = Engine("a")
            async with with_master(a) as (stage, _):
                index = stage.proxy._index
                asked = stage.proxy_read({"prompt": list(range(BLOCK))})
                with patch("kvpool.proxy.index.HASHING_PART", -1.0):
                    for _ in range(5):
                        assert await index.find(COMPLETIONS, asked) is None
                assert (await index.find(COMPLETIONS, asked)).tokens == BLOCK
                assert stage.counted("kvpool_proxy_lookups_total", outcome="failed") == 0

        play(story())

    def test_instances_are_asked_for_what_is_not_packed(self):
        """It is read as it comes."""

        async def story():
            seen = []

            class Packing(Engine):
                async def _tokenize(self, request):
                    seen.append(request.headers["Accept-Encoding"])
                    return await super()._tokenize(request)

            a = Packing("a")
            async with with_master(a) as (stage, _):
                await stage.ask({"prompt": WORDS})
                assert seen == ["identity"]

        play(story())

    def test_what_was_just_sent_somewhere_counts_too(self):
        """The master hears of it later."""

        async def story():
            a, b = Engine("a"), Engine("b")
            async with with_master(a, b) as (stage, _):
                first = (await stage.ask({"prompt": WORDS * 4})).texts
                await stage.ask({"prompt": "other " * 400})
                for _ in range(3):
                    assert (await stage.ask({"prompt": WORDS * 4})).texts == first

        play(story())

    @pytest.mark.parametrize("prompt", [[WORDS], [[4] * 100]], ids=["text", "tokens"])
    def test_a_list_of_one_prompt_is_looked_up(self, prompt):
        """As the prompt alone."""

        async def story():
            engine = Engine("a")
            async with with_master(engine) as (stage, master):
                assert (await stage.ask({"prompt": prompt})).status == 200
                assert [request.hashes for request in master.asked] == [b"".join(key_slices(namespace(), [4] * 100))]
                assert engine.requests[0]["prompt"] == prompt

        play(story())

    @pytest.mark.parametrize(
        ("how", "cases"),
        [
            (
                "pool",  # but for a token, which is computed in any case
                [
                    (100, 2, 0, False),
                    (100, 3, 0, False),
                    (100, 4, 0, True),  # the partial block is there too
                    (100, 4, 3, False),  # which an engine does not load alone
                    (97, 3, 0, True),
                    (97, 0, 3, True),
                    (96, 3, 0, True),
                    (96, 2, 0, False),
                    (96, 0, 3, False),  # of a prompt that is all in its cache, an engine computes the last block again
                ],
            ),
            (
                "blocks",  # but for less than a block
                [(100, 2, 0, False), (100, 3, 0, True), (100, 0, 3, True), (96, 2, 0, False), (20, 0, 0, False)],
            ),
            ("off", [(100, 4, 0, False)]),
        ],
        ids=["pool", "blocks", "off"],
    )
    def test_a_prompt_that_the_decode_side_can_load_is_not_prefilled(self, how, cases):
        """Of so many tokens, with so many blocks in the pool, and so many in the decode engine's own cache."""

        async def story():
            prefill, decode = Engine("p"), Engine("d")
            async with with_master(prefill, decode, prefill=1, skip_prefill=how) as (stage, master):
                for tokens, pool, own, skipped in cases:
                    master.runs = [(pool, "here")] * bool(pool)
                    master.residents = {decode.port: own}
                    await stage.ask({"prompt": list(range(tokens))})
                    seen = not prefill.requests, "kv_transfer_params" not in decode.requests[-1]
                    assert seen == (skipped, skipped), (tokens, pool, own)
                    prefill.requests.clear()
                skips = sum(skipped for *_, skipped in cases)
                assert stage.counted("kvpool_proxy_prefills_total", outcome="skipped") == skips

        play(story())


class TestWithout:
    @pytest.mark.parametrize(
        "body",
        [
            {"prompt": WORDS, "cache_salt": "s"},
            {"prompt": WORDS, "model": "lora"},
            {"prompt": WORDS, "model": "unknown"},
            {"prompt": [WORDS, WORDS]},
        ],
        ids=str,
    )
    def test_hashes_that_cover_more_than_tokens(self, body):
        """Nobody is asked; the proxy decides by what it has sent where."""

        async def story():
            engine = Engine("a")
            async with with_master(engine) as (stage, master):
                assert (await stage.ask(body)).status == 200
                assert not master.asked
                assert stage.counted("kvpool_proxy_lookups_total", outcome="unknown") == 1

        play(story())

    @pytest.mark.parametrize(
        "spaces",
        [
            [namespace(hash_fingerprint="0" * 32)],
            [namespace(kv_group="full of layers 1"), namespace(kv_group="window:64 of layers 2")],
            [namespace(model="other")],
        ],
        ids=["another seed", "hybrid", "another model"],
    )
    def test_namespaces_whose_keys_say_nothing_here(self, spaces):
        """Are left alone."""

        async def story():
            engine = Engine("a")
            async with with_master(engine) as (stage, master):
                stage.proxy._index._take(spaces)
                assert (await stage.ask({"prompt": WORDS})).status == 200
                assert not master.asked

        play(story())

    @pytest.mark.parametrize("trouble", ["master hangs", "no tokenizer", "master refuses"])
    def test_trouble_costs_a_few_requests_a_moment_and_then_none(self, trouble):
        """After some failures in a row nobody is asked for a while."""

        async def story():
            engine = Engine("a")
            async with with_master(engine, lookup_timeout=50) as (stage, master):
                engine.broken = trouble == "no tokenizer"
                master.hang = trouble == "master hangs"
                if trouble == "master refuses":
                    master.residents = {1: -1}  # no such number of blocks
                with patch("kvpool.proxy.index.HASHING_PART", 1000.0):  # too long for that is none of these failures
                    for number in range(6):
                        assert (await stage.ask({"prompt": f"{number} {WORDS}"})).status == 200
                assert stage.counted("kvpool_proxy_lookups_total", outcome="failed") == 3

        play(story())

    @pytest.mark.parametrize("said", [{}, {"data": None}, {"data": [{"root": "x"}]}, [1], None], ids=str)
    def test_an_instance_that_talks_nonsense_of_its_models_is_the_only_one_not_known(self, said):
        """Others are, before and after it, and those that come later."""

        async def story():
            odd, fine, late = Engine("odd"), Engine("fine"), Engine("late")

            async def models(_):
                return web.json_response(said) if said is not None else web.Response(status=404)

            odd._models = models
            await late.start()
            async with with_master(odd, fine, known_models=1) as (stage, _):
                assert set(stage.proxy._index._models) == {fine.url}
                stage.proxy.fleet.add(Role.BOTH, late.url)
                await until(lambda: late.url in stage.proxy._index._models)
            await late.stop()

        play(story())

    @pytest.mark.parametrize("said", [[], {"tokens": None}, {"tokens": ["a"]}], ids=str)
    def test_a_tokenizer_that_talks_nonsense(self, said):
        """Costs nobody an answer."""

        async def story():
            async def tokenize(_):
                return web.json_response(said)

            engine = Engine("a")
            engine._tokenize = tokenize
            async with with_master(engine) as (stage, _):
                assert (await stage.ask({"prompt": WORDS})).status == 200
                assert stage.counted("kvpool_proxy_lookups_total", outcome="failed") == 1

        play(story())

    def test_a_master_that_names_a_node_which_it_does_not_tell(self):
        """Costs nobody an answer either."""

        async def story():
            engine = Engine("a")
            async with with_master(engine) as (stage, _):

                async def inspect(*_):
                    answer = master_pb2.LookupResponse(prefix=1)
                    answer.runs.add(blocks=1).owners.add(node=7, tier="dram")
                    return answer

                stage.proxy._index._stub.Inspect = inspect
                assert (await stage.ask({"prompt": WORDS})).status == 200
                assert stage.counted("kvpool_proxy_lookups_total", outcome="failed") == 1

        play(story())

    def test_without_a_master(self):
        """Everything works, and the log says why prompts are not looked up."""

        async def story():
            a = Engine("a")
            async with staged(a, master="127.0.0.1:1") as stage:
                assert (await stage.ask({"prompt": WORDS})).status == 200
                assert not a.tokenized

        play(story())
