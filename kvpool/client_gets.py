"""Where a get finds its blocks, nearest first: this host's node, other nodes' memory, files."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpool.client_bytes import Blocks, CopyThreads, keys_at
from kvpool.client_files import StorageGuards, judge, part_blocks
from kvpool.client_health import Guard
from kvpool.client_node import LocalNode
from kvpool.client_peers import Peers, Source, Want, Wanted
from kvpool.client_results import GetResult, Lookup
from kvpool.client_switching import held_switching, quick_switching
from kvpool.errors import InvalidArgumentError, KVPoolError, UnavailableError
from kvpool.model import KEY_BYTES, Namespace
from kvpool.transport.sockets import TICK_S

log = logging.getLogger(__name__)

LOOKUP_S = 0.25
"""Of a get that was given no lookup: it may wait longer than a scheduler."""

NO_MASTER = frozenset({"master_unreachable", "breaker_open", "no_pool"})
"""Answers that know of this host's node alone."""

ELSEWHERE = frozenset({"owner_lost", "storage_down", "breaker_open", "no_room", "overloaded", "refused"})
"""Reasons for which another node that serves the same storage is worth asking."""

BAD_FILE = frozenset({"file_missing", "file_corrupt", "wrong_size"})


@dataclass(slots=True)
class Call:
    """One get under way: what is wanted, until when, and "" or a miss reason for each block so far."""

    space: Namespace
    keys: bytes
    blocks: Blocks
    shard: int
    first_layer: int
    deadline: float
    reasons: list[str]

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def missing(self) -> list[int]:
        """Return the numbers of the blocks that are not there yet."""
        return [number for number, reason in enumerate(self.reasons) if reason]

    def key(self, number: int) -> bytes:
        """Return a block's key."""
        return self.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]

    def note(self, number: int, reason: str) -> None:
        """Take an answer; that a node does not have a block says less than what is known already."""
        if reason != "not_here" or self.reasons[number] == "not_here":
            self.reasons[number] = reason


