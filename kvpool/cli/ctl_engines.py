"""``kvpoolctl engines``: the engines that have announced themselves to the master."""

from __future__ import annotations

from typing import Any

import click

from kvpool.cli import printers
from kvpool.cli.options import CONTEXT
from kvpool.cli.remote import ExitCode, Remote, asks_master
from kvpool.rpc.v1 import master_pb2, master_pb2_grpc

ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


@click.command("engines", context_settings=CONTEXT)
@asks_master
def engines(remote: Remote) -> None:
    """Every engine that has announced itself: address, role, model, parallelism. Exit code 1 when there is none.

    \b
    Examples:
      kvpoolctl engines
      kvpoolctl engines --json | jq -r '.engines[] | select(.role == "prefill") | .address'
    """
    reply = known(remote)
    if remote.as_json:
        printers.print_json(engines_data(reply))
    elif reply.engines:
        print_engines(reply)
    else:
        click.echo("no engine has announced itself yet; engines with kvpool's connector do, when they start")
    if not reply.engines:
        raise click.exceptions.Exit(ExitCode.NOTHING)


def known(remote: Remote) -> master_pb2.EnginesResponse:
    """Return the engines that the master knows, in the order of their addresses. Raises RemoteError."""
    reply = remote.call("Engines", master_pb2.EnginesRequest(), master_pb2_grpc.MasterStub)
    ordered = sorted(
        reply.engines, key=lambda one: (one.engine.address, one.engine.data_parallel_rank, one.engine.engine)
    )
    return master_pb2.EnginesResponse(engines=ordered)


def engines_data(reply: master_pb2.EnginesResponse) -> dict[str, Any]:
    """Return all engines as plain data."""
    return {
        "engines": [
            {
                "engine_id": status.engine.engine,
                "address": status.engine.address,
                "role": ROLES.get(status.engine.role, status.engine.role),
                "model": status.engine.model,
                "tensor_parallel": status.engine.tensor_parallel,
                "pipeline_parallel": status.engine.pipeline_parallel,
                "data_parallel_rank": status.engine.data_parallel_rank,
                "host": status.engine.host,
                "boot_id": status.engine.boot_id,
                "devices": list(status.engine.devices),
                "namespaces": [digest.hex() for digest in status.engine.namespaces],
                "transfers": status.engine.transfers,
                "layerwise": status.engine.layerwise,
                "loads": status.engine.loads,
                "reports_residency": status.engine.residency,
                "blocks": status.blocks,
                "last_seen_s": status.last_seen_s,
            }
            for status in reply.engines
        ]
    }


def print_engines(reply: master_pb2.EnginesResponse) -> None:
    """Print all engines for people."""
    rows = []
    for one in engines_data(reply)["engines"]:
        size = f"tp {one['tensor_parallel']}, pp {one['pipeline_parallel']}, dp rank {one['data_parallel_rank']}"
        moves = "layer by layer" if one["layerwise"] else "whole"
        rows.append(
            (
                one["address"] or "not known",
                one["role"],
                one["model"],
                one["engine_id"],
                size,
                one["host"],
                moves if one["transfers"] else "no",
                one["blocks"] if one["reports_residency"] else "not told",
                f"{printers.seconds(one['last_seen_s'])} ago",
            )
        )
    headings = ("address", "role", "model", "engine", "size", "host", "transfers", "own blocks", "last heard")
    printers.print_table("Engines", headings, rows)
