"""The client library: look up, put, get. Connectors, benchmarks and the command line are built on it.

Whatever goes wrong with the pool is a miss with a reason, never an exception; exceptions are for callers
who ask for what cannot be. Nearest first: this host's own node through shared memory, then other nodes
over TCP. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Self

from kvpool.client_bytes import Blocks, Buffer, CopyThreads, keys_at
from kvpool.client_files import StorageGuards, only_in_files, storage_name
from kvpool.client_gets import Call, Gets, result_of
from kvpool.client_health import BreakerOpenError, Health
from kvpool.client_layers import LayeredPut
from kvpool.client_lookup import Also, lookup_at_node, lookup_frame
from kvpool.client_master import MasterLink, leases_frame
from kvpool.client_node import LocalNode
from kvpool.client_own import OwnNode
from kvpool.client_peers import Peers
from kvpool.client_puts import Puts
from kvpool.client_receive import Receives
from kvpool.client_results import GetResult, Lookup, PutResult, Run, lookup_from_proto
from kvpool.client_threads import Threads
from kvpool.client_transfers import Transfers
from kvpool.config import boot_id
from kvpool.errors import InvalidArgumentError, KVPoolError, UnavailableError
from kvpool.model import DIGEST_BYTES, KEY_BYTES, Namespace, NodeAddress, Reason, pack_keys
from kvpool.transport.channel import time_left

__all__ = ["Client", "GetResult", "LayeredPut", "Lookup", "PutResult", "Run"]

log = logging.getLogger(__name__)

TASK_THREADS = 4
"""For what is asked for by ``..._async``, and for attaching to a node."""

CONNECT_S = 1.5
"""How long a new client waits to know whether there is a pool."""

LEASE_S = 0.25
"""Of renewing and releasing, for which nobody waits: late is better than a channel given up."""

PREFETCH_S = 0.01
"""Of asking this host's node to read ahead, for which nobody waits."""

TRANSFER_BYTES_S_MIN = 100 << 20
"""A transfer's deadline grows with its size at this rate."""