class Gets:
    """Finds the blocks of gets."""

    def __init__(
        self,
        peers: Peers,
        storage: StorageGuards,
        copies: CopyThreads,
        local: Callable[[], LocalNode | None],
        own_id: Callable[[], str],
        ask: Callable[[Namespace, bytes, float], Lookup],
        *,
        verify_local: bool,
    ) -> None:
        """``local``: this host's node; ``own_id``: its id, even while it is lost; ``ask``: a lookup within seconds."""
        self._peers = peers
        self._storage = storage
        self._copies = copies
        self._local = local
        self._own_id = own_id
        self._ask = ask
        self._verify_local = verify_local

    def run(self, call: Call, lookup: Lookup | None) -> dict[str, int]:
        """Fill what can be had until the deadline; returns how many blocks came from where. Sets ``call.reasons``."""
        node = self._local()
        if node is not None:
            with held_switching if call.blocks.simple else quick_switching:
                self._get_locally(call, node)
        tiers = {"local": call.reasons.count("")}
        if tiers["local"] < len(call.reasons):
            with quick_switching:
                tiers |= self._get_from_others(call, lookup)
        return tiers

    def _get_from_others(self, call: Call, lookup: Lookup | None) -> dict[str, int]:
        """Fill what is not in this host's memory; returns how many blocks came from where."""
        if lookup is None:
            lookup = self._ask(call.space, call.keys, min(call.left_s, LOOKUP_S))
        elif lookup.reason in NO_MASTER:
            return {}
        sources = self._sources(call, lookup)
        tiers = {"remote": self._get_remotely(call, [[s for s in some if not s.backend] for some in sources])}
        files = [[s for s in some if s.backend] for some in sources]
        if any(files):
            tiers["fs"] = self._get_files(call, files)
            tried = {source for some in files for source in some}
            if any(call.reasons[n] in ELSEWHERE for n in range(len(files)) if files[n]) and call.left_s > 0:
                tiers["fs"] += self._get_elsewhere(call, tried)
        return tiers

    def _get_locally(self, call: Call, node: LocalNode) -> None:
        try:
            call.reasons = node.get(
                call.space, call.keys, call.blocks, call.shard, call.first_layer, self._verify_local,
                self._copies, call.left_s,
            )  # fmt: skip
        except InvalidArgumentError:
            raise
        except KVPoolError as exc:
            log.debug("local get: %s", exc)

    def _sources(self, call: Call, lookup: Lookup) -> list[list[Source]]:
        """Return who has each block; notes the reason of those that nobody has."""
        sources: list[list[Source]] = []
        for run in lookup.runs:
            some = [Source(address, backend) for address, _, shards, backend in run.owners if call.shard in shards]
            sources += [some] * min(run.blocks, len(call.reasons) - len(sources))
        for number in range(len(sources), len(call.reasons)):
            if call.reasons[number] == "not_here":
                call.reasons[number] = lookup.reason if lookup.reason != "complete" else "not_stored"
        return sources

    def _get_remotely(self, call: Call, sources: Sequence[Sequence[Source]]) -> int:
        """Fetch what is still missing from these nodes, this host's left out; returns how many blocks came."""
        own = self._own_id()
        wanted = []
        for number, some in enumerate(sources):
            if call.reasons[number] and some:
                owners = [s for s in some if s.address.node_id != own and s.address.port]
                wanted.append(Wanted(number, call.key(number), call.blocks.pieces[number], owners))
        if not wanted:
            return 0
        want = Want(call.shard, call.first_layer, call.blocks.layers, call.blocks.layer_bytes)
        found = self._peers.get(call.space.digest, wanted, want, self._copies, call.left_s)
        for number, reason in found.items():
            call.note(number, reason)
        return sum(not reason for reason in found.values())

    # ---- files -----------------------------------------------------------------------------------------

    def _get_files(self, call: Call, files: Sequence[Sequence[Source]]) -> int:
        """Read what is still missing from files: by this host's node if it serves their storage, else by others."""
        node, came = self._local(), 0
        if node is not None:
            by_backend: dict[bytes, list[int]] = {}
            for number, some in enumerate(files):
                if call.reasons[number]:
                    mine = [s.backend for s in some if node.serves(s.backend, s.address.node_id)]
                    if mine:
                        by_backend.setdefault(mine[0], []).append(number)
            for backend, numbers in by_backend.items():
                came += self._fetch(call, node, backend, numbers)
        # A file that is missing or broken is so for everybody.
        rest = [some if call.reasons[number] not in BAD_FILE else [] for number, some in enumerate(files)]
        return came + self._get_remotely(call, rest) if call.left_s > 0 else came

    def _fetch(self, call: Call, node: LocalNode, backend: bytes, numbers: list[int]) -> int:
        guard = self._guard(call, node, backend)
        if not guard.closed:
            guard.rejected += 1
            for number in numbers:
                call.note(number, "breaker_open")
            return 0
        size = part_blocks(len(numbers), call.blocks.shard_bytes, node.part_bytes())
        parts = [numbers[at : at + size] for at in range(0, len(numbers), size)]
        asked = [(keys_at(call.keys, part), call.blocks.some(part)) for part in parts]
        seen: list[str] = []
        try:
            place = (call.shard, call.first_layer)
            for reasons in node.fetch(
                call.space.digest, asked, place, backend, self._verify_local, self._copies, call.deadline
            ):
                seen += reasons
        except KVPoolError as exc:
            log.debug("files behind this host's node: %s", exc)
            why = "storage_timeout" if call.left_s <= TICK_S else "owner_lost"
            seen += [why if isinstance(exc, UnavailableError) else "refused"] * (len(numbers) - len(seen))
        for number, reason in zip(numbers, seen, strict=True):
            call.note(number, reason)
        judge(guard, seen)
        return seen.count("")

    def _guard(self, call: Call, node: LocalNode, backend: bytes) -> Guard:
        digest = call.space.digest

        def probe() -> None:
            present = self._local()
            if present is not None:  # else it is the attaching that probes
                present.probe_storage(digest, backend)

        return self._storage.of(node.node_id, backend, probe)

    def _get_elsewhere(self, call: Call, tried: set[Source]) -> int:
        """Ask the master once more, which names another node if more than one serves the storage."""
        lookup = self._ask(call.space, call.keys, min(call.left_s, LOOKUP_S))
        if lookup.reason in NO_MASTER or call.left_s <= 0:
            return 0
        others = [[s for s in some if s.backend and s not in tried] for some in self._sources(call, lookup)]
        return self._get_remotely(call, others)


def result_of(call: Call, tiers: dict[str, int], counters: Counter[str]) -> GetResult:
    """Count a get that has ended, and return its result."""
    reasons, block_bytes = call.reasons, call.blocks.shard_bytes
    ok = [not reason for reason in reasons]
    prefix = ok.index(False) if False in ok else len(ok)
    counts = Counter(reason for reason in reasons if reason) if prefix < len(ok) else {}
    for tier, blocks in tiers.items():
        counters[f"get.{tier}_blocks"] += blocks
        counters[f"get.{tier}_bytes"] += blocks * block_bytes
    for reason, blocks in counts.items():
        counters[f"miss.{reason}"] += blocks
    return GetResult(prefix, ok, dict(counts), {t: n for t, n in tiers.items() if n})
