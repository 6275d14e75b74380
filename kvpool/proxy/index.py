"""What the pool's master knows of a prompt: which engine holds it itself, whose node does, and whether the pool does.

The prompt's tokens come from an instance (``/tokenize``), its keys are computed here as the engines do. Where any of
it is not to be had in time, nobody waits: what was sent where is enough to route by.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc

from kvpool.config import ProxySettings
from kvpool.model import Namespace
from kvpool.proxy import chains
from kvpool.proxy.discovery import Discovery
from kvpool.proxy.fleet import Fleet, read_all
from kvpool.proxy.prompts import CHAT, Asked, alone
from kvpool.proxy.routing import Held, Instance
from kvpool.rpc.convert import namespace_from_proto
from kvpool.rpc.v1 import admin_pb2, admin_pb2_grpc, master_pb2

log = logging.getLogger(__name__)

REFRESH_S: Final = 2.0
"""How often namespaces and models are asked for."""

REFRESH_TIMEOUT_S: Final = 2.0
FAILURES_MAX: Final = 3
QUIET_S: Final = 5.0
"""After so many failures in a row, for so long nobody is asked."""

HASHING_PART: Final = 0.5
"""Of the time for a lookup: so much of it may go into a prompt's keys."""

SPACES_MAX: Final = 4
"""Namespaces of one model that are looked through."""

TOKENIZED_MAX: Final = 512
TOKENIZED_TOKENS_MAX: Final = 1 << 22
"""Prompts, and tokens of all of them, whose tokens are remembered."""

ANSWER_BYTES_MAX: Final = 64 << 20

