"""What kvpoolctl prints: each answer as plain data with stable keys, and as a table for people."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvpool.model import format_size, mask_shards
from kvpool.rpc.v1 import admin_pb2, master_pb2, types_pb2

PIPE_WIDTH = 1 << 16
"""Wider than any row: what is piped is folded nowhere."""

_IDENTIFIERS = frozenset({"namespace", "id", "block", "key", "pin"})
"""Headings of columns that other commands are given: they are whole, however narrow the terminal is."""


def print_json(data: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(data, indent=2))


def plain(value: object) -> Text:
    """Return text that came from elsewhere without markup or control characters."""
    return Text("".join(c if c.isprintable() else "?" for c in str(value)))


def console() -> Console:
    """Return where tables go: as wide as the terminal, or where there is none as wide as it takes."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers stand right."""
    table = Table(title=title or None, title_justify="left")
    body = [list(row) for row in rows]
    for column, heading in enumerate(headings):
        numbers = bool(body) and all(isinstance(row[column], (int, float)) for row in body)
        justify: Literal["right", "left"] = "right" if numbers else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading in _IDENTIFIERS)
    for row in body:
        table.add_row(*(plain(value) for value in row))
    console().print(table)


def seconds(value: float) -> str:
    """Return a duration for people."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"


def share(used: int, capacity: int) -> str:
    """Return a part of a capacity for people."""
    return f"{format_size(used)} of {format_size(capacity)} ({used / capacity:.1%})" if capacity else format_size(used)


# ---- status ----------------------------------------------------------------------------------------


def status_data(reply: admin_pb2.StatusResponse) -> dict[str, Any]:
    """Return the pool's status as plain data."""
    return {
        "version": reply.version,
        "master_epoch": f"{reply.master_epoch:016x}",
        "uptime_s": reply.uptime_s,
        "blocks": reply.blocks,
        "leases": reply.leases,
        "leased_blocks": reply.leased_blocks,
        "nodes_live": reply.nodes_live,
        "nodes_known": reply.nodes_known,
        "capacity_bytes": reply.capacity_bytes,
        "used_bytes": reply.used_bytes,
        "warming": reply.warming,
        "counters": dict(sorted(reply.counters.items())),
        "settings": dict(sorted(reply.settings.items())),
        "warnings": list(reply.warnings),
        "removals": reply.removals,
        "removals_max": reply.removals_max,
        "transfers": reply.transfers,
        "transfer_blocks": reply.transfer_blocks,
        "engines_announced": reply.engines_announced,
        "engines": reply.engines,
        "engine_blocks": reply.engine_blocks,
        "backends": [backend_data(backend) for backend in reply.backends],
    }


def print_status(reply: admin_pb2.StatusResponse) -> None:
    """Print the pool's status for people."""
    warming = "  (warming: nodes are still reporting what they hold)" if reply.warming else ""
    rows = [
        ("version", reply.version),
        ("uptime", seconds(reply.uptime_s)),
        ("nodes", f"{reply.nodes_live} live of {reply.nodes_known} known"),
        ("blocks", f"{reply.blocks}{warming}"),
        ("memory", share(reply.used_bytes, reply.capacity_bytes)),
        ("leases", f"{reply.leases} on {reply.leased_blocks} blocks"),
        ("transfers", f"{reply.transfers} under way, {reply.transfer_blocks} blocks held for them"),
        ("engines", f"{reply.engines_announced}; {reply.engines} report {reply.engine_blocks} own blocks (hbm)"),
        ("removals kept", f"{reply.removals} of {reply.removals_max}"),
    ]
    print_table("Pool", ("", ""), rows)
    if reply.backends:
        print_backends([backend_data(backend) for backend in reply.backends])
    for warning in reply.warnings:
        click.echo(plain(f"warning: {warning}").plain)
    if reply.counters:
        print_table("Counters since start", ("counter", "value"), sorted(reply.counters.items()))
    if reply.settings:
        print_table("Settings", ("setting", "value"), sorted(reply.settings.items()))


# ---- backends --------------------------------------------------------------------------------------


def state_name(state: types_pb2.Backend.State) -> str:
    """Return a backend's state in a word: up, down, read_only."""
    value = types_pb2.Backend.State.DESCRIPTOR.values_by_number.get(state)
    return value.name.lower() if value is not None else f"state_{state}"


