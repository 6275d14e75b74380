"""Between the wire's messages and the state machines' own, in both directions: sessions and lookups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from kvpool.core import messages as core
from kvpool.core.lookup import Answer, Group, Query, Rule
from kvpool.core.residency import Report
from kvpool.errors import FrameError, InvalidArgumentError
from kvpool.model import BACKEND_BYTES, DIGEST_BYTES, KEY_BYTES, SHARD_BYTES_MAX, NodeAddress
from kvpool.rpc.convert import (
    REASONS,
    address_from_proto,
    address_to_proto,
    backend_from_proto,
    backend_to_proto,
    mask_from_bytes,
    mask_to_bytes,
    namespace_from_proto,
    namespace_to_proto,
)
from kvpool.rpc.v1 import master_pb2, node_pb2, types_pb2


def run_to_proto(run: core.BlockRun) -> types_pb2.BlockRun:
    """Return a run as a message."""
    return types_pb2.BlockRun(
        namespace=run.namespace,
        shards=mask_to_bytes(run.shards),
        shard_bytes=run.shard_bytes,
        keys=run.keys,
        commanded=run.commanded,
        backend=run.backend,
    )


def run_from_proto(message: types_pb2.BlockRun) -> core.BlockRun:
    """Return a run. Raises InvalidArgumentError."""
    if len(message.namespace) != DIGEST_BYTES:
        raise InvalidArgumentError("namespace", f"must be {DIGEST_BYTES} bytes, not {len(message.namespace)}")
    if len(message.keys) % KEY_BYTES:
        raise InvalidArgumentError("keys", f"must be a multiple of {KEY_BYTES} bytes, not {len(message.keys)}")
    if not 0 <= message.shard_bytes <= SHARD_BYTES_MAX:
        raise InvalidArgumentError("shard_bytes", f"must be from 0 to {SHARD_BYTES_MAX}")
    if len(message.backend) not in {0, BACKEND_BYTES}:
        raise InvalidArgumentError("backend", f"must be empty or {BACKEND_BYTES} bytes, not {len(message.backend)}")
    shards = mask_from_bytes(message.shards)
    return core.BlockRun(
        message.namespace, shards, message.shard_bytes, message.keys, message.commanded, message.backend
    )


def runs_to_proto(runs: Iterable[core.BlockRun]) -> list[types_pb2.BlockRun]:
    """Return runs as messages."""
    return [run_to_proto(run) for run in runs]


def runs_from_proto(messages: Iterable[types_pb2.BlockRun]) -> tuple[core.BlockRun, ...]:
    """Return runs. Raises InvalidArgumentError."""
    return tuple(run_from_proto(m) for m in messages)


def backend_id(data: bytes) -> bytes:
    """Return a backend's id as it is. Raises InvalidArgumentError."""
    if len(data) != BACKEND_BYTES:
        raise InvalidArgumentError("backend", f"must be {BACKEND_BYTES} bytes, not {len(data)}")
    return data


# ---- session -----------------------------------------------------------------------------------------


def node_message_to_proto(message: core.NodeMessage) -> node_pb2.NodeMessage:
    """Return a node's message for the wire."""
    if isinstance(message, core.Hello):
        return node_pb2.NodeMessage(
            hello=node_pb2.Hello(
                address=address_to_proto(message.address),
                epoch=message.epoch,
                capacity_bytes=message.capacity_bytes,
                used_bytes=message.used_bytes,
                sequence=message.sequence,
                master_epoch=message.master_epoch,
                namespaces=[namespace_to_proto(n) for n in message.namespaces],
                backends=[backend_to_proto(b) for b in message.backends],
                kept_by=message.kept_by,
                generation=message.generation,
            )
        )
    if isinstance(message, core.Inventory):
        return node_pb2.NodeMessage(
            inventory=node_pb2.Inventory(
                sequence=message.sequence,
                chunk=message.chunk,
                last=message.last,
                added=runs_to_proto(message.added),
            )
        )
    if isinstance(message, core.Delta):
        return node_pb2.NodeMessage(
            delta=node_pb2.Delta(
                sequence=message.sequence,
                added=runs_to_proto(message.added),
                removed=runs_to_proto(message.removed),
                used_bytes=message.used_bytes,
                evictions_done=message.evictions_done,
                namespaces=[namespace_to_proto(n) for n in message.namespaces],
            )
        )
    if isinstance(message, core.Probed):
        return node_pb2.NodeMessage(probed=node_pb2.Probed(id=message.id, states=message.states))
    if isinstance(message, core.Storage):
        storage = node_pb2.Storage(backends=[backend_to_proto(b) for b in message.backends])
        return node_pb2.NodeMessage(storage=storage)
    if isinstance(message, core.Scanned):
        return node_pb2.NodeMessage(
            scanned=node_pb2.Scanned(
                backend=message.backend,
                last=message.last,
                files=message.files,
                files_expected=message.files_expected,
                added=runs_to_proto(message.added),
                namespaces=[namespace_to_proto(n) for n in message.namespaces],
                error=message.error,
            )
        )
    if isinstance(message, core.FilesRemoved):
        removed = node_pb2.FilesRemoved(id=message.id, gone=runs_to_proto(message.gone))
        return node_pb2.NodeMessage(files_removed=removed)
    return node_pb2.NodeMessage(
        heartbeat=node_pb2.Heartbeat(used_bytes=message.used_bytes, sequence=message.sequence)
    )


