"""``kvpoolctl explain``: why blocks are not there."""

from __future__ import annotations

from typing import Any

import click

from kvpool.cli import printers
from kvpool.cli.ctl_blocks import find_namespace, read_hashes
from kvpool.cli.options import CONTEXT
from kvpool.cli.remote import ExitCode, Remote, asks_master
from kvpool.model import KEY_BYTES
from kvpool.rpc.v1 import admin_pb2

KEYS_PER_CALL = 1024
ROWS_SHOWN = 200

ExplainedBlock = admin_pb2.ExplainedBlock

_WHY = {
    ExplainedBlock.Removal.MASTER: "by the master, before its restart",
    ExplainedBlock.Removal.ROOM: "to make room for a put",
    ExplainedBlock.Removal.WATERMARK: "by the master: over the high watermark",
    ExplainedBlock.Removal.OPERATOR: "by an operator",
    ExplainedBlock.Removal.INCOMPLETE: "because its other shards were gone",
    ExplainedBlock.Removal.NODE_LOST: "was not heard of for too long",
    ExplainedBlock.Removal.NODE_RESTARTED: "was restarted",
    ExplainedBlock.Removal.NOT_REPORTED: "reported anew without it",
    ExplainedBlock.Removal.CAPACITY: "because its storage backend, or the master's index (max_blocks), was full",
    ExplainedBlock.Removal.FILE_LOST: "because its file was missing or broken",
    ExplainedBlock.Removal.TRANSFER: "because the transfer that it was stored for has ended",
}


@click.command("explain", context_settings=CONTEXT)
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--hashes_file", metavar="FILE", help="Read the keys from a file instead; - is standard input.")
@click.option(
    "--namespace", metavar="NS", help="Digest in hex, the beginning of one, or a model's name.  [default: any]"
)
@asks_master
def explain(remote: Remote, keys: tuple[str, ...], hashes_file: str | None, namespace: str | None) -> None:
    """Say of each block where it is, or why it is not there. Exit code 1 when none is there.

    \b
    Examples:
      kvpoolctl explain 9f86d081884c7d659a2feaa0c55ad015
      kvpoolctl explain --namespace Qwen2.5-72B --hashes_file hashes.txt
      kvpoolctl --json explain --namespace 4be1 9f86d081884c7d659a2feaa0c55ad015 | jq '.blocks[].verdict'
    """
    if bool(keys) == (hashes_file is not None):
        raise click.UsageError("give either keys or --hashes_file")
    if hashes_file is not None:
        packed = read_hashes(hashes_file if hashes_file == "-" else f"@{hashes_file}")
    else:
        packed = read_hashes(",".join(keys))
    digest = find_namespace(remote, namespace) if namespace is not None else b""
    reply = admin_pb2.ExplainResponse()
    step = KEYS_PER_CALL * KEY_BYTES
    for at in range(0, len(packed), step):
        request = admin_pb2.ExplainRequest(namespace=digest, keys=packed[at : at + step])
        part = remote.call("Explain", request)
        reply.blocks.extend(part.blocks)
        reply.memory_s, reply.overflowed = part.memory_s, part.overflowed
        reply.silent.extend(name for name in part.silent if name not in reply.silent)
    data = explain_data(reply, packed)
    if remote.as_json:
        printers.print_json(data)
    else:
        print_explain(reply, data)
    if not any(block["verdict"] == "present" for block in data["blocks"]):
        raise click.exceptions.Exit(ExitCode.NOTHING)


