"""Clients for tests: one that keeps blocks in this process, and one that fails on command.

Both stand in for ``kvpool.Client`` through the setting ``client_factory``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpool.client import GetResult, Lookup, PutResult
from kvpool.client_transfers import Claimed, TransferPart, TransferState
from kvpool.model import Namespace, NodeAddress, pack_keys, split_keys

if TYPE_CHECKING:
    from kvpool.client_lookup import Also
    from kvpool.config import ConnectorSettings

Blocks = Sequence[Any]
"""Per block one buffer, or one buffer per layer."""

WAIT_S = 30.0
"""No test waits longer than this for a gate."""


NODE = NodeAddress("memory", "localhost", 1)
"""Where all blocks of a pool in memory are."""


@dataclass
class MemoryTransfer:
    """What a master knows of a transfer."""

    state: TransferState
    namespaces: tuple[bytes, ...]
    own: set[tuple[bytes, bytes]]
    """Namespaces and keys that are dropped with it."""
    consumer: str = ""
    back: bool = False
    """Given back by its consumer: it ends by itself unless another one claims it."""


@dataclass
class MemoryPool:
    """Blocks of one process, and the leases on them."""

    shards: dict[tuple[bytes, bytes, int], list[bytes]] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    leases_given: int = 0
    resident: dict[bytes, set[bytes]] = field(default_factory=dict)
    """What the engine said that it holds, by namespace."""
    transfers: dict[int, MemoryTransfer] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    """What was said of transfers, but for claims and renewals."""
    layers: dict[int, int] = field(default_factory=dict)
    """How many layers of its latest blocks a transfer has before their commit."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def open_transfers(self) -> list[int]:
        """Those that are not over."""
        over = {TransferState.ENDED, TransferState.UNKNOWN}
        return [
            number for number, transfer in self.transfers.items() if transfer.state not in over and not transfer.back
        ]

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self.shards.clear()
            self.leases.clear()


def _parts(block: Any) -> list[Any]:
    return list(block) if isinstance(block, (list, tuple)) else [block]


def _digest(namespace: Namespace | bytes) -> bytes:
    return namespace.digest if isinstance(namespace, Namespace) else namespace


