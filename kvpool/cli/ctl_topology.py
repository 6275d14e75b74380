"""``kvpoolctl topology | ranktable``: what the master knows of the cluster, and rank tables (version 1.2).

The rank table is the file that LLMDataDist reads: upstream, ``gen_ranktable.sh`` of vllm-ascend's examples makes it by
asking every host at once. kvpool itself needs none.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from kvpool.cli import ctl_engines, printers
from kvpool.cli.options import CONTEXT, one_line_errors
from kvpool.cli.remote import ExitCode, Remote, asks_master
from kvpool.errors import InvalidArgumentError
from kvpool.rpc.v1 import admin_pb2, master_pb2, types_pb2

NPUS_MAX = 1024
"""On one host: far above what is built, far below what would fill a terminal."""

_LIST_FLAGS = frozenset({"ips", "local-device-ids", "hccn-conf"})
_HCCN_LINE = re.compile(r"\s*address_(\d{1,4})\s*=\s*(\S+)\s*")
_INTERFACE = re.compile(r"[^\s/]{1,15}")  # what the kernel accepts as a name


# ---- topology --------------------------------------------------------------------------------------


@click.command("topology", context_settings=CONTEXT)
@click.option("--ranktable", is_flag=True, help="As a rank table, version 1.2, of the announced engines.")
@asks_master
def topology(remote: Remote, *, ranktable: bool) -> None:
    """What the master knows of the cluster, as JSON. Exit code 1 when no node is live.

    \b
    Examples:
      kvpoolctl topology | jq -r '.nodes[] | "\\(.host):\\(.port)"'
      kvpoolctl topology --ranktable
    A rank table has the devices that engines name; kvpoolctl ranktable makes one without any engine.
    """
    engines = ctl_engines.known(remote)
    nodes = remote.call("Nodes", admin_pb2.NodesRequest())
    if ranktable:
        printers.print_json(live_rank_table(engines))
        if left_out := [one.engine.engine for one in engines.engines if not _has_entries(one.engine)]:
            why = "they do not name their devices, or neither prefill nor decode alone"
            click.echo(f"left out: {', '.join(left_out)}: {why}", err=True)
    else:
        status = remote.call("Status", admin_pb2.StatusRequest())
        spaces = remote.call("Namespaces", admin_pb2.NamespacesRequest())
        printers.print_json(topology_data(remote.address, status, nodes, engines, spaces))
    if not any(node.state == "live" for node in nodes.nodes):
        raise click.exceptions.Exit(ExitCode.NOTHING)


def topology_data(
    address: str,
    status: admin_pb2.StatusResponse,
    nodes: admin_pb2.NodesResponse,
    engines: master_pb2.EnginesResponse,
    spaces: admin_pb2.NamespacesResponse,
) -> dict[str, Any]:
    """Return the cluster as plain data."""
    return {
        "master": {
            "address": address,
            "version": status.version,
            "epoch": f"{status.master_epoch:016x}",
            "uptime_s": status.uptime_s,
        },
        **printers.nodes_data(nodes),
        **ctl_engines.engines_data(engines),
        "namespaces": [item for item in printers.namespaces_data(spaces)["namespaces"] if item["blocks"]],
        "backends": [
            {
                "id": printers.backend_id(backend.id),
                "url": backend.url,
                "state": types_pb2.Backend.State.Name(backend.state).lower(),
                "nodes": sorted(server.node for server in backend.servers),
            }
            for backend in sorted(status.backends, key=lambda backend: backend.url)
        ],
    }


def _has_entries(engine: master_pb2.EngineAnnouncement) -> bool:
    return bool(engine.devices) and engine.role in {"kv_producer", "kv_consumer"}


def live_rank_table(engines: master_pb2.EnginesResponse) -> dict[str, Any]:
    """Return the rank table of engines; it is ``completed`` when some prefill and some decode."""
    lists: dict[str, list[dict[str, str]]] = {"kv_producer": [], "kv_consumer": []}
    clusters = itertools.count(1)
    for role, entries in lists.items():
        for engine in (status.engine for status in engines.engines if status.engine.role == role):
            host = engine.address.rpartition(":")[0].strip("[]") or engine.host
            for device in engine.devices:
                number, _, address = device.partition(",")
                entries.append(_entry(host, number, address, next(clusters)))
    prefill, decode = lists.values()
    return _table(len({entry["server_id"] for entry in prefill + decode}), prefill, decode)


def _entry(host: str, device: str, address: str, cluster: int) -> dict[str, str]:
    return {"server_id": host, "device_id": device, "device_ip": address, "cluster_id": str(cluster)}


def _table(servers: int, prefill: Sequence[object], decode: Sequence[object], *, whole: bool = False) -> dict[str, Any]:
    return {
        "version": "1.2",
        "server_count": str(servers),
        "prefill_device_list": prefill,
        "decode_device_list": decode,
        "status": "completed" if whole or (prefill and decode) else "initializing",
    }


# ---- a rank table without a cluster -----------------------------------------------------------------


class _ListFlags(click.Command):
    """Some flags take every value up to the next flag, as shell scripts read them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give each of several values the flag that stands before them."""
        spread: list[str] = []
        flag, first = "", True
        for arg in args:
            if arg.startswith("--"):
                flag, given, _ = arg.partition("=")
                first = not given
            elif not first and flag.lstrip("-").replace("_", "-") in _LIST_FLAGS:
                spread.append(flag)
            else:
                first = False
            spread.append(arg)
        return super().parse_args(ctx, spread)


@click.command("ranktable", cls=_ListFlags, context_settings=CONTEXT)
@click.option("--ips", multiple=True, required=True, metavar="IP...", help="Every host, those of prefill first.")
@click.option(
    "--npus-per-node", type=click.IntRange(1, NPUS_MAX), default=8, show_default=True, help="Devices of each host."
)
@click.option("--network-card-name", metavar="NAME", help="Accepted for old command lines: nothing is asked over it.")
@click.option("--prefill-device-cnt", type=click.IntRange(0), required=True, help="Devices that prefill.")
@click.option("--decode-device-cnt", type=click.IntRange(0), required=True, help="Devices that decode.")
@click.option(
    "--local-device-ids", multiple=True, metavar="ID,ID...",
    help="Devices to use: one list for all hosts, or one for each of --ips.  [default: all]",
)  # fmt: skip
@click.option(
    "--hccn-conf", multiple=True, metavar="IP=FILE", help="A host's /etc/hccn.conf: the addresses of its devices."
)
def ranktable(
    ips: tuple[str, ...],
    npus_per_node: int,
    network_card_name: str | None,
    prefill_device_cnt: int,
    decode_device_cnt: int,
    local_device_ids: tuple[str, ...],
    hccn_conf: tuple[str, ...],
) -> None:
    """Print a rank table, version 1.2, made of its flags alone: no host is asked.

    \b
    Examples:
      kvpoolctl ranktable --ips 192.0.0.1 192.0.0.2 192.0.0.3 --npus-per-node 2 --network-card-name eth0 \\
        --prefill-device-cnt 2 --decode-device-cnt 4 --local-device-ids 0,1 6,7 6,7 > ranktable.json
      kvpoolctl ranktable --ips 10.0.0.1 10.0.0.2 --prefill-device-cnt 8 --decode-device-cnt 8 \\
        --hccn-conf 10.0.0.1=hccn-1.conf 10.0.0.2=hccn-2.conf
    Without --hccn-conf, device_ip is empty. super_pod_id and super_device_id (A3) are left out.
    """
    with one_line_errors():
        if network_card_name is not None and not _INTERFACE.fullmatch(network_card_name):
            allowed = "1 to 15 characters without spaces and slashes"
            raise InvalidArgumentError(
                "--network-card-name", f"{network_card_name!r} is not allowed; allowed: {allowed}"
            )
        hosts = _hosts(ips)
        devices = _devices(hosts, npus_per_node, local_device_ids)
        addresses = _addresses(hosts, hccn_conf)
        table = rank_table(devices, prefill_device_cnt, decode_device_cnt, addresses)
    printers.print_json(table)
    unknown = sum(not device["device_ip"] for role in ("prefill", "decode") for device in table[f"{role}_device_list"])
    if unknown:
        click.echo(f"device_ip of {unknown} devices is empty: --hccn-conf IP=FILE tells it", err=True)


def rank_table(
    devices: Mapping[str, Sequence[int]],
    prefill: int,
    decode: int,
    addresses: Mapping[tuple[str, int], str],
) -> dict[str, Any]:
    """Return the table of hosts (in order) with their device ids; the first ``prefill`` devices prefill.

    ``addresses`` are the devices' own, by host and id; one that is missing is left empty. Raises InvalidArgumentError.
    """
    entries = [
        _entry(host, str(device), addresses.get((host, device), ""), cluster)
        for cluster, (host, device) in enumerate(((h, d) for h, ids in devices.items() for d in ids), 1)
    ]
    if not 0 < prefill + decode <= len(entries):
        raise InvalidArgumentError(
            "--prefill-device-cnt and --decode-device-cnt",
            f"{prefill} + {decode} is not allowed; allowed: 1 to {len(entries)}, the devices of all hosts",
        )
    return _table(len(devices), entries[:prefill], entries[prefill : prefill + decode], whole=True)


def _hosts(ips: Sequence[str]) -> list[str]:
    hosts = [ip for word in ips for ip in word.split(",") if ip]
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise InvalidArgumentError("--ips", f"{host!r} is not allowed; allowed: IP addresses") from None
    if len(set(hosts)) < len(hosts) or not hosts:
        raise InvalidArgumentError("--ips", "allowed: one IP address or more, each of them once")
    return hosts


def _devices(hosts: Sequence[str], npus: int, lists: Sequence[str]) -> dict[str, Sequence[int]]:
    if not lists:
        return {host: range(npus) for host in hosts}
    if len(lists) not in {1, len(hosts)}:
        raise InvalidArgumentError(
            "--local-device-ids", f"{len(lists)} lists are not allowed; allowed: one, or {len(hosts)}: one for each IP"
        )
    each = lists if len(lists) == len(hosts) else [lists[0]] * len(hosts)
    return {host: _ids(text, npus) for host, text in zip(hosts, each, strict=True)}


def _ids(text: str, npus: int) -> list[int]:
    words = text.split(",")
    ids = [int(word) for word in words if re.fullmatch(r"\d{1,4}", word)]
    if len(ids) != len(words) or len(set(ids)) != len(ids) or len(ids) > npus:
        allowed = f"up to {npus} (--npus-per-node) different numbers with commas between them, for example 0,1"
        raise InvalidArgumentError("--local-device-ids", f"{text!r} is not allowed; allowed: {allowed}")
    return ids


def _addresses(hosts: Sequence[str], files: Sequence[str]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for word in files:
        host, _, path = word.partition("=")
        if host not in hosts or not path:
            raise InvalidArgumentError("--hccn-conf", f"{word!r} is not allowed; allowed: IP=FILE with one of --ips")
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError("--hccn-conf", f"cannot read {path}: {error}") from None
        matches = [match for match in map(_HCCN_LINE.fullmatch, lines) if match is not None]
        if not matches:
            raise InvalidArgumentError("--hccn-conf", f"{path} has no line such as address_0=29.0.0.1")
        found.update({(host, int(match[1])): match[2] for match in matches})
    return found