def node_message_from_proto(message: node_pb2.NodeMessage) -> core.NodeMessage:
    """Return a node's message. Raises InvalidArgumentError, FrameError for an empty one."""
    body = message.WhichOneof("body")
    if body == "hello":
        hello = message.hello
        return core.Hello(
            address_from_proto(hello.address),
            hello.epoch,
            hello.capacity_bytes,
            hello.used_bytes,
            hello.sequence,
            hello.master_epoch,
            tuple(namespace_from_proto(n) for n in hello.namespaces),
            tuple(backend_from_proto(b) for b in hello.backends),
            hello.kept_by,
            hello.generation,
        )
    if body == "inventory":
        inventory = message.inventory
        return core.Inventory(
            inventory.sequence, inventory.chunk, inventory.last, runs_from_proto(inventory.added)
        )
    if body == "delta":
        delta = message.delta
        return core.Delta(
            delta.sequence,
            runs_from_proto(delta.added),
            runs_from_proto(delta.removed),
            delta.used_bytes,
            delta.evictions_done,
            tuple(namespace_from_proto(n) for n in delta.namespaces),
        )
    if body == "heartbeat":
        return core.Heartbeat(message.heartbeat.used_bytes, message.heartbeat.sequence)
    if body == "probed":
        return core.Probed(message.probed.id, message.probed.states)
    if body == "storage":
        return core.Storage(tuple(backend_from_proto(b) for b in message.storage.backends))
    if body == "scanned":
        scanned = message.scanned
        return core.Scanned(
            backend_id(scanned.backend),
            scanned.last,
            scanned.files,
            scanned.files_expected,
            runs_from_proto(scanned.added),
            tuple(namespace_from_proto(n) for n in scanned.namespaces),
            scanned.error[:1024],
        )
    if body == "files_removed":
        return core.FilesRemoved(message.files_removed.id, runs_from_proto(message.files_removed.gone))
    raise FrameError("a node message without a body")


def master_message_to_proto(message: core.MasterMessage) -> node_pb2.MasterMessage:
    """Return a master's message for the wire."""
    if isinstance(message, core.Welcome):
        return node_pb2.MasterMessage(
            welcome=node_pb2.Welcome(
                master_epoch=message.master_epoch, resume_after=message.resume_after, inventory=message.inventory
            )
        )
    if isinstance(message, core.Victims):
        return node_pb2.MasterMessage(victims=node_pb2.Victims(blocks=runs_to_proto(message.blocks)))
    if isinstance(message, core.Evict):
        return node_pb2.MasterMessage(evict=node_pb2.Evict(id=message.id, blocks=runs_to_proto(message.blocks)))
    if isinstance(message, core.Superseded):
        return node_pb2.MasterMessage(superseded=node_pb2.Superseded())
    if isinstance(message, core.SendInventory):
        return node_pb2.MasterMessage(send_inventory=node_pb2.SendInventory())
    if isinstance(message, core.Probe):
        probe = node_pb2.Probe(id=message.id, namespace=message.namespace, keys=message.keys)
        return node_pb2.MasterMessage(probe=probe)
    if isinstance(message, core.RemoveFiles):
        remove = node_pb2.RemoveFiles(id=message.id, backend=message.backend, blocks=runs_to_proto(message.blocks))
        return node_pb2.MasterMessage(remove_files=remove)
    if isinstance(message, core.LookForFiles):
        look = node_pb2.LookForFiles(id=message.id, backend=message.backend, blocks=runs_to_proto(message.blocks))
        return node_pb2.MasterMessage(look_for_files=look)
    if isinstance(message, core.Scan):
        return node_pb2.MasterMessage(scan=node_pb2.Scan(backend=message.backend))
    if isinstance(message, core.StorageLimits):
        limits = [node_pb2.StorageLimits.Limit(backend=backend, full=True) for backend in sorted(message.full)]
        return node_pb2.MasterMessage(storage_limits=node_pb2.StorageLimits(limits=limits))
    if isinstance(message, core.Keep):
        keep = node_pb2.Keep(keep=runs_to_proto(message.keep), release=runs_to_proto(message.release))
        return node_pb2.MasterMessage(keep=keep)
    return node_pb2.MasterMessage(ack=node_pb2.Ack(sequence=message.sequence, generation=message.generation))