_TEMPLATE = ("tools", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt's real length, and what instances hold of it, by URL, of those that have announced themselves."""

    tokens: int
    held: Mapping[str, Held]


class PoolIndex:
    """Asks instances and the master. ``start`` and ``close`` belong to the loop that it is used on."""

    def __init__(
        self, fleet: Fleet, settings: ProxySettings, channel: grpc.aio.Channel, discovery: Discovery
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._discovery = discovery
        self._stub = admin_pb2_grpc.AdminStub(channel)
        self._seed = settings.hash_seed or chains.SEED
        self._spaces: dict[str, list[Namespace]] = {}
        self._taken: set[bytes] = set()
        self._models: dict[str, dict[str, str]] = {}  # of each instance: names it serves a model under -> its label
        self._tokenized: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()
        self._tokens = 0
        self._failures = 0
        self._quiet_until = 0.0
        self._said: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.create_task(self._refresh())

    async def close(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def find(self, path: str, asked: Asked) -> Known | None:
        """Return what is known of a prompt; None where that is nothing, or could not be told in time."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._quiet_until:
            return None
        outcomes = self._fleet.metrics.lookups
        try:
            async with asyncio.timeout(self._settings.lookup_timeout / 1000):
                known = await self._find(path, asked)
        except Exception as exc:  # whatever it was, and whoever said nonsense: the request goes on without
            outcomes.labels("failed").inc()
            self._failures += 1
            if self._failures >= FAILURES_MAX:
                self._failures = 0
                self._quiet_until = loop.time() + QUIET_S
            self._say(f"the pool cannot be asked where prompts lie: {_words(exc)}")
            return None
        self._failures = 0
        outcomes.labels("unknown" if known is None else "found" if known.held else "nothing").inc()
        return known

    # ---- one prompt ------------------------------------------------------------------------------------

    async def _find(self, path: str, asked: Asked) -> Known | None:
        body = asked.body
        if not asked.divisible or body.get("cache_salt") or _has_media(body):
            return None  # the engines' hashes cover more than tokens then
        serving = [one for one in self._fleet.router.instances.values() if one.up and not one.leaving]
        labels = {one.name: self._label(one, body.get("model")) for one in serving}
        label = next((label for label in labels.values() if label), "")
        spaces = self._spaces.get(label, [])[:SPACES_MAX]
        if not spaces:
            return None
        alike = [one for one in serving if labels[one.name] == label]
        tokens = await self._tokens_of(path, body, alike)
        if tokens is None or min(tokens, default=0) < 0:
            return None
        held: dict[str, Held] = {}
        for space in spaces:
            keys = await self._keys(space, tokens)
            if keys is None:
                return None
            if keys:
                request = master_pb2.LookupRequest(namespace=space.digest, hashes=keys)
                answer = await self._stub.Inspect(request, timeout=self._settings.lookup_timeout / 1000)
                self._read(answer, space, len(tokens), alike, held)
        return Known(len(tokens), held)

    async def _keys(self, space: Namespace, tokens: Sequence[int]) -> bytes | None:
        """Return a prompt's keys, None where that takes too long: no failure of the pool. Others have their turns."""
        loop, keys = asyncio.get_running_loop(), bytearray()
        end = loop.time() + HASHING_PART * self._settings.lookup_timeout / 1000
        for some in chains.key_slices(space, tokens, self._seed):
            keys += some
            await asyncio.sleep(0)
            if loop.time() > end:
                return None
        return bytes(keys)

    def _read(
        self, answer: Any, space: Namespace, tokens: int, alike: Iterable[Instance], held: dict[str, Held]
    ) -> None:
        """Say what those instances hold whose engines use this namespace."""
        size = space.block_tokens
        whole, cached_max = tokens // size, (tokens - 1) // size  # of its own cache an engine uses all but a token
        own_blocks: dict[str, int] = {}
        for resident in answer.residents:
            url = self._discovery.urls.get(resident.owner, "")
            first = next((part.blocks for part in resident.ranges if part.first == 0), 0)
            own_blocks[url] = max(first, own_blocks.get(url, 0))
        for one in alike:
            told = self._discovery.of(one)
            if told is not None and space.digest in told.namespaces:
                near = pool = own = min(own_blocks.get(one.name, 0), cached_max)
                if told.loads and not 0 < whole == own:  # a partial block alone it computes, wherever that lies
                    near = _near(answer, own, told.boot_ids)
                    pool = max(answer.prefix, near)
                own, near, pool = (min(blocks * size, tokens) for blocks in (own, near, pool))
                held[one.name] = Held(own, near, pool, told.residency, size)

    def _label(self, instance: Instance, model: Any) -> str:
        models = self._models.get(instance.name, {})
        return models.get(model, "") if isinstance(model, str) else next(iter(models.values()), "")

    async def _tokens_of(self, path: str, body: Mapping[str, Any], alike: Sequence[Instance]) -> tuple[int, ...] | None:
        """Return a prompt's tokens, from an instance that serves its model; None where it has none.

        Raises aiohttp.ClientError, ValueError.
        """
        prompt = None if path == CHAT else alone(body["prompt"])
        if isinstance(prompt, list):
            return tuple(prompt)
        wanted = ("messages", *_TEMPLATE) if path == CHAT else ("prompt",)
        question = {name: body[name] for name in ("model", "add_special_tokens", *wanted) if name in body}
        if prompt is not None:
            question["prompt"] = prompt
        raw = json.dumps(question).encode()
        name = hashlib.blake2b(raw, digest_size=16).digest()
        found = self._tokenized.get(name)
        if found is not None:
            self._tokenized.move_to_end(name)
            return found
        one = min(alike, key=lambda one: (one.backlog, one.requests))
        headers = {"Content-Type": "application/json"} | self._authorization()
        async with self._fleet.session.post(f"{one.name}/tokenize", data=raw, headers=headers) as answer:
            text = await read_all(answer.content, ANSWER_BYTES_MAX)
            if 400 <= answer.status < 500 and answer.status not in {401, 403, 404, 429}:
                return None  # the client's mistake, which an engine will explain
            if answer.status != 200:
                raise ValueError(f"{one.name}/tokenize: status {answer.status}")
        listed = json.loads(text).get("tokens")
        if not isinstance(listed, list) or set(map(type, listed)) - {int}:
            raise ValueError(f"{one.name}/tokenize: no tokens")
        tokens = tuple(listed)  # what is kept in tuples is not walked through by every garbage collection
        before = self._tokenized.pop(name, ())  # who asked the same meanwhile
        self._tokenized[name] = tokens
        self._tokens += len(tokens) - len(before)
        while len(self._tokenized) > TOKENIZED_MAX or self._tokens > TOKENIZED_TOKENS_MAX:
            self._tokens -= len(self._tokenized.popitem(last=False)[1])
        return tokens

    def _authorization(self) -> dict[str, str]:
        key = self._settings.api_key
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    # ---- what changes slowly ---------------------------------------------------------------------------

    async def _refresh(self) -> None:
        while True:
            try:
                request = admin_pb2.NamespacesRequest()
                answer = await self._stub.Namespaces(request, timeout=REFRESH_TIMEOUT_S)
                if {status.digest for status in answer.namespaces} != self._taken:
                    self._take([namespace_from_proto(status.descriptor) for status in answer.namespaces])
            except Exception as exc:  # nonsense too: this goes on as long as the proxy
                self._say(f"the pool cannot be asked where prompts lie: {_words(exc)}")
            up = [one for one in self._fleet.router.instances.values() if one.up]
            await asyncio.gather(*(self._learn(one) for one in up if not self._models.get(one.name)))
            there = {one.name for one in self._fleet.router.instances.values() if one.up}
            self._models = {name: models for name, models in self._models.items() if name in there}
            await asyncio.sleep(REFRESH_S)

    def _take(self, namespaces: Sequence[Namespace]) -> None:
        """Keep the namespaces whose keys can be computed, one KV cache group each."""
        self._taken = {one.digest for one in namespaces}
        spaces: dict[str, list[Namespace]] = {}
        models = [replace(one, kv_group="") for one in namespaces]
        groups: dict[Namespace, set[str]] = {}
        for model, one in zip(models, namespaces, strict=True):
            groups.setdefault(model, set()).add(one.kv_group)
        for model, one in zip(models, namespaces, strict=True):
            if len(groups[model]) > 1:
                continue  # of a hybrid model: what lies of one group says too little
            if chains.can_hash(one, self._seed):
                spaces.setdefault(one.model, []).append(one)
            else:
                self._say(
                    f"hashes of {one.model} ({one.hash_algorithm}) cannot be computed here: its engines have another "
                    "PYTHONHASHSEED, which --hash_seed is to name, or hash in a way that is not known"
                )
        self._spaces = spaces

    async def _learn(self, instance: Instance) -> None:
        """Ask an instance for its models; what one of them answers is no other's trouble."""
        url = f"{instance.name}/v1/models"
        try:
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                async with self._fleet.session.get(url, headers=self._authorization()) as answer:
                    text = await read_all(answer.content, ANSWER_BYTES_MAX)
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            listed = json.loads(text).get("data")
            models = {m["id"]: m["root"] for m in listed if m.get("root") and not m.get("parent")}
        except Exception as exc:  # nonsense too
            self._say(f"{url} does not tell which models there are: {_words(exc)}")
            return
        self._models[instance.name] = {name: str(root).rstrip("/").rpartition("/")[2] for name, root in models.items()}

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _near(answer: Any, own: int, boot_ids: Collection[str]) -> int:
    """Return how many blocks an instance can have from itself and from the node on its host."""
    near, end = own, 0
    for run in answer.runs:
        begin, end = end, end + run.blocks
        if end <= near:
            continue
        here = any(
            owner.tier == "dram" and answer.nodes[owner.node].boot_id in boot_ids for owner in run.owners
        )
        if begin > near or not here:
            break
        near = end
    return near


def _has_media(body: Mapping[str, Any]) -> bool:
    messages = body.get("messages")
    said = messages if isinstance(messages, list) else ()  # elsewhere than in a chat nobody has looked at it
    contents = [message.get("content") for message in said if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(not isinstance(part, dict) or part.get("type") != "text" for part in parts)


def _words(exc: BaseException) -> str:
    if isinstance(exc, grpc.aio.AioRpcError):
        return f"{exc.code().name}: {exc.details()}"
    return str(exc) or type(exc).__name__


