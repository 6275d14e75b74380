"""The scheduler side's view of how the pool does: which answers are worth a load, and what to tell about it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvpool.config import boot_id
from kvpool_vllm.events import Residency
from kvpool_vllm.gate import Gate
from kvpool_vllm.tally import Tally

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvpool.client import Client, Lookup
    from kvpool.config import ConnectorSettings
    from kvpool.model import Namespace, NodeAddress
    from kvpool_vllm.events import PoolEvents
    from kvpool_vllm.metadata import LoadJob, LoadSeen, WorkerMeta
    from kvpool_vllm.tally import Data

FILES = "fs"
TIERS = ("pool", "local", "remote", FILES)
"""Where blocks come from, nearest first; "pool" when it is not known. The farthest one rules a load's time."""

GONE = frozenset({"not_stored", "not_whole"})
"""Answers that say for certain that the next block is not there."""


def farthest(tiers: Mapping[str, int]) -> str:
    """Return the tier that ruled a load, given the blocks that came from each."""
    return max((tier for tier, blocks in tiers.items() if blocks and tier in TIERS), key=TIERS.index, default=TIERS[0])


class Watch:
    """Judges lookups, measures loads and steps, counts, and passes events on."""

    def __init__(
        self,
        client: Client,
        settings: ConnectorSettings,
        counters: Counter[str],
        block_tokens: int,
    ) -> None:
        self.events: PoolEvents | None = None
        """Set where somebody listens."""
        self.residency: Residency | None = None
        self._client = client
        self._counters = counters
        self._block_tokens = block_tokens
        self._gate = Gate(enabled=settings.gate != "off")
        self._prefetch = settings.prefetch
        self._unusable: dict[int, frozenset[str]] = {}
        self._seen: dict[str, LoadSeen] = {}
        self._tally = Tally("scheduler")
        self._boot_id = boot_id()
        self._pool: Any = None

    # ---- lookups -----------------------------------------------------------------------------------

    def worth(self, lookup: Lookup, chain: Sequence[bytes]) -> int:
        """Return how many leading blocks of an answer to use; ask once an answer, because it is counted.

        Left out are blocks of which every owner is left alone by some rank, and loads slower than computing.
        """
        missing = len(chain) - lookup.prefix
        if missing > 0:
            self._counters[f"miss.{lookup.reason}"] += missing
            if self.events is not None and lookup.reason in GONE:
                self.events.missing(chain[lookup.prefix])
        prefix, in_memory, tier = self._reachable(lookup)
        if prefix < lookup.prefix:
            self._counters["miss.breaker_open"] += lookup.prefix - prefix
        if in_memory < prefix:  # what has to be read is judged by itself: without it the rest may be worth it
            if self._gate.allows(FILES, (prefix - in_memory) * self._block_tokens):
                return prefix
            prefix = in_memory
        blocks = prefix - lookup.known_prefix
        if blocks > 0 and not self._gate.allows(tier, blocks * self._block_tokens):
            return lookup.known_prefix
        return prefix

    def reads_ahead(self, tokens: int) -> bool:
        """Whether to have a prompt's blocks read from files before they are loaded."""
        return self._prefetch and self._client.reads_files() and not self._gate.loses(FILES, tokens)

    def _reachable(self, lookup: Lookup) -> tuple[int, int, str]:
        """Return the leading blocks that somebody who answers has, those of them before any file, and these' tier."""
        if not lookup.runs:
            return lookup.prefix, lookup.prefix, TIERS[0]
        unusable = self._client.unusable_nodes().union(*self._unusable.values())
        prefix, in_memory, tiers = lookup.known_prefix, None, dict.fromkeys(TIERS, 0)
        for run in lookup.runs:
            near = [
                self._tier(address, tier)
                for address, tier, _, backend in run.owners
                if self._is_usable(address, backend, unusable)
            ]
            if not near:
                break
            tier = min(near, key=TIERS.index)
            if tier == FILES and in_memory is None:
                in_memory = prefix
            if in_memory is None:
                tiers[tier] += run.blocks
            prefix += run.blocks
        prefix = min(prefix, lookup.prefix)
        return prefix, prefix if in_memory is None else in_memory, farthest(tiers)

    def _is_usable(self, address: NodeAddress, backend: bytes, unusable: set[str]) -> bool:
        if not backend:
            return unusable.isdisjoint((address.node_id, address.place))
        return any(unusable.isdisjoint(names) for names in self._client.storages(address, backend))

    def _tier(self, address: NodeAddress, tier: str) -> str:
        if tier != "dram":
            return FILES
        here = address.boot_id == self._boot_id if address.boot_id else not address.port
        return "local" if here else "remote"

    # ---- what the workers tell ---------------------------------------------------------------------

    def worker_report(self, meta: WorkerMeta) -> None:
        """Take over what the ranks saw; call it before the loads that it reports are ended."""
        self._unusable.update(meta.unusable)
        self._seen.update(meta.seen)

    def load_ended(self, job: LoadJob, arrived: int) -> None:
        """Count a load of which ``arrived`` blocks came on every rank."""
        seen = self._seen.pop(job.request_id, None)
        if seen is None or not arrived:
            return
        tokens = max(len(part.block_ids) for part in job.parts) * self._block_tokens * arrived // job.blocks
        counts = seen.tiers or {TIERS[0]: arrived}
        total = sum(counts.values())
        for tier, count in counts.items():
            self._counters[f"hit_tokens.{tier}"] += round(tokens * count / total)
        if job.transfer:
            return  # it may have waited for the engine that computes it
        if arrived == job.blocks or counts.get(FILES):  # slow storage shows in loads that are cut short, too
            self._gate.loaded(farthest(counts), tokens, seen.seconds)

    def report_residency(self, group: int = 0) -> None:
        """Tell the pool from now on what the engine holds of a KV cache group; its block pool makes events."""
        self.residency = Residency(self._client, group)

    def saving(self, job_id: int, request: Any, hashes: Sequence[bytes], first: int, parent: bytes | None) -> None:
        """A save begins of the request's blocks from number ``first`` on."""
        if self.events is not None:
            self.events.saving(job_id, request, hashes, first, parent)

    def saved(self, job_id: int, *, stored: bool) -> None:
        """A save has ended on every rank; ``stored``: well, on every one."""
        if self.events is not None:
            self.events.saved(job_id, stored=stored)

    def forget_namespace(self) -> None:
        """What was stored so far is left behind."""
        if self.events is not None:
            self.events.forget()

    def finished(self, request: Any) -> None:
        """A request has ended."""
        if self.residency is not None:
            self.residency.finished(request.request_id)

    # ---- steps -------------------------------------------------------------------------------------

    def bind_block_pool(self, pool: Any) -> None:
        """Take the engine's block pool, whose events tell what the engine holds."""
        self._pool = pool

    def cached_blocks(self, hashes: Sequence[bytes], group: int) -> int:
        """Return how many leading blocks the engine's own cache holds, as if it never lost one in the middle."""
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if self._pool.get_cached_block(hashes[middle], [group]):
                low = middle + 1
            else:
                high = middle
        return low

    def step_planned(self, running: Iterable[tuple[Any, int]], hashes: Callable[[Any], Sequence[bytes]]) -> None:
        """A step was planned: so many tokens of each request; ``hashes`` returns one for each of its blocks."""
        prefill = 0
        for request, tokens in running:
            if tokens > 1:  # others only decode
                computed = request.num_computed_tokens
                prefill += max(0, min(computed + tokens, request.num_prompt_tokens) - computed)
            if self.residency is not None:
                self.residency.scheduled(request.request_id, hashes(request))
        self._gate.step_planned(time.monotonic(), prefill)

    def step_ended(self, namespace: Namespace | None, queues: Mapping[str, int]) -> Data | None:
        """The oldest planned step has ended: return what to tell vLLM's metrics, None where nothing changed.

        Call it before vLLM publishes its own events. ``queues``: blocks or jobs on their way, by name.
        """
        self._gate.step_ended(time.monotonic())
        if self.residency is not None:
            self.residency.collect(self._pool.kv_event_queue)
            self.residency.report(namespace)
        gauges: dict[str, float] = {f"queue_depth.{name}": depth for name, depth in queues.items()}
        gauges |= {f"tokens_per_second.{name}": round(speed) for name, speed in self._gate.estimates().items()}
        return self._tally.take({**self._counters, **self._gate.counters, **self._client.stats()}, gauges)

    def take_events(self) -> list[Any]:
        """Return vLLM's events about the pool since the last call."""
        return self.events.take() if self.events is not None else []