def backend_id(id_: bytes) -> str:
    """Return a backend's id as its kvpool.json has it; "" for none."""
    return str(uuid.UUID(bytes=id_)) if id_ else ""


def backend_data(backend: admin_pb2.BackendStatus) -> dict[str, Any]:
    """Return one storage backend, as the master knows it, as plain data."""
    return {
        "id": backend_id(backend.id),
        "url": backend.url,
        "state": state_name(backend.state),
        "reason": backend.reason,
        "capacity_bytes": backend.capacity_bytes,
        "used_bytes": backend.used_bytes,
        "blocks": backend.blocks,
        "removing_bytes": backend.removing_bytes,
        "full": backend.full,
        "complete": backend.complete,
        "scanning": backend.scanning,
        "scanned_files": backend.scanned_files,
        "scan_expected": backend.scan_expected,
        "servers": [
            {
                "node": server.node,
                "url": server.backend.url,
                "state": state_name(server.backend.state),
                "reason": server.backend.reason,
            }
            for server in sorted(backend.servers, key=lambda server: server.node)
        ],
    }


def print_backends(backends: Sequence[dict[str, Any]]) -> None:
    """Print storage backends for people: one row each, and one for each node that sees it otherwise."""
    rows: list[tuple[object, ...]] = []
    for each in backends:
        used = share(each["used_bytes"], each["capacity_bytes"])
        names = ", ".join(server["node"] for server in each["servers"])
        rows.append((each["url"], _backend_state(each), used, each["blocks"], names))
        rows += [
            ("", f"{server['node']}: {server['state'].replace('_', ' ')}, {server['reason']}", "", "", "")
            for server in each["servers"]
            if (server["state"], server["reason"]) != (each["state"], each["reason"])
        ]
    print_table("Storage", ("backend", "state", "files", "blocks", "served by"), rows)


def _backend_state(each: dict[str, Any]) -> str:
    words = [each["state"].replace("_", " ")]
    if each["reason"]:
        words.append(each["reason"])
    if each["full"]:
        words.append("full: nothing is written")
    if each["scanning"]:
        of = f" of about {each['scan_expected']}" if each["scan_expected"] else ""
        words.append(f"scanning: {each['scanned_files']}{of} files")
    elif not each["complete"]:
        words.append("waits to be scanned")
    if each["removing_bytes"]:
        words.append(f"removing {format_size(each['removing_bytes'])}")
    return ", ".join(words)


# ---- nodes -----------------------------------------------------------------------------------------


def nodes_data(reply: admin_pb2.NodesResponse) -> dict[str, Any]:
    """Return all nodes as plain data."""
    return {
        "nodes": [
            {
                "node_id": node.address.node_id,
                "state": node.state,
                "host": node.address.host,
                "port": node.address.port,
                "socket_path": node.address.socket_path,
                "boot_id": node.address.boot_id,
                "epoch": f"{node.epoch:016x}",
                "capacity_bytes": node.capacity_bytes,
                "used_bytes": node.used_bytes,
                "blocks": node.blocks,
                "last_seen_s": node.last_seen_s,
            }
            for node in sorted(reply.nodes, key=lambda node: node.address.node_id)
        ]
    }


def print_nodes(reply: admin_pb2.NodesResponse) -> None:
    """Print all nodes for people."""
    rows = [
        (
            node.address.node_id,
            node.state,
            f"{node.address.host}:{node.address.port}",
            share(node.used_bytes, node.capacity_bytes),
            node.blocks,
            f"{seconds(node.last_seen_s)} ago",
        )
        for node in sorted(reply.nodes, key=lambda node: node.address.node_id)
    ]
    print_table("Nodes", ("node", "state", "address", "memory", "blocks", "last heard"), rows)


# ---- namespaces ------------------------------------------------------------------------------------


def _descriptor_data(descriptor: types_pb2.NamespaceDescriptor) -> dict[str, Any]:
    return {item.name: getattr(descriptor, item.name) for item in descriptor.DESCRIPTOR.fields}


def _hexes(digests: Any) -> list[str]:
    return [digest.hex() for digest in digests]


def namespaces_data(reply: admin_pb2.NamespacesResponse) -> dict[str, Any]:
    """Return all namespaces as plain data."""
    return {
        "namespaces": [
            {
                "digest": item.digest.hex(),
                "blocks": item.blocks,
                "bytes": item.bytes,
                "descriptor": _descriptor_data(item.descriptor),
                "disagrees_with": _hexes(item.disagrees_with),
            }
            for item in sorted(reply.namespaces, key=lambda item: (item.descriptor.model, item.digest))
        ]
    }