def master_message_from_proto(message: node_pb2.MasterMessage) -> core.MasterMessage:
    """Return a master's message. Raises InvalidArgumentError, FrameError for an empty one."""
    body = message.WhichOneof("body")
    if body == "welcome":
        welcome = message.welcome
        return core.Welcome(welcome.master_epoch, welcome.resume_after, welcome.inventory)
    if body == "victims":
        return core.Victims(runs_from_proto(message.victims.blocks))
    if body == "evict":
        return core.Evict(message.evict.id, runs_from_proto(message.evict.blocks))
    if body == "superseded":
        return core.Superseded()
    if body == "send_inventory":
        return core.SendInventory()
    if body == "ack":
        return core.Ack(message.ack.sequence, message.ack.generation)
    if body == "probe":
        return core.Probe(message.probe.id, message.probe.namespace, message.probe.keys)
    if body == "remove_files":
        remove = message.remove_files
        return core.RemoveFiles(remove.id, backend_id(remove.backend), runs_from_proto(remove.blocks))
    if body == "look_for_files":
        look = message.look_for_files
        return core.LookForFiles(look.id, backend_id(look.backend), runs_from_proto(look.blocks))
    if body == "scan":
        return core.Scan(backend_id(message.scan.backend))
    if body == "storage_limits":
        full = [backend_id(limit.backend) for limit in message.storage_limits.limits if limit.full]
        return core.StorageLimits(frozenset(full))
    if body == "keep":
        return core.Keep(runs_from_proto(message.keep.keep), runs_from_proto(message.keep.release))
    raise FrameError("a master message without a body")


# ---- lookup ------------------------------------------------------------------------------------------


def query_from_proto(request: master_pb2.LookupRequest, keys: bytes | memoryview) -> Query:
    """Return a lookup's query. Raises InvalidArgumentError for a rule that does not exist."""
    if request.groups:
        try:
            groups = tuple(Group(g.namespace, Rule(g.rule), g.last_n) for g in request.groups)
        except ValueError as exc:
            raise InvalidArgumentError("groups.rule", "must be FULL, LAST_N or LAST") from exc
    else:
        groups = (Group(request.namespace),)
    return Query(groups, keys, request.known_prefix, request.lease)


def answer_to_proto(
    answer: Answer, reach: Callable[[int], tuple[NodeAddress, bytes] | None]
) -> master_pb2.LookupResponse:
    """Return a lookup's answer; ``reach`` gives an incarnation's address and backend, None when out of reach."""
    response = master_pb2.LookupResponse(
        prefix=answer.prefix, lease=answer.lease, reason=REASONS[answer.reason], detail=answer.detail
    )
    reached: dict[int, tuple[int, bytes] | None] = {}  # by incarnation: index into nodes, backend
    numbers: dict[str, int] = {}
    told: dict[int, Sequence[master_pb2.LookupResponse.Owner]] = {}  # by placement: many runs may lie at few places
    for blocks, placement in answer.runs:
        run = response.runs.add(blocks=blocks)
        if (before := told.get(id(placement))) is not None:
            run.owners.extend(before)
            continue
        told[id(placement)] = run.owners
        for owner in placement.owners:
            if owner.incarnation not in reached:
                found = reach(owner.incarnation)
                reached[owner.incarnation] = None
                if found is not None:
                    address, backend = found
                    if address.node_id not in numbers:
                        numbers[address.node_id] = len(numbers)
                        response.nodes.append(address_to_proto(address))
                    reached[owner.incarnation] = numbers[address.node_id], backend
            if (there := reached[owner.incarnation]) is not None:
                run.owners.add(node=there[0], tier=owner.tier, shards=mask_to_bytes(owner.shards), backend=there[1])
    return response


def report_from_proto(request: master_pb2.ResidencyRequest, keys: bytes | memoryview) -> Report:
    """Return an engine's report."""
    return Report(
        request.owner,
        request.engine,
        request.sequence,
        request.first,
        request.namespace,
        request.cleared,
        request.removed,
        request.bye,
        keys,
    )
