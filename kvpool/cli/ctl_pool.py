"""``kvpoolctl status | nodes | namespaces``: the pool as a whole."""

from __future__ import annotations

import click

from kvpool.cli import printers
from kvpool.cli.options import CONTEXT
from kvpool.cli.remote import ExitCode, Remote, asks_master
from kvpool.rpc.v1 import admin_pb2


@click.command("status", context_settings=CONTEXT)
@asks_master
def status(remote: Remote) -> None:
    """One page about the pool: uptime, blocks, memory, counters.

    \b
    Examples:
      kvpoolctl status
      kvpoolctl --json status | jq .used_bytes
    """
    reply = remote.call("Status", admin_pb2.StatusRequest())
    if remote.as_json:
        printers.print_json(printers.status_data(reply))
    else:
        printers.print_status(reply)


@click.command("nodes", context_settings=CONTEXT)
@asks_master
def nodes(remote: Remote) -> None:
    """Every node: state, address, memory. Exit code 1 when none is live.

    \b
    Examples:
      kvpoolctl nodes
      kvpoolctl nodes --json | jq -r '.nodes[] | select(.state != "live") | .node_id'
    """
    reply = remote.call("Nodes", admin_pb2.NodesRequest())
    if remote.as_json:
        printers.print_json(printers.nodes_data(reply))
    elif reply.nodes:
        printers.print_nodes(reply)
    else:
        click.echo("no node has reported yet; start one: kvpool-node --master " + remote.address)
    if not any(node.state == "live" for node in reply.nodes):
        raise click.exceptions.Exit(ExitCode.NOTHING)


@click.command("namespaces", context_settings=CONTEXT)
@asks_master
def namespaces(remote: Remote) -> None:
    """Every namespace: which model's blocks, in which shape, how many. Exit code 1 when there is none.

    \b
    Examples:
      kvpoolctl namespaces
      kvpoolctl namespaces --json | jq -r '.namespaces[].descriptor.model'
    """
    reply = remote.call("Namespaces", admin_pb2.NamespacesRequest())
    if remote.as_json:
        printers.print_json(printers.namespaces_data(reply))
    elif reply.namespaces:
        printers.print_namespaces(reply)
    else:
        click.echo("no engine has registered a namespace yet")
    if not reply.namespaces:
        raise click.exceptions.Exit(ExitCode.NOTHING)