class MemoryTransfers:
    """A client's word about transfers."""

    def __init__(self, pool: MemoryPool) -> None:
        self._pool = pool
        self.master_is_away = False

    def open(self, transfer: int, parts: Sequence[TransferPart], nodes: Sequence[str], producer: str = "") -> bool:  # noqa: ARG002 -- Transfers' signature
        """Know of a transfer."""
        if self.master_is_away:
            return False
        own = {
            (_digest(part.namespace), key)
            for part in parts
            for key in split_keys(part.keys)[len(part.keys) // 16 - part.drop_last :]
        }
        with self._pool.lock:
            self._pool.calls.append("open")
            namespaces = tuple(_digest(part.namespace) for part in parts)
            self._pool.transfers[transfer] = MemoryTransfer(TransferState.OPEN, namespaces, own)
        return True

    def seal(self, transfer: int, ttl_ms: int) -> bool:  # noqa: ARG002 -- Transfers' signature
        """All is stored."""
        with self._pool.lock:
            self._pool.calls.append("seal")
            known = self._pool.transfers.get(transfer)
            if known is not None and known.state is TransferState.OPEN:
                known.state = TransferState.SEALED
        return known is not None

    def claim(self, transfer: int, consumer: str = "") -> Claimed:
        """Return what is known."""
        if self.master_is_away:
            return Claimed(TransferState.NO_MASTER)
        with self._pool.lock:
            known = self._pool.transfers.get(transfer)
            if known is None:
                return Claimed(TransferState.UNKNOWN)
            known.consumer, known.back = consumer, False
        return Claimed(known.state, known.namespaces, (NODE,))

    def renew(self, transfers: Sequence[int], consumer: str = "") -> list[int]:  # noqa: ARG002 -- Transfers' signature
        """Return those that are over."""
        with self._pool.lock:
            return [number for number in transfers if number not in self._pool.open_transfers]

    def end(self, transfers: Sequence[int], consumer: str = "", *, back: bool = False) -> list[int]:
        """Drop what was theirs alone; return those that were over or unknown."""
        over = []
        with self._pool.lock:
            self._pool.calls.append("end")
            for number in transfers:
                ended = self._pool.transfers.get(number)
                if ended is None or ended.state is TransferState.ENDED:
                    over.append(number)  # a master remembers nothing of what it has never heard of
                    continue
                if consumer and ended.consumer not in {"", consumer}:
                    continue
                if back:
                    ended.back, ended.consumer = True, ""
                    continue
                ended.state = TransferState.ENDED
                others = [t for t in self._pool.transfers.values() if t.state is not TransferState.ENDED]
                wanted = {key for other in others for key in other.own}
                for shard in [shard for shard in self._pool.shards if shard[:2] in ended.own - wanted]:
                    del self._pool.shards[shard]
        return over


class MemoryLayers:
    """A put that gives one layer after the other."""

    def __init__(self, pool: MemoryPool, digest: bytes, keys: list[bytes], shard: int, transfer: int) -> None:
        self._pool = pool
        self._transfer = transfer
        self._names = [(digest, key, shard) for key in keys]
        with pool.lock:
            self.wanted = [number for number, name in enumerate(self._names) if name not in pool.shards]
        self._layers: list[list[bytes]] = [[] for _ in self.wanted]

    def write(self, first_layer: int, end_layer: int, blocks: Blocks) -> None:
        """Keep these layers."""
        for layers, block in zip(self._layers, blocks, strict=True):
            assert len(layers) == first_layer  # noqa: S101 -- part of a test
            layers += [bytes(part) for part in _parts(block)]
            assert len(layers) == end_layer  # noqa: S101 -- as above
        with self._pool.lock:
            self._pool.layers[self._transfer] = end_layer

    def abort(self) -> None:
        """Do nothing: there is nothing to give back."""

    def commit(self) -> PutResult:
        """Show the blocks to everybody."""
        with self._pool.lock:
            for number, layers in zip(self.wanted, self._layers, strict=True):
                self._pool.shards.setdefault(self._names[number], layers)
        return PutResult(len(self.wanted), len(self._names) - len(self.wanted), 0, {})


class MemoryClient:
    """A client whose pool is a dict."""

    def __init__(self, pool: MemoryPool) -> None:
        self.transfers = MemoryTransfers(pool)
        self.own_node: NodeAddress | None = NODE
        self._pool = pool
        self._shards: dict[bytes, int] = {}
        self._threads = ThreadPoolExecutor(2, "memory-client")

    def register(self, namespace: Namespace) -> bytes:
        """Return the digest."""
        self._shards[namespace.digest] = namespace.shards
        return namespace.digest

    def lookup(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        *,
        known_prefix: int = 0,
        lease: bool = False,
        timeout_ms: float | None = None,  # noqa: ARG002 -- Client's signature
        also: Sequence[Also] = (),
        prefetch: bool = False,  # noqa: ARG002 -- Client's signature
    ) -> Lookup:
        """Return the leading blocks of which all shards are here, in every group that needs them."""
        keys = split_keys(pack_keys(hashes))
        with self._pool.lock:
            prefix = known_prefix
            while prefix < len(keys) and self._whole(namespace, keys[prefix]):
                prefix += 1
            while prefix > known_prefix and not all(self._fits(group, keys, known_prefix, prefix) for group in also):
                prefix -= 1
            token = 0
            if lease and prefix > known_prefix:
                self._pool.leases_given += 1
                token = self._pool.leases_given
                self._pool.leases.add(token)
        reason = "complete" if prefix == len(keys) else "not_stored"
        return Lookup(prefix, reason, lease=token, known_prefix=known_prefix)

    def _whole(self, namespace: Namespace | bytes, key: bytes) -> bool:
        shards = namespace.shards if isinstance(namespace, Namespace) else self._shards[namespace]
        return all((_digest(namespace), key, shard) in self._pool.shards for shard in range(shards))

    def _fits(self, group: Also, keys: list[bytes], known: int, prefix: int) -> bool:
        first = max(known, prefix - group.last_blocks) if group.last_blocks else known
        return all(self._whole(group.namespace, key) for key in keys[first:prefix])

    def put(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        blocks: Blocks,
        *,
        shard: int = 0,
        timeout_ms: float | None = None,  # noqa: ARG002 -- Client's signature
        transfer: int = 0,  # noqa: ARG002 -- Client's signature
    ) -> PutResult:
        """Keep copies."""
        digest, keys = _digest(namespace), split_keys(pack_keys(hashes))
        stored = 0
        for key, block in zip(keys, blocks, strict=True):
            copy = [bytes(part) for part in _parts(block)]
            with self._pool.lock:
                stored += self._pool.shards.setdefault((digest, key, shard), copy) is copy
        return PutResult(stored, len(keys) - stored, 0, {})

    def put_layers(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        *,
        shard: int,
        shard_bytes: int,  # noqa: ARG002 -- Client's signature
        transfer: int,
        timeout_ms: float | None = None,  # noqa: ARG002 -- as above
    ) -> MemoryLayers:
        """Keep copies, layer by layer."""
        return MemoryLayers(self._pool, _digest(namespace), split_keys(pack_keys(hashes)), shard, transfer)

    def get(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        blocks: Blocks,
        *,
        shard: int = 0,
        lookup: Lookup | None = None,  # noqa: ARG002 -- Client's signature
        layers: tuple[int, int] | None = None,
        timeout_ms: float | None = None,  # noqa: ARG002 -- Client's signature
    ) -> GetResult:
        """Fill the buffers of the blocks that are here."""
        digest, keys = _digest(namespace), split_keys(pack_keys(hashes))
        ok = []
        for key, block in zip(keys, blocks, strict=True):
            with self._pool.lock:
                kept = self._pool.shards.get((digest, key, shard))
            wanted = kept[slice(*layers)] if kept is not None and layers is not None else kept
            for part, data in zip(_parts(block), wanted or (), strict=kept is not None):
                if isinstance(part, np.ndarray) and not part.flags.c_contiguous:
                    np.copyto(part, np.frombuffer(data, np.uint8).reshape(part.shape))
                else:
                    memoryview(part).cast("B")[:] = data
            ok.append(kept is not None)
        prefix = ok.index(False) if False in ok else len(ok)
        return GetResult(prefix, ok, {} if all(ok) else {"not_stored": ok.count(False)}, {})

    def receive(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        blocks: Blocks,
        *,
        shard: int,
        transfer: int,  # noqa: ARG002 -- Client's signature
        node: NodeAddress,
        alive: Callable[[], bool],
        timeout_ms: float,
    ) -> GetResult:
        """Fill the buffers of the blocks that are here, and wait for the others while somebody stores them."""
        assert node == NODE  # noqa: S101 -- part of a test
        deadline = time.monotonic() + timeout_ms / 1000
        last = False
        while True:
            result = self.get(namespace, hashes, blocks, shard=shard)
            if last or result.prefix == len(result.ok) or time.monotonic() > deadline:
                return result
            time.sleep(0.005)
            last = not alive()

    def lookup_async(self, *args: Any, **kwargs: Any) -> Future[Lookup]:
        """Look up on a thread."""
        return self._threads.submit(self.lookup, *args, **kwargs)

    def renew(self, leases: Sequence[int]) -> list[int]:
        """Return the leases that live on."""
        with self._pool.lock:
            return [lease for lease in leases if lease in self._pool.leases]

    def release(self, leases: Sequence[int]) -> None:
        """Give leases back."""
        with self._pool.lock:
            self._pool.leases.difference_update(leases)

    def has_node(self) -> bool:
        """There is always room."""
        return True

    def reads_files(self) -> bool:
        """There are none."""
        return False

    def stats(self) -> dict[str, int]:
        """Count nothing."""
        return {}

    def unusable_nodes(self) -> set[str]:
        """There is no node."""
        return set()

    def announce_engine(self, **said: Any) -> None:
        """Tell nobody."""

    def report_residency(
        self, namespace: Namespace | bytes, added: bytes = b"", removed: bytes = b"", cleared: bool = False
    ) -> None:
        """Keep what the engine holds."""
        held = self._pool.resident.setdefault(_digest(namespace), set())
        if cleared:
            held.clear()
        held.difference_update(split_keys(removed))
        held.update(split_keys(added))

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown()


class Gate:
    """A door that calls pass through; a closed one holds them until it opens, or for ``WAIT_S``."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.arrived = threading.Event()

    def close(self) -> None:
        """Hold whoever comes from now on."""
        self.arrived.clear()
        self._open.clear()

    @property
    def closed(self) -> bool:
        """Whether it holds who comes."""
        return not self._open.is_set()

    def open(self) -> None:
        """Let everybody through."""
        self._open.set()

    def pass_through(self) -> None:
        """Wait for the door."""
        self.arrived.set()
        self._open.wait(WAIT_S)


class Faults:
    """What ``FaultyClient`` does wrong; tests set it while an engine runs in their process."""

    def __init__(self) -> None:
        self.lookup_gate, self.get_gate, self.put_gate, self.receive_gate = Gate(), Gate(), Gate(), Gate()
        self.reset()

    def reset(self) -> None:
        """Do nothing wrong, and let everybody through who waits."""
        for gate in (self.lookup_gate, self.get_gate, self.put_gate, self.receive_gate):
            gate.open()
            gate.arrived.clear()
        self.get_blocks_max: int | None = None
        self.gets_max: int | None = None
        self.spoil_rest = False
        self.raises: dict[str, Exception] = {}
        self.before_get: Callable[[], None] = lambda: None
        self.gets = self.puts = self.lookups = self.receives = 0


class FaultyClient:
    """Any client, with faults before its answers."""

    def __init__(self, inner: Any, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._threads = ThreadPoolExecutor(2, "faulty-client")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _enter(self, name: str, gate: Gate) -> None:
        setattr(self._faults, name + "s", getattr(self._faults, name + "s") + 1)
        gate.pass_through()
        if name in self._faults.raises:
            raise self._faults.raises[name]

    def lookup(self, *args: Any, **kwargs: Any) -> Lookup:
        """Look up, behind the gate."""
        self._enter("lookup", self._faults.lookup_gate)
        found: Lookup = self._inner.lookup(*args, **kwargs)
        return found

    def lookup_async(self, *args: Any, **kwargs: Any) -> Future[Lookup]:
        """Look up on a thread, behind the gate."""
        return self._threads.submit(self.lookup, *args, **kwargs)

    def put(self, *args: Any, **kwargs: Any) -> PutResult:
        """Put, behind the gate."""
        self._enter("put", self._faults.put_gate)
        result: PutResult = self._inner.put(*args, **kwargs)
        return result

    def get(self, namespace: Any, hashes: Any, blocks: Blocks, **kwargs: Any) -> GetResult:
        """Get, behind the gate; what is beyond ``gets_max`` calls, or ``get_blocks_max`` blocks of each, fails.

        With ``spoil_rest`` it is garbage, too.
        """
        self._enter("get", self._faults.get_gate)
        self._faults.before_get()
        return self._cut(self._inner.get(namespace, hashes, blocks, **kwargs), blocks)

    def receive(self, namespace: Any, hashes: Any, blocks: Blocks, **kwargs: Any) -> GetResult:
        """Receive, behind the gate; what is beyond ``get_blocks_max`` fails, as in ``get``."""
        self._enter("receive", self._faults.receive_gate)
        return self._cut(self._inner.receive(namespace, hashes, blocks, **kwargs), blocks)

    def _cut(self, result: GetResult, blocks: Blocks) -> GetResult:
        keep = self._faults.get_blocks_max
        if self._faults.gets_max is not None and self._faults.gets > self._faults.gets_max:
            keep = 0
        if keep is None or keep >= result.prefix:
            return result
        if self._faults.spoil_rest:
            for part in (part for block in blocks[keep:] for part in _parts(block)):
                np.asarray(part).fill(0x7F)
        ok = [good and i < keep for i, good in enumerate(result.ok)]
        return GetResult(keep, ok, {"injected": len(ok) - keep}, result.tiers)

    def close(self) -> None:
        """Close the inner client."""
        self._threads.shutdown()
        self._inner.close()


POOL = MemoryPool()
FAULTS = Faults()


def memory_client(settings: ConnectorSettings, name: str) -> FaultyClient:  # noqa: ARG001 -- the setting's signature
    """Return a faulty client on this process's own pool; for the setting ``client_factory``."""
    return FaultyClient(MemoryClient(POOL), FAULTS)


def faulty_client(settings: ConnectorSettings, name: str) -> FaultyClient:
    """Return a faulty client on a real pool; for the setting ``client_factory``."""
    from kvpool_vllm.settings import make_client

    return FaultyClient(make_client(settings, name), FAULTS)