def print_namespaces(reply: admin_pb2.NamespacesResponse) -> None:
    """Print all namespaces for people."""
    rows = []
    for item in sorted(reply.namespaces, key=lambda item: (item.descriptor.model, item.digest)):
        d = item.descriptor
        quantised = f"/{d.kv_quant}" if d.kv_quant else ""
        shape = f"{d.layers} layers x {d.kv_heads} heads x {d.head_size}, {d.block_tokens} tokens a block"
        rows.append(
            (
                item.digest.hex(),
                d.model,
                d.revision,
                f"{d.dtype}{quantised}",
                shape,
                item.blocks,
                format_size(item.bytes),
            )
        )
    print_table("Namespaces", ("namespace", "model", "revision", "dtype", "shape", "blocks", "bytes"), rows)
    for item in reply.namespaces:
        if item.disagrees_with:
            others = ", ".join(_hexes(item.disagrees_with))
            click.echo(f"warning: {item.digest.hex()} shares nothing with {others}: only their hashing differs")


# ---- lookup and evict ------------------------------------------------------------------------------


def lookup_data(reply: master_pb2.LookupResponse, digest: bytes, asked: int) -> dict[str, Any]:
    """Return where a chain lies as plain data."""
    runs = []
    first = 0
    for run in reply.runs:
        owners = [
            {
                "node": _node_id(reply, owner.node),
                "tier": owner.tier,
                "shards": mask_shards(int.from_bytes(owner.shards, "little")),
                "backend": backend_id(owner.backend),
            }
            for owner in run.owners
        ]
        runs.append({"first": first, "blocks": run.blocks, "owners": owners})
        first += run.blocks
    return {
        "namespace": digest.hex(),
        "asked": asked,
        "prefix": reply.prefix,
        "reason": _reason(reply),
        "detail": reply.detail,
        "runs": runs,
        "residents": [
            {
                "engine": resident.engine,
                "tier": resident.tier,
                "ranges": [{"first": part.first, "blocks": part.blocks} for part in resident.ranges],
            }
            for resident in reply.residents
        ],
    }


def _node_id(reply: master_pb2.LookupResponse, index: int) -> str:
    return reply.nodes[index].node_id if index < len(reply.nodes) else f"#{index}"


def _reason(reply: master_pb2.LookupResponse) -> str:
    value = master_pb2.LookupResponse.Reason.DESCRIPTOR.values_by_number.get(reply.reason)
    return value.name.lower() if value is not None else f"reason_{reply.reason}"


def print_lookup(reply: master_pb2.LookupResponse, digest: bytes, asked: int) -> None:
    """Print where a chain lies for people."""
    data = lookup_data(reply, digest, asked)
    rows = []
    for run in data["runs"]:
        where = "; ".join(
            f"{owner['node']} ({owner['tier']}, shards {','.join(map(str, owner['shards']))})"
            for owner in run["owners"]
        )
        rows.append((f"{run['first']} to {run['first'] + run['blocks'] - 1}", run["blocks"], where))
    for resident in data["residents"]:
        for part in resident["ranges"]:
            where = f"{resident['engine']} ({resident['tier']}, its own)"
            rows.append((f"{part['first']} to {part['first'] + part['blocks'] - 1}", part["blocks"], where))
    if rows:
        print_table("", ("blocks", "count", "held by"), rows)
    ends = "" if data["reason"] == "complete" else f"; it ends there because: {data['reason'].replace('_', ' ')}"
    detail = f" ({data['detail']})" if data["detail"] else ""
    click.echo(plain(f"{reply.prefix} of {asked} blocks are in the pool{ends}{detail}").plain)


def evict_data(reply: admin_pb2.EvictBlocksResponse) -> dict[str, Any]:
    """Return what an eviction asked for as plain data."""
    return {"blocks": reply.blocks, "bytes": reply.bytes}


def print_evict(reply: admin_pb2.EvictBlocksResponse) -> None:
    """Print what an eviction asked for, for people."""
    click.echo(f"asked the nodes to drop {reply.blocks} blocks ({format_size(reply.bytes)}); pinned ones stay")