class Client:
    """A connection to the pool. Thread-safe; make a new one in a forked child.

    ``master``: host:port, None for this host's node alone. ``node``: unix socket of this host's node,
    None to ask the master for it. ``checksum``: "always", or "transfer" to leave out verifying what came
    through this host's shared memory. Times are in milliseconds. Who fails ``breaker_failures`` times in a
    row is left alone, and asked in the background every ``breaker_probe_interval_ms`` until it answers.
    """

    def __init__(  # noqa: PLR0913 -- a pool's settings, all but the first by name
        self,
        master: str | None = "127.0.0.1:50088",
        *,
        node: str | None = None,
        checksum: str = "always",
        copy_threads: int = 2,
        lookup_timeout_ms: float = 40,
        transfer_timeout_ms: float = 1000,
        connect_timeout_ms: float = 400,
        breaker_failures: int = 3,
        breaker_probe_interval_ms: float = 1000,
        name: str = "",
    ) -> None:
        if checksum not in {"always", "transfer"}:
            raise InvalidArgumentError("checksum", f'must be "always" or "transfer", not {checksum!r}')
        if not 1 <= copy_threads <= 64:
            raise InvalidArgumentError("copy_threads", f"must be from 1 to 64, not {copy_threads}")
        if not 1 <= breaker_failures <= 1000:
            raise InvalidArgumentError("breaker_failures", f"must be from 1 to 1000, not {breaker_failures}")
        self._verify_local = checksum == "always"
        self._lookup_s = _seconds(lookup_timeout_ms, "lookup_timeout_ms")
        self._transfer_s = _seconds(transfer_timeout_ms, "transfer_timeout_ms")
        self._name = name or f"pid {os.getpid()}"
        self._tasks = Threads(TASK_THREADS, "kvpool-client")
        self._copies = CopyThreads(copy_threads)
        self._health = Health(breaker_failures, _seconds(breaker_probe_interval_ms, "breaker_probe_interval_ms"))
        self._namespaces: dict[bytes, Namespace] = {}
        self._link: MasterLink | None = None
        self._own = OwnNode(
            node, self._name, self._namespaces.values, lambda: self._link.nodes if self._link is not None else None,
            self._tasks.submit, self._transfer_s,
        )  # fmt: skip
        self._near = self._health.guard("this host", self._probe_local)
        self._storage = StorageGuards(self._health)
        self._peers = Peers(self._health, _seconds(connect_timeout_ms, "connect_timeout_ms"))
        self._gets = Gets(
            self._peers, self._storage, self._copies, self._local, lambda: self._own.id, self._ask_for_get,
            verify_local=self._verify_local,
        )  # fmt: skip
        self._counters: Counter[str] = Counter()
        self._puts = Puts(self._peers, self._copies, self._local, lambda: self._own.id, self._place, self._counters)
        self._receives = Receives(self._peers, self._copies, self._local)
        if master is not None:
            self._link = MasterLink(master, self._name, self._look_around, self._health, self._lookup_s)
        self.transfers = Transfers(self._link)
        """Prompts on their way from a prefilling engine to a decoding one."""
        if self._link is None or not self._link.wait_tried(CONNECT_S):
            self._own.attach()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Let go of everything; calls that still run end as misses."""
        self._health.close()
        if self._link is not None:
            self._link.close()
        self._own.close()
        self._tasks.close(wait=False)
        self._peers.close()
        self._copies.close()

    def register(self, namespace: Namespace) -> bytes:
        """Announce a namespace and return its digest; idempotent, and remembered while the pool is away."""
        return self._register(namespace, time.monotonic() + self._transfer_s)

    def _register(self, namespace: Namespace, until: float) -> bytes:
        """Announce a namespace; who has not answered by then is told by another thread."""
        digest = namespace.digest
        if digest not in self._namespaces:
            self._namespaces[digest] = namespace
            node = self._local()
            if node is not None and not self._tell(node, namespace, until - time.monotonic()):
                with contextlib.suppress(RuntimeError):  # no thread can be started: its next put tells it
                    self._tasks.submit(self._tell, node, namespace, self._transfer_s)
            if self._link is not None:
                self._link.register(namespace, until - time.monotonic())
        return digest

    def _tell(self, node: LocalNode, namespace: Namespace, timeout_s: float) -> bool:
        """Announce a namespace to a node; False when it has not taken it, and will not be told as it is attached."""
        try:
            if timeout_s > 0 and node.alive:
                node.register(namespace, timeout_s)
        except KVPoolError as exc:
            log.debug("cannot announce the namespace to %s: %s", node.path, exc)
            return not node.alive
        return timeout_s > 0

    def has_node(self) -> bool:
        """Return whether a node of this host is attached."""
        return self._local() is not None

    @property
    def own_node_id(self) -> str:
        """The id of the node of this host that is attached, "" without one."""
        node = self._local()
        return node.node_id if node is not None else ""

    @property
    def own_node(self) -> NodeAddress | None:
        """Where the node of this host that is attached can be reached, None without one; what is known of it yet."""
        node = self._local()
        if node is None:
            return None
        known = self._link.nodes if self._link is not None else []
        alone = NodeAddress(node.node_id, socket_path=node.path, boot_id=boot_id())
        return next((address for address in known if address.node_id == node.node_id), alone)

    def reads_files(self) -> bool:
        """Return whether this host's node has storage behind it. Quick."""
        node = self._own.node
        return node is not None and node.alive and bool(node.backends)

    def stats(self) -> dict[str, int]:
        """Return the counters since the start: hits by tier, bytes, misses and failures by reason, breakers."""
        return {**self._counters, **self._health.counters()}

    def unusable_nodes(self) -> set[str]:
        """Return who is not asked now because they have failed, by the names that ``storages`` has. Quick."""
        own = self._own
        lost = {own.id} if own.id and (own.node is None or not own.node.alive) else set()
        return lost | self._peers.unusable() | self._storage.unusable() if self._health.troubled else lost

    def storages(self, address: NodeAddress, backend: bytes) -> list[tuple[str, ...]]:
        """Return who would read a backend's files for this host: ids and places of nodes, and names of their way to it.

        ``address``: the node that a lookup names.
        """
        node = self._own.node
        own = node.node_id if node is not None and node.serves(backend, address.node_id) else ""
        found: list[tuple[str, ...]] = [(own, storage_name(own, backend))] if own else []
        if own != address.node_id:
            found.append((address.node_id, address.place, storage_name(address.place, backend)))
        return found

    def warnings(self) -> list[str]:
        """Return what the master said about the namespaces registered here: other engines hash differently."""
        return list(self._link.warnings) if self._link is not None else []

    def report_residency(
        self, namespace: Namespace | bytes, added: bytes = b"", removed: bytes = b"", cleared: bool = False
    ) -> None:
        """Say what the engine has in its own memory: cleared, then keys that went, and came. Never waits."""
        if self._link is not None:
            self._link.residency.report(namespace, added, removed, cleared=cleared)

    def announce_engine(self, **said: Any) -> None:
        """Say that this process is an engine, by the fields of ``EngineAnnouncement``, until ``close``. Never waits.

        What is said later is added. ":PORT" as address means this host's address on its way to the master.
        """
        if self._link is not None:
            self._link.announcer.say(**said)

    # ---- lookup ----------------------------------------------------------------------------------

    def lookup(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        *,
        known_prefix: int = 0,
        lease: bool = False,
        timeout_ms: float | None = None,
        also: Sequence[Also] = (),
        prefetch: bool = False,
    ) -> Lookup:
        """Return how much of a prompt the pool holds. ``hashes``: the chain, packed (16 bytes a block) or a list.

        The first ``known_prefix`` blocks are the engine's own: touched, not checked. With ``lease`` the
        blocks found are protected from eviction until released, or for the master's lease TTL. ``also``: the
        other KV cache groups of a hybrid model, which a prefix must satisfy too. With ``prefetch`` this host's
        node begins to read what only files have. Raises InvalidArgumentError.
        """
        timeout_s = self._lookup_s if timeout_ms is None else _seconds(timeout_ms, "timeout_ms")
        begun = time.monotonic()
        announced_by = begun + timeout_s / 2  # the question itself needs some time too
        digest = self._digest(namespace, announced_by)
        keys = pack_keys(hashes)
        if not 0 <= known_prefix <= len(keys) // KEY_BYTES:
            raise InvalidArgumentError("known_prefix", f"must be from 0 to {len(keys) // KEY_BYTES}")
        for group in also:
            self._register(group.namespace, announced_by)
        frame = lookup_frame(digest, also, known_prefix, lease=lease)
        if self._link is not None:
            try:
                reply = self._link.ask(frame, keys, time_left(begun + timeout_s)).lookup
            except InvalidArgumentError:
                raise
            except BreakerOpenError:
                self._counters["lookup.breaker_open"] += 1
                return self._lookup_locally(digest, keys, known_prefix, Reason.BREAKER_OPEN.value, also)
            except KVPoolError as exc:
                self._counters["lookup.failed"] += 1
                log.debug("lookup: %s", exc)
            else:
                found = lookup_from_proto(reply, known_prefix)
                if prefetch:
                    self._prefetch(digest, keys, found)
                return found
        return self._lookup_locally(digest, keys, known_prefix, Reason.MASTER_UNREACHABLE.value, also)

    def _prefetch(self, digest: bytes, keys: bytes, lookup: Lookup) -> None:
        node = self._local()
        if node is None or not node.backends:
            return
        for (backend, node_id, shards), numbers in only_in_files(lookup).items():
            if node.serves(backend, node_id):
                wanted = keys_at(keys, numbers)
                try:
                    node.prefetch(digest, wanted, shards, backend, PREFETCH_S)
                except KVPoolError as exc:
                    log.debug("prefetch: %s", exc)
                    return
                self._counters["prefetch.blocks"] += len(numbers)

    def _ask_for_get(self, namespace: Namespace, keys: bytes, timeout_s: float) -> Lookup:
        return self.lookup(namespace, keys, timeout_ms=max(1.0, 1000 * timeout_s))

    def _lookup_locally(
        self, digest: bytes, keys: bytes, known_prefix: int, why: str, also: Sequence[Also]
    ) -> Lookup:
        nothing = Lookup(known_prefix, why if why == "breaker_open" else "no_pool", known_prefix=known_prefix)
        node, namespace = self._local(), self._namespaces.get(digest)
        if node is None or namespace is None:
            return nothing
        try:
            with self._near.call():
                return lookup_at_node(node, namespace, also, keys, known_prefix, why)
        except KVPoolError as exc:
            log.debug("local lookup: %s", exc)
            return nothing

    def renew(self, leases: Sequence[int]) -> list[int]:
        """Start the TTL of leases anew; returns those that are over, all of them while the master is away."""
        return self._leases("renew", leases)

    def release(self, leases: Sequence[int]) -> None:
        """End leases; those that do not reach the master end by their TTL."""
        self._leases("release", leases)

    def _leases(self, kind: str, leases: Sequence[int]) -> list[int]:
        wanted = [lease for lease in leases if lease]
        if not wanted or self._link is None:
            return wanted
        try:
            return list(self._link.ask(leases_frame(kind, wanted), b"", LEASE_S).lease.unknown)
        except KVPoolError as exc:
            log.debug("%s: %s", kind, exc)
            return wanted

    # ---- put -------------------------------------------------------------------------------------

    def put(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        blocks: Sequence[Buffer | Sequence[Buffer]],
        *,
        shard: int = 0,
        timeout_ms: float | None = None,
        transfer: int = 0,
    ) -> PutResult:
        """Store one shard of each block, in this host's node or else in one that the master names.

        ``blocks[i]``: the shard's bytes as one buffer, or as ``namespace.shard_layers`` equal ones.
        ``transfer``: what these blocks belong to, above 0, if somebody waits for them with ``receive``. Raises
        InvalidArgumentError, UnknownNamespaceError is not: register the namespace first.
        """
        space = self._namespace(namespace)
        keys = pack_keys(hashes)
        wrapped = Blocks(blocks, keys, space.shard_layers, writable=False)
        _check_shard(space, shard)
        _check_transfer(transfer, 0)
        if not len(wrapped):
            return PutResult()
        timeout_s = self._transfer_time(wrapped, timeout_ms)
        return self._puts.run(space, keys, wrapped, shard, timeout_s, transfer)

    def put_layers(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        *,
        shard: int,
        shard_bytes: int,
        transfer: int,
        timeout_ms: float | None = None,
    ) -> LayeredPut | None:
        """Reserve room for one shard of each block, to be written a few layers at a time and committed at the end.

        Who receives the same ``transfer`` has each layer as soon as it is written. None when this host has no node
        that could take it now: put the blocks as a whole later. Raises as ``put``.
        """
        space = self._namespace(namespace)
        _check_shard(space, shard)
        _check_transfer(transfer, 1)
        if shard_bytes < 1 or shard_bytes % space.shard_layers:
            raise InvalidArgumentError("shard_bytes", f"must be a multiple of {space.shard_layers} layers")
        timeout_s = self._transfer_s if timeout_ms is None else _seconds(timeout_ms, "timeout_ms")
        return self._puts.layers(space, pack_keys(hashes), (shard, shard_bytes, transfer), timeout_s)

    def _place(self, shard_bytes: int, timeout_s: float) -> NodeAddress | None:
        if self._link is None:
            raise UnavailableError("no node on this host, and no master to name another")
        return self._link.place(shard_bytes, min(timeout_s, self._transfer_s))

    # ---- get -------------------------------------------------------------------------------------

    def get(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        blocks: Sequence[Buffer | Sequence[Buffer]],
        *,
        shard: int = 0,
        lookup: Lookup | None = None,
        layers: tuple[int, int] | None = None,
        timeout_ms: float | None = None,
    ) -> GetResult:
        """Fill the buffers with one shard of each block, nearest owner first, verified by checksum.

        ``lookup``: an earlier answer for a chain that begins with these hashes (after its
        ``known_prefix``), so that the master need not be asked again. ``layers``: (first, end) of the
        shard's layers to read. Buffers of blocks that are not ``ok`` hold anything. Raises
        InvalidArgumentError.
        """
        space = self._namespace(namespace)
        keys = pack_keys(hashes)
        first, end = (0, space.shard_layers) if layers is None else layers
        if not 0 <= first < end <= space.shard_layers:
            raise InvalidArgumentError("layers", f"must lie within 0 and {space.shard_layers}, not {first} to {end}")
        wrapped = Blocks(blocks, keys, end - first, writable=True)
        _check_shard(space, shard)
        if not len(wrapped):
            return GetResult(0, [], {}, {})
        deadline = time.monotonic() + self._transfer_time(wrapped, timeout_ms)
        call = Call(space, keys, wrapped, shard, first, deadline, ["not_here"] * len(wrapped))
        return result_of(call, self._gets.run(call, lookup), self._counters)

    def receive(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        blocks: Sequence[Buffer | Sequence[Buffer]],
        *,
        shard: int,
        transfer: int,
        node: NodeAddress,
        alive: Callable[[], bool],
        timeout_ms: float,
    ) -> GetResult:
        """Fill the buffers with one shard of each block while a transfer writes them to a node, layer by layer.

        ``alive`` is asked whenever a second went by in which nothing came; False ends it after one more look. Whatever
        goes wrong ends the prefix: ``not_here``, ``late`` (the time is over), ``corrupt``, ``wrong_size``,
        ``unavailable`` (the node), ``overloaded``, ``breaker_open``, ``refused``. Bytes are always
        verified. Raises as ``get``.
        """
        space = self._namespace(namespace)
        keys = pack_keys(hashes)
        wrapped = Blocks(blocks, keys, space.shard_layers, writable=True)
        _check_shard(space, shard)
        _check_transfer(transfer, 1)
        deadline = time.monotonic() + _seconds(timeout_ms, "timeout_ms")
        if not len(wrapped):
            return GetResult(0, [], {}, {})
        call = Call(space, keys, wrapped, shard, 0, deadline, ["not_here"] * len(wrapped))
        tier = self._receives.run(call, transfer, node, alive)
        return result_of(call, {tier: call.reasons.count("")}, self._counters)

    # ---- futures ---------------------------------------------------------------------------------

    def lookup_async(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        *,
        known_prefix: int = 0,
        lease: bool = False,
        timeout_ms: float | None = None,
        also: Sequence[Also] = (),
        prefetch: bool = False,
    ) -> Future[Lookup]:
        """``lookup`` on a thread of the client's. Raises RuntimeError when there is none, or the client is closed."""
        return self._tasks.submit(
            self.lookup, namespace, hashes, known_prefix=known_prefix, lease=lease, timeout_ms=timeout_ms, also=also,
            prefetch=prefetch,
        )  # fmt: skip

    def put_async(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        blocks: Sequence[Buffer | Sequence[Buffer]],
        *,
        shard: int = 0,
        timeout_ms: float | None = None,
        transfer: int = 0,
    ) -> Future[PutResult]:
        """``put`` on a thread of the client's; leave the buffers alone until it is done. Raises as ``lookup_async``."""
        return self._tasks.submit(
            self.put, namespace, hashes, blocks, shard=shard, timeout_ms=timeout_ms, transfer=transfer
        )

    def get_async(
        self,
        namespace: Namespace | bytes,
        hashes: bytes | Sequence[bytes],
        blocks: Sequence[Buffer | Sequence[Buffer]],
        *,
        shard: int = 0,
        lookup: Lookup | None = None,
        layers: tuple[int, int] | None = None,
        timeout_ms: float | None = None,
    ) -> Future[GetResult]:
        """``get`` on a thread of the client's; leave the buffers alone until it is done. Raises as ``lookup_async``."""
        return self._tasks.submit(
            self.get, namespace, hashes, blocks, shard=shard, lookup=lookup, layers=layers, timeout_ms=timeout_ms
        )

    # ---- inside ----------------------------------------------------------------------------------

    def _digest(self, namespace: Namespace | bytes, until: float | None = None) -> bytes:
        if isinstance(namespace, Namespace):
            return self.register(namespace) if until is None else self._register(namespace, until)
        if len(namespace) != DIGEST_BYTES:
            raise InvalidArgumentError("namespace", f"a digest has {DIGEST_BYTES} bytes, not {len(namespace)}")
        return namespace

    def _namespace(self, namespace: Namespace | bytes) -> Namespace:
        digest = self._digest(namespace)
        known = self._namespaces.get(digest)
        if known is None:
            raise InvalidArgumentError("namespace", f"{digest.hex()} was never registered with this client")
        return known

    def _transfer_time(self, blocks: Blocks, timeout_ms: float | None) -> float:
        if timeout_ms is not None:
            return _seconds(timeout_ms, "timeout_ms")
        return self._transfer_s + len(blocks) * blocks.shard_bytes / TRANSFER_BYTES_S_MIN

    def _local(self) -> LocalNode | None:
        return self._own.get()

    def _look_around(self) -> None:
        self._own.attach()
        if self._link is not None:  # else it is being made
            self._peers.named(self._link.nodes)
            self._storage.keep(self._own.id)

    def _probe_local(self) -> None:
        node = self._own.node
        if node is not None and node.alive:  # otherwise it is the attaching that probes
            node.probe()


def _seconds(timeout_ms: float, field: str) -> float:
    if not 0 < timeout_ms <= 86_400_000:  # refuses nan too
        raise InvalidArgumentError(field, f"must be above 0 and at most a day, not {timeout_ms}")
    return timeout_ms / 1000


def _check_shard(namespace: Namespace, shard: int) -> None:
    if not 0 <= shard < namespace.shards:
        raise InvalidArgumentError("shard", f"this namespace has shards 0 to {namespace.shards - 1}, not {shard}")


def _check_transfer(transfer: int, least: int) -> None:
    if not least <= transfer < 1 << 64:
        raise InvalidArgumentError("transfer", f"must be from {least} to 2**64 - 1, not {transfer}")