def explain_data(reply: admin_pb2.ExplainResponse, packed: bytes) -> dict[str, Any]:
    """Return explanations as plain data."""
    blocks = []
    for number, block in enumerate(reply.blocks):
        blocks.append(
            {
                "key": packed[number * KEY_BYTES : (number + 1) * KEY_BYTES].hex(),
                "verdict": ExplainedBlock.Verdict.Name(block.verdict).lower(),
                "namespace": block.namespace.hex(),
                "holders": [
                    {"name": h.name, "tier": h.tier, "state": h.state, "shards": list(h.shards)} for h in block.holders
                ],
                "missing_shards": list(block.missing),
                "leases": block.leases,
                "last_use_s": block.last_use_s if block.HasField("last_use_s") else None,
                "removals": [
                    {"why": ExplainedBlock.Removal.Why.Name(r.why).lower(), "node": r.node, "age_s": r.age_s}
                    for r in block.removals
                ],
                "other_namespace": block.other.hex(),
                "differences": [{"field": d.field, "here": d.here, "there": d.there} for d in block.differences],
            }
        )
    return {
        "blocks": blocks,
        "memory_s": reply.memory_s,
        "overflowed": reply.overflowed,
        "silent": list(reply.silent),
    }


def print_explain(reply: admin_pb2.ExplainResponse, data: dict[str, Any]) -> None:
    """Print explanations for people: one row a block, what they have in common below."""
    rows = []
    for block, shown in list(zip(reply.blocks, data["blocks"], strict=True))[:ROWS_SHOWN]:
        rows.append((shown["key"], shown["verdict"].replace("_", " "), "; ".join(_sentences(block, reply))))
    printers.print_table("", ("block", "verdict", "why"), rows)
    if len(reply.blocks) > ROWS_SHOWN:
        click.echo(f"{len(reply.blocks) - ROWS_SHOWN} more are not shown; --json has all")
    present = sum(block["verdict"] == "present" for block in data["blocks"])
    click.echo(f"{present} of {len(reply.blocks)} blocks are in the pool")
    memory = printers.seconds(reply.memory_s)
    if reply.overflowed:
        click.echo(f"removals are remembered for the last {memory}: older ones are forgotten")
    else:
        click.echo(f"every removal since the master started, {memory} ago, is remembered")
    if reply.silent:
        names = printers.plain(", ".join(reply.silent))
        click.echo(f"not asked what they are writing, because they do not answer: {names}")


def _sentences(block: ExplainedBlock, reply: admin_pb2.ExplainResponse) -> list[str]:
    found = []
    for holder in block.holders:
        shards = f", shards {','.join(map(str, holder.shards))}" if holder.shards else ""
        state = f", {holder.state}" if holder.state not in {"", "live"} else ""
        found.append(f"{holder.name} ({holder.tier}{state}{shards})")
    if block.missing:
        found.append(f"shards {','.join(map(str, block.missing))} are nowhere")
    if block.leases:
        found.append(f"leased {block.leases} times")
    if block.HasField("last_use_s"):
        found.append(f"last used {printers.seconds(block.last_use_s)} ago or before")
    found += [_removed(removal) for removal in block.removals]
    if block.other:
        fields = ", ".join(f"{d.field} is {d.there!r} there, {d.here!r} here" for d in block.differences)
        found.append(f"held under namespace {block.other.hex()}: {fields or 'the one asked for is not registered'}")
    if block.verdict == ExplainedBlock.NEVER_STORED:
        found.append(f"not since the master started, {printers.seconds(reply.memory_s)} ago")
    elif block.verdict == ExplainedBlock.UNKNOWN:
        found.append(f"not removed in the last {printers.seconds(reply.memory_s)}; what was before is forgotten")
    elif block.verdict == ExplainedBlock.UNREPORTED:
        found.append("its node has it, the index does not (yet)")
    return found


def _removed(removal: ExplainedBlock.Removal) -> str:
    ago = f"{printers.seconds(removal.age_s)} ago"
    if removal.why in {ExplainedBlock.Removal.NODE_LOST, ExplainedBlock.Removal.NODE_RESTARTED}:
        return f"node {removal.node}, which had it, {_WHY[removal.why]} {ago}"
    if removal.why == ExplainedBlock.Removal.NOT_REPORTED:
        return f"node {removal.node}, which had it, {_WHY[removal.why]} {ago}"
    return f"evicted from {removal.node} {ago} {_WHY.get(removal.why, '')}"
